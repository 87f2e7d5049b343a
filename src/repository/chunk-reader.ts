// Brings chunks from packs to memory: neighbours in one read, several reads at once, every chunk checked against its id. Keeps a
// bounded amount of plain data. It knows entries of the index, not disks.

import {
  CHUNK_CACHE_BYTES,
  FETCH_BYTES,
  FETCH_GAP_BYTES,
  FETCH_PLAIN_BYTES,
  FETCHES_IN_FLIGHT,
} from '../base/limits.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import type { BlobIndex } from './blob-index.ts'
import { packKey, readBlobs } from './pack.ts'
import { ID_BYTES } from './spec.ts'
import { EXPAND_FIELDS, expandMemory, PIECE_GOOD, PIECE_REASONS, type Squeezer } from './squeezer.ts'
import type { ObjectStore } from './store.ts'

/** A chunk's plain bytes, or why there are none. */
export type Chunk = Uint8Array | BlockError

/** A read of one pack: the entries in it lie one after the other, with gaps at most. */
interface Fetch {
  readonly start: number
  end: number
  /** Bytes that its chunks have. */
  plain: number
  readonly entries: number[]
}

export class ChunkReader {
  readonly #store: ObjectStore
  readonly #index: BlobIndex
  readonly #squeezer: Squeezer
  /** By entry of the index; the order is that of use, oldest first. */
  readonly #chunks = new Map<number, Uint8Array>()
  #bytes = 0
  #keeps = CHUNK_CACHE_BYTES
  #fetches = 0
  readonly #coming = new Map<number, Promise<Map<number, Chunk>>>()
  #reading = 0
  readonly #waiters: (() => void)[] = []
  /** Memory of reads that are over: as much as was in flight at once. */
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
    this.#keeps = Math.max(CHUNK_CACHE_BYTES, bytes)
  }

  /** The chunk when it is in memory. */
  cached(entry: number): Uint8Array | undefined {
    const found = this.#chunks.get(entry)
    if (found === undefined) return undefined
    this.#chunks.delete(entry)
    this.#chunks.set(entry, found)
    return found
  }

  /** The chunks of all entries, by entry. Fails only by a Chunk that is an error. */
  async load(entries: readonly number[]): Promise<Map<number, Chunk>> {
    const found = new Map<number, Chunk>()
    const coming = new Set<Promise<Map<number, Chunk>>>()
    const missing: number[] = []
    for (const entry of new Set(entries)) {
      const chunk = this.cached(entry)
      const promised = this.#coming.get(entry)
      if (chunk !== undefined) found.set(entry, chunk)
      else if (promised !== undefined) coming.add(promised)
      else missing.push(entry)
    }
    for (const fetch of this.#plan(missing)) {
      this.#fetches++
      const promise = this.#fetch(fetch)
      for (const entry of fetch.entries) this.#coming.set(entry, promise)
      coming.add(promise)
    }
    const wanted = new Set(entries)
    for (const chunks of await Promise.all(coming)) {
      for (const [entry, chunk] of chunks) if (wanted.has(entry)) found.set(entry, chunk)
    }
    return found
  }

  /** Groups entries into reads. */
  #plan(entries: number[]): Fetch[] {
    const index = this.#index
    entries.sort((a, b) => index.packNumber(a) - index.packNumber(b) || index.offset(a) - index.offset(b))
    const fetches: Fetch[] = []
    let last: Fetch | undefined
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
      fetches.push(last)
    }
    return fetches
  }

  async #fetch(fetch: Fetch): Promise<Map<number, Chunk>> {
    while (this.#reading >= FETCHES_IN_FLIGHT) await new Promise<void>((resolve) => this.#waiters.push(resolve))
    this.#reading++
    try {
      const chunks = await this.#read(fetch)
      for (const [entry, chunk] of chunks) if (!(chunk instanceof BlockError)) this.#keep(entry, chunk)
      return chunks
    } catch (error) {
      const failure = toBlockError(error, `${this.#store.name}: read a pack`)
      return new Map(fetch.entries.map((entry) => [entry, failure]))
    } finally {
      for (const entry of fetch.entries) this.#coming.delete(entry)
      this.#reading--
      this.#waiters.shift()?.()
    }
  }

  async #read(fetch: Fetch): Promise<Map<number, Chunk>> {
    const index = this.#index
    const { start, end, entries } = fetch
    const bytes = await readBlobs(this.#store, index.pack(entries[0] as number), start, end)
    const pieces = new Uint32Array(entries.length * EXPAND_FIELDS)
    const ids = new Uint8Array(entries.length * ID_BYTES)
    for (const [i, entry] of entries.entries()) {
      const at = index.offset(entry) - start
      const piece = [at, index.stored(entry), index.plain(entry), index.codec(entry), index.crc(entry)]
      pieces.set(piece, i * EXPAND_FIELDS)
      ids.set(index.id(entry), i * ID_BYTES)
    }
    const memory = this.#free.pop() ?? expandMemory(FETCH_BYTES, FETCH_PLAIN_BYTES)
    memory.set(bytes)
    const outcome = await this.#squeezer.expand(memory, pieces, ids, FETCH_BYTES)
    const chunks = new Map<number, Chunk>()
    let at = FETCH_BYTES
    for (const [i, entry] of entries.entries()) {
      const length = index.plain(entry)
      // A copy: the memory is for the next read.
      const chunk =
        outcome[i] === PIECE_GOOD ? memory.slice(at, at + length) : this.#damage(entry, outcome[i] as number)
      chunks.set(entry, chunk)
      at += length
    }
    this.#free.push(memory)
    return chunks
  }

  #damage(entry: number, outcome: number): BlockError {
    const key = packKey(this.#index.pack(entry))
    const name = Buffer.from(this.#index.id(entry)).toString('hex').slice(0, 16)
    const what = `chunk ${name} at byte ${this.#index.offset(entry)} of ${key} is damaged: ${PIECE_REASONS[outcome] ?? ''}`
    return new BlockError('corrupt', what, { path: key })
  }

  #keep(entry: number, chunk: Uint8Array): void {
    if (this.#chunks.has(entry)) return
    this.#chunks.set(entry, chunk)
    this.#bytes += chunk.length
    for (const [oldest, bytes] of this.#chunks) {
      if (this.#bytes <= this.#keeps) break
      this.#chunks.delete(oldest)
      this.#bytes -= bytes.length
    }
  }
}
