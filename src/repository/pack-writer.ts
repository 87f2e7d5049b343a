// Fills packs with the new blobs of one backup and brings them to the store, a bounded number at a time. A blob becomes known
// to the repository's index only when its pack is durable, so no other backup can rely on what may yet be lost. Chunks and nodes
// fill packs of their own (lanes), in slabs of memory that are used again when their pack is in the store.

import zlib from 'node:zlib'
import { assert } from '../base/assert.ts'
import { copyBytes } from '../base/bytes.ts'
import { INDEX_EVERY_BYTES, PACK_BYTES, PACK_SLAB, PACKS_IN_FLIGHT, REPOSITORY_SPARE_MS } from '../base/limits.ts'
import { Spares } from '../base/spares.ts'
import type { Pending } from '../block/device.ts'
import { type BlobIndex, NO_ENTRY } from './blob-index.ts'
import { encodeIndex } from './index-object.ts'
import type { Inventory } from './inventory.ts'
import {
  type BlobRecord,
  newPackName,
  type PackDirectory,
  packFooter,
  packHeader,
  packKey,
  recordId,
  writeRecord,
} from './pack.ts'
import {
  BLOB_CHUNK,
  BLOB_NODE,
  CODEC_LOCKED,
  CODEC_RAW,
  ID_BYTES,
  INDEXES,
  PACK_FOOTER_BYTES,
  PACK_HEADER_BYTES,
  RECORD_BYTES,
} from './spec.ts'
import { type ObjectSink, totalLength } from './store.ts'
import type { Vault } from './vault.ts'

/** Of writers that are done: those of the packs that one of them fills and those that are in flight. */
const spareSlabs = new Spares<Uint8Array>(((PACKS_IN_FLIGHT + 1) * PACK_BYTES) / PACK_SLAB, REPOSITORY_SPARE_MS)

/** A pack being filled. */
class Lane {
  readonly parts: Uint8Array[] = []
  bytes = 0
  count = 0
  #records = new Uint8Array(64 * RECORD_BYTES)
  readonly #slabs: Uint8Array[] = []
  readonly #free: Uint8Array[]
  #used = PACK_SLAB

  /** `free` are slabs for whoever needs one, and gets them back. */
  constructor(free: Uint8Array[]) {
    this.#free = free
  }

  /** Copies the blob. */
  add(id: Uint8Array, form: Uint8Array, record: BlobRecord): void {
    assert(form.length === record.stored)
    if ((this.count + 1) * RECORD_BYTES > this.#records.length) {
      const larger = new Uint8Array(this.#records.length * 2)
      larger.set(this.#records)
      this.#records = larger
    }
    writeRecord(this.#records, this.count++ * RECORD_BYTES, id, record)
    this.#keep(form)
  }

  get records(): Uint8Array {
    return this.#records.subarray(0, this.count * RECORD_BYTES)
  }

  /** Takes over all blobs of another lane. */
  absorb(other: Lane): void {
    const records = Buffer.concat([this.records, other.records])
    this.parts.push(...other.parts)
    this.#slabs.push(...other.#slabs)
    this.#used = PACK_SLAB
    this.bytes += other.bytes
    this.count += other.count
    this.#records = records
  }

  /** The pack is in the store, or never will be. */
  release(): void {
    this.#free.push(...this.#slabs)
  }

  #keep(form: Uint8Array): void {
    assert(form.length <= PACK_SLAB, 'a blob fits into a slab')
    let slab = this.#slabs.at(-1)
    if (slab === undefined || this.#used + form.length > PACK_SLAB) {
      slab = this.#free.pop() ?? spareSlabs.take() ?? new Uint8Array(PACK_SLAB)
      this.#slabs.push(slab)
      this.parts.push(slab.subarray(0, 0))
      this.#used = 0
    }
    copyBytes(form, 0, slab, this.#used, form.length)
    this.#used += form.length
    this.parts[this.parts.length - 1] = slab.subarray(0, this.#used)
    this.bytes += form.length
  }
}

export class PackWriter {
  readonly #store: ObjectSink
  readonly #vault: Vault
  #index: BlobIndex
  readonly #inventory: Pick<Inventory, 'relieve'>
  /** Slabs that no lane uses: at most those of the packs that were in flight together. */
  readonly #free: Uint8Array[] = []
  #chunks = new Lane(this.#free)
  #nodes = new Lane(this.#free)
  /** Ids of blobs that are not durable yet, as latin1 text: at most what is in flight. */
  readonly #pending = new Set<string>()
  readonly #inFlight = new Set<Promise<void>>()
  #unindexed: PackDirectory[] = []
  #unindexedBytes = 0
  #storedBytes = 0
  readonly #owner: string
  #failure: unknown

  /** `owner` is the random end of the backup's id, 8 hexadecimal digits: its packs begin with it. `index` is one of the inventory's. */
  constructor(store: ObjectSink, vault: Vault, index: BlobIndex, owner: string, inventory: Pick<Inventory, 'relieve'>) {
    this.#store = store
    this.#vault = vault
    this.#owner = owner
    this.#index = index
    this.#inventory = inventory
  }

  /** Bytes of all objects that were written. */
  get storedBytes(): number {
    return this.#storedBytes
  }

  /** True for a blob that is there, or on its way. */
  has(ids: Uint8Array, at: number): boolean {
    return this.#index.findLasting(ids, at) !== NO_ENTRY || this.#pending.has(textOf(ids, at))
  }

  /** True when the blob is new; the caller must then `add` it. */
  reserve(ids: Uint8Array, at: number): boolean {
    if (this.has(ids, at)) return false
    this.#pending.add(textOf(ids, at))
    return true
  }

  /** Adds a reserved blob. `form` is kept until its pack is durable. */
  add(id: Uint8Array, form: Uint8Array, record: BlobRecord): void {
    const lane = record.type === BLOB_CHUNK ? this.#chunks : this.#nodes
    lane.add(id, form, record)
    if (lane.bytes < PACK_BYTES) return
    if (lane === this.#chunks) this.#chunks = new Lane(this.#free)
    else this.#nodes = new Lane(this.#free)
    this.#send(this.#putPack(lane))
  }

  /** Resolves when another pack may be filled. */
  room(): Pending {
    if (this.#failure === undefined && this.#inFlight.size < PACKS_IN_FLIGHT) return undefined
    return this.#wait(PACKS_IN_FLIGHT - 1)
  }

  /** All blobs so far are durable and indexed when it resolves; more may follow. */
  async finish(): Promise<void> {
    const [chunks, nodes] = [this.#chunks, this.#nodes]
    this.#chunks = new Lane(this.#free)
    this.#nodes = new Lane(this.#free)
    const isOne = chunks.bytes + nodes.bytes <= PACK_BYTES
    if (isOne) chunks.absorb(nodes)
    for (const lane of isOne ? [chunks] : [chunks, nodes]) if (lane.count > 0) this.#send(this.#putPack(lane))
    await this.#wait(0)
    if (this.#unindexed.length > 0) this.#send(this.#putIndex())
    await this.#wait(0)
  }

  /** Waits for what is on its way, whatever becomes of it. */
  async settle(): Promise<void> {
    await Promise.allSettled(this.#inFlight)
  }

  /** All is written: the memory is for the next writer. */
  spare(): void {
    for (const slab of this.#free.splice(0)) spareSlabs.keep(slab)
  }

  async #wait(most: number): Promise<void> {
    while (this.#failure === undefined && this.#inFlight.size > most) await Promise.race(this.#inFlight)
    if (this.#failure !== undefined) throw this.#failure
  }

  #send(work: Promise<void>): void {
    const settled = work
      .catch((error: unknown) => void (this.#failure ??= error))
      .finally(() => this.#inFlight.delete(settled))
    this.#inFlight.add(settled)
  }

  async #putPack(lane: Lane): Promise<void> {
    const directory: PackDirectory = { pack: newPackName(this.#owner), count: lane.count, records: lane.records }
    const parts = [packHeader(), ...lane.parts, directory.records, packFooter(this.#vault, directory, lane.bytes)]
    try {
      await this.#store.put(packKey(directory.pack), parts)
    } finally {
      lane.release()
    }
    this.#index.addPack(directory)
    for (let at = 0; at < directory.records.length; at += RECORD_BYTES) {
      this.#pending.delete(textOf(recordId(directory.records, at), 0))
    }
    this.#storedBytes += PACK_HEADER_BYTES + lane.bytes + directory.records.length + PACK_FOOTER_BYTES
    this.#unindexed.push(directory)
    this.#unindexedBytes += lane.bytes
    if (this.#unindexedBytes >= INDEX_EVERY_BYTES) await this.#putIndex()
    this.#index = await this.#inventory.relieve(this.#index)
  }

  async #putIndex(): Promise<void> {
    const object = encodeIndex(this.#vault, this.#unindexed)
    this.#unindexed = []
    this.#unindexedBytes = 0
    await this.#store.put(INDEXES + newPackName(), [object])
    this.#storedBytes += totalLength([object])
  }
}

/** A node as a record, from its plain length and its stored form: nodes are raw, and locked or not. */
export function nodeRecord(plain: number, form: Uint8Array): BlobRecord {
  const codec = form.length === plain ? CODEC_RAW : CODEC_RAW + CODEC_LOCKED
  return { stored: form.length, plain, crc: zlib.crc32(form), type: BLOB_NODE, codec }
}

function textOf(ids: Uint8Array, at: number): string {
  return Buffer.from(ids.buffer, ids.byteOffset + at, ID_BYTES).toString('latin1')
}
