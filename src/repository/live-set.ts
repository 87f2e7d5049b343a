// Which blobs some backups need: walks their maps and notes each node and chunk. What several of them share is walked once.

import { Breather } from '../base/breather.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { type BlobIndex, NO_ENTRY } from './blob-index.ts'
import type { Core } from './core.ts'
import { type BackupInfo, rootOf } from './manifest.ts'
import { NodeReader } from './node-reader.ts'
import { FANOUT, LEAF_HEADER_BYTES, SEGMENT_BYTES } from './spec.ts'
import { childAt } from './tree.ts'

export class LiveSet {
  readonly blobs: BlobIndex
  readonly #nodes: NodeReader
  #bits: Uint8Array
  readonly #breather = new Breather()

  constructor({ store, vault }: Pick<Core, 'store' | 'vault'>, blobs: BlobIndex) {
    this.blobs = blobs
    this.#nodes = new NodeReader(store, vault, blobs)
    this.#bits = new Uint8Array(Math.ceil(blobs.count / 8))
  }

  has(entry: number): boolean {
    return ((this.#bits[entry >>> 3] as number) & (1 << (entry & 7))) !== 0
  }

  /** Notes what the backup needs. Kind 'corrupt' when a node cannot be read or something is in no pack. */
  async add(info: BackupInfo): Promise<void> {
    for (const disk of info.disks) {
      const root = rootOf(disk)
      try {
        if (root !== undefined) await this.#node(root, 0, disk.levels)
      } catch (error) {
        if (!isBlockError(error)) throw error
        const message = `backup ${info.id}, disk ${disk.name}: ${error.message}`
        throw new BlockError(error.kind, message, { ...error.place, device: disk.name }, error)
      }
    }
  }

  /** Stored bytes of what is live, for each pack by its number. */
  async bytesByPack(): Promise<Float64Array> {
    const bytes = new Float64Array(this.blobs.packNumbers)
    await this.blobs.visit((entry, pack, stored) => {
      // What came since is not known to be needed, and its pack is none of those that are asked for.
      if (entry >>> 3 >= this.#bits.length || pack >= bytes.length || !this.has(entry)) return
      bytes[pack] = (bytes[pack] as number) + stored
    })
    return bytes
  }

  async #node(ids: Uint8Array, at: number, level: number): Promise<void> {
    // A node that is in no pack is left to the reader, which says so.
    const entry = this.blobs.find(ids, at)
    if (entry !== NO_ENTRY && !this.#note(entry)) return
    const node = await this.#nodes.load(ids, at, level)
    await this.#breather.pause()
    if (level === 0) return this.#leaf(node)
    for (let child = 0; child < FANOUT; child++) {
      const childIdAt = childAt(node, child)
      if (childIdAt >= 0) await this.#node(node, childIdAt, level - 1)
    }
  }

  #leaf(leaf: Uint8Array): void {
    for (let at = LEAF_HEADER_BYTES; at < leaf.length; at += SEGMENT_BYTES) {
      const entry = this.blobs.find(leaf, at + 3)
      if (entry === NO_ENTRY) throw new BlockError('corrupt', 'a chunk is in no pack: packs are missing')
      this.#note(entry)
    }
  }

  /** False when it was noted before. */
  #note(entry: number): boolean {
    if (this.has(entry)) return false
    // The index may have grown since.
    if (entry >>> 3 >= this.#bits.length) {
      const larger = new Uint8Array(Math.ceil((this.blobs.count + 1) / 8))
      larger.set(this.#bits)
      this.#bits = larger
    }
    this.#bits[entry >>> 3] = (this.#bits[entry >>> 3] as number) | (1 << (entry & 7))
    return true
  }
}
