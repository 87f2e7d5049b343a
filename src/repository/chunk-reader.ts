// Brings chunks from packs to memory: neighbours in one read, several reads at once, every chunk checked against its id. What it brought
// stays for a while (chunk-cache.ts). It knows entries of the index, not disks.

import { assert } from '../base/assert.ts'
import {
  FETCH_BYTES,
  FETCH_GAP_BYTES,
  FETCH_PLAIN_BYTES,
  FETCHES_IN_FLIGHT,
  FETCH_URGENT_BYTES,
} from '../base/limits.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import type { BlobIndex } from './blob-index.ts'
import { ChunkCache, type Slab } from './chunk-cache.ts'
import { packKey, readBlobs } from './pack.ts'
import { ID_BYTES } from './spec.ts'
import { EXPAND_FIELDS, PIECE_GOOD, PIECE_REASONS, sharedMemory, type Squeezer } from './squeezer.ts'
import type { ObjectStore } from './store.ts'

/** A chunk's plain bytes, or why there are none. */
export type Chunk = Uint8Array | BlockError

/** A read of one pack: the entries in it lie one after the other, with gaps at most. */
interface Span {
  readonly start: number
  end: number
  /** Bytes that its chunks have. */
  plain: number
  readonly entries: number[]
}

/** A read that is under way. It fails only by the entries that have failed. */
class Fetch {
  readonly failures = new Map<number, BlockError>()
  done: Promise<void> = Promise.resolve()
  /** Where its chunks are, held for all who wait. */
  slab: Slab | undefined
  waiting = 0
}

export class ChunkReader {
  readonly #store: ObjectStore
  readonly #index: BlobIndex
  readonly #squeezer: Squeezer
  readonly #cache = new ChunkCache()
  #fetches = 0
  readonly #coming = new Map<number, Fetch>()
  #reading = 0
  readonly #waiters: (() => void)[] = []
  /** Memory for stored forms, of reads that are over: as much as was in flight at once. */
  readonly #free: Uint8Array<SharedArrayBuffer>[] = []

  constructor(store: ObjectStore, index: BlobIndex, squeezer: Squeezer) {
    this.#store = store
    this.#index = index
    this.#squeezer = squeezer
  }

  /** Reads of packs that were begun. */
  get fetches(): number {
    return this.#fetches
  }

  /** Plain data that is kept, in bytes, when that is more than usual. */
  keep(bytes: number): void {
    this.#cache.keep(bytes)
  }

  /** The chunk when it is in memory; its bytes are good until the next await. */
  cached(entry: number): Uint8Array | undefined {
    return this.#cache.find(entry)
  }

  /**
   * Brings the chunks of all entries to memory and calls `use`, which finds each by its entry. What it finds is good until `use` returns,
   * or the promise that it returned is settled. Fails only as `use` does.
   */
  async load(
    entries: readonly number[],
    use: (chunkOf: (entry: number) => Chunk) => Promise<void> | undefined,
  ): Promise<void> {
    const held: Slab[] = []
    const fetches = new Set<Fetch>()
    const missing: number[] = []
    for (const entry of new Set(entries)) {
      const slab = this.#cache.hold(entry)
      const coming = this.#coming.get(entry)
      if (slab !== undefined) held.push(slab)
      else if (coming === undefined) missing.push(entry)
      else fetches.add(coming)
    }
    const spans = this.#plan(missing)
    // A guest that reads a little does not stand behind what is read ahead or copied.
    const isUrgent = spans.length === 1 && (spans[0] as Span).plain <= FETCH_URGENT_BYTES
    for (const span of spans) fetches.add(this.#begin(span, isUrgent))
    for (const fetch of fetches) fetch.waiting++
    try {
      for (const fetch of fetches) await fetch.done
      const used = use((entry) => this.#cache.find(entry) ?? failureOf(entry, fetches))
      if (used !== undefined) await used
    } finally {
      for (const slab of held) this.#cache.release(slab)
      for (const fetch of fetches) this.#leave(fetch)
    }
  }

  /** Groups entries into reads. */
  #plan(entries: number[]): Span[] {
    const index = this.#index
    entries.sort((a, b) => index.packNumber(a) - index.packNumber(b) || index.offset(a) - index.offset(b))
    const spans: Span[] = []
    let last: Span | undefined
    let pack = -1
    for (const entry of entries) {
      const start = index.offset(entry)
      const end = start + index.stored(entry)
      const plain = index.plain(entry)
      const isNear =
        last !== undefined &&
        start - last.end <= FETCH_GAP_BYTES &&
        end - last.start <= FETCH_BYTES &&
        last.plain + plain <= FETCH_PLAIN_BYTES
      if (last !== undefined && isNear && index.packNumber(entry) === pack) {
        last.end = end
        last.plain += plain
        last.entries.push(entry)
        continue
      }
      pack = index.packNumber(entry)
      last = { start, end, plain, entries: [entry] }
      spans.push(last)
    }
    return spans
  }

  #begin(span: Span, isUrgent: boolean): Fetch {
    this.#fetches++
    const fetch = new Fetch()
    for (const entry of span.entries) this.#coming.set(entry, fetch)
    fetch.done = this.#fetch(span, fetch, isUrgent)
    return fetch
  }

  #leave(fetch: Fetch): void {
    fetch.waiting--
    if (fetch.waiting === 0 && fetch.slab !== undefined) this.#cache.release(fetch.slab)
  }

  async #fetch(span: Span, fetch: Fetch, isUrgent: boolean): Promise<void> {
    while (!isUrgent && this.#reading >= FETCHES_IN_FLIGHT)
      await new Promise<void>((resolve) => this.#waiters.push(resolve))
    this.#reading++
    const memory = this.#free.pop() ?? sharedMemory(FETCH_BYTES)
    try {
      await this.#read(span, fetch, memory, isUrgent)
    } catch (error) {
      const failure = toBlockError(error, `${this.#store.name}: read a pack`)
      for (const entry of span.entries) fetch.failures.set(entry, failure)
    } finally {
      for (const entry of span.entries) this.#coming.delete(entry)
      this.#free.push(memory)
      this.#reading--
      if (this.#reading < FETCHES_IN_FLIGHT) this.#waiters.shift()?.()
    }
  }

  async #read(
    { start, end, plain, entries }: Span,
    fetch: Fetch,
    memory: Uint8Array<SharedArrayBuffer>,
    isUrgent: boolean,
  ): Promise<void> {
    const index = this.#index
    const bytes = await readBlobs(this.#store, index.pack(entries[0] as number), start, end, memory)
    if (bytes.buffer !== memory.buffer) memory.set(bytes)
    const pieces = new Uint32Array(entries.length * EXPAND_FIELDS)
    const ids = new Uint8Array(entries.length * ID_BYTES)
    for (const [i, entry] of entries.entries()) {
      const at = index.offset(entry) - start
      const piece = [at, index.stored(entry), index.plain(entry), index.codec(entry), index.crc(entry)]
      pieces.set(piece, i * EXPAND_FIELDS)
      ids.set(index.id(entry), i * ID_BYTES)
    }
    const { slab, into } = this.#cache.take(plain)
    fetch.slab = slab
    const outcome = await this.#squeezer.expand(memory, pieces, ids, into, isUrgent)
    let at = 0
    for (const [i, entry] of entries.entries()) {
      const length = index.plain(entry)
      if (outcome[i] === PIECE_GOOD) this.#cache.add(entry, slab, into.subarray(at, at + length))
      else fetch.failures.set(entry, this.#damage(entry, outcome[i] as number))
      at += length
    }
  }

  #damage(entry: number, outcome: number): BlockError {
    const key = packKey(this.#index.pack(entry))
    const name = Buffer.from(this.#index.id(entry)).toString('hex').slice(0, 16)
    const what = `chunk ${name} at byte ${this.#index.offset(entry)} of ${key} is damaged: ${PIECE_REASONS[outcome] ?? ''}`
    return new BlockError('corrupt', what, { path: key })
  }
}

function failureOf(entry: number, fetches: ReadonlySet<Fetch>): BlockError {
  const failures = [...fetches].map((fetch) => fetch.failures.get(entry))
  const found = failures.find((failure) => failure !== undefined)
  assert(found !== undefined, 'what was asked for has come or failed')
  return found
}
