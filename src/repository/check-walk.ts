// Which parts of a backup's disks the damage of a repository takes along: walks the maps, and passes over subtrees that another
// backup has shown to be whole.

import { Breather } from '../base/breather.ts'
import { isBlockError } from '../block/error.ts'
import { type BlobIndex, NO_ENTRY } from './blob-index.ts'
import type { Core } from './core.ts'
import { type BackupInfo, rootOf } from './manifest.ts'
import { NodeReader } from './node-reader.ts'
import type { BadBlob } from './pack-reader.ts'
import { FANOUT, GRANULE_BYTES, LEAF_HEADER_BYTES, SEGMENT_BYTES } from './spec.ts'
import { childAt, spanOf } from './tree.ts'
import type { DamagedRange } from './verify.ts'

const MISSING_CHUNK = 'its chunk is in no pack: packs are missing'
const MISSING_NODE = 'the node that describes it is in no pack: packs are missing'

interface Walked {
  readonly ranges: { disk: string; offset: number; length: number; reason: string }[]
  damagedBytes: number
}

export class CheckWalk {
  readonly #index: BlobIndex
  readonly #nodes: NodeReader
  /** Entries whose copy in use is damaged. */
  readonly #bad = new Map<number, string>()
  /** Nodes below which all is well. */
  readonly #whole: Uint8Array
  readonly #breather = new Breather()

  constructor({ store, vault }: Pick<Core, 'store' | 'vault'>, index: BlobIndex, bad: readonly BadBlob[]) {
    this.#index = index
    this.#nodes = new NodeReader(store, vault, index)
    this.#whole = new Uint8Array(Math.ceil(index.count / 8))
    for (const { id, pack, reason } of bad) {
      const entry = index.find(id, 0)
      if (entry !== NO_ENTRY && index.pack(entry) === pack) this.#bad.set(entry, reason)
    }
  }

  /** What of a backup is damaged; at most `most` ranges, but all the bytes. */
  async backup(
    info: BackupInfo,
    most: number,
  ): Promise<{ readonly ranges: readonly DamagedRange[]; readonly damagedBytes: number }> {
    const walked: Walked = { ranges: [], damagedBytes: 0 }
    for (const disk of info.disks) {
      const { name, size, levels } = disk
      const damage = (offset: number, end: number, reason: string): void => {
        const length = Math.min(end, size) - offset
        if (length <= 0) return
        walked.damagedBytes += length
        const last = walked.ranges.at(-1)
        const isNext = last?.disk === name && last.reason === reason && last.offset + last.length === offset
        if (isNext) last.length += length
        else if (walked.ranges.length < most) walked.ranges.push({ disk: name, offset, length, reason })
      }
      const root = rootOf(disk)
      if (root !== undefined) await this.#node(root, 0, levels, 0, damage)
    }
    return walked
  }

  /** True when all below is whole. */
  async #node(
    ids: Uint8Array,
    at: number,
    level: number,
    start: number,
    damage: (offset: number, end: number, reason: string) => void,
  ): Promise<boolean> {
    const end = start + spanOf(level)
    const entry = this.#index.find(ids, at)
    const known = entry === NO_ENTRY ? MISSING_NODE : this.#bad.get(entry)
    if (known !== undefined) {
      damage(start, end, known)
      return false
    }
    if (((this.#whole[entry >>> 3] as number) & (1 << (entry & 7))) !== 0) return true
    let node: Uint8Array
    try {
      node = await this.#nodes.load(ids, at, level)
    } catch (error) {
      if (!isBlockError(error, 'corrupt')) throw error
      damage(start, end, error.message)
      return false
    }
    await this.#breather.pause()
    let isWhole = true
    if (level === 0) isWhole = this.#leaf(node, start, damage)
    for (let child = 0; level > 0 && child < FANOUT; child++) {
      const childIdAt = childAt(node, child)
      if (childIdAt < 0) continue
      const below = await this.#node(node, childIdAt, level - 1, start + child * spanOf(level - 1), damage)
      isWhole &&= below
    }
    if (isWhole) this.#whole[entry >>> 3] = (this.#whole[entry >>> 3] as number) | (1 << (entry & 7))
    return isWhole
  }

  #leaf(leaf: Uint8Array, start: number, damage: (offset: number, end: number, reason: string) => void): boolean {
    let isWhole = true
    for (let at = LEAF_HEADER_BYTES; at < leaf.length; at += SEGMENT_BYTES) {
      const entry = this.#index.find(leaf, at + 3)
      const reason = entry === NO_ENTRY ? MISSING_CHUNK : this.#bad.get(entry)
      if (reason === undefined) continue
      const offset = start + (leaf[at] as number) * GRANULE_BYTES
      damage(offset, offset + (leaf[at + 1] as number) * GRANULE_BYTES, reason)
      isWhole = false
    }
    return isWhole
  }
}
