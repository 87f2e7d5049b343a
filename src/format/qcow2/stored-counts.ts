// The refcounts of a qcow2 image as they are in its file, read in order and leniently, and changed in place: for checks and repairs,
// which must go on where the writing side (refcounts.ts) rightly refuses. One page is in memory at a time.

import { assert } from '../../base/assert.ts'
import { getUint32 } from '../../base/bytes.ts'
import { QCOW2_REFCOUNT_PAGE } from '../../base/limits.ts'
import { divideUp } from '../../base/round.ts'
import { andThen, type Pending } from '../../block/device.ts'
import type { HostFile } from '../../host/host.ts'
import type { Header } from './header.ts'
import { getCount, setCount } from './refcounts.ts'
import * as spec from './spec.ts'

/** Why an entry of the refcount table cannot be right. */
export type BlockFlaw = 'has reserved bits set' | 'leads to no cluster’s start' | 'leads past the end of the file'

const TWO_32 = 0x1_0000_0000

export class StoredCounts {
  /** How many clusters one refcount block covers, and how many one page of it. */
  readonly perBlock: number
  readonly perPage: number
  /** Entries of the table that cannot be right, by index. */
  readonly flaws = new Map<number, BlockFlaw>()
  /** Where the refcount blocks of the other entries are in the file, in the order of the table. */
  blocks: readonly number[] = []
  readonly #file: HostFile
  readonly #header: Header
  readonly #bits: number
  readonly #page: Uint8Array
  /** Where the refcount blocks are said to be, reserved bits aside. */
  #offsets: Float64Array = new Float64Array(0)
  #pageFirst = -1

  constructor(file: HostFile, header: Header) {
    this.#file = file
    this.#header = header
    this.#bits = 2 ** header.refcountOrder
    this.#page = new Uint8Array(Math.min(header.clusterSize, QCOW2_REFCOUNT_PAGE))
    this.perPage = (this.#page.length * 8) / this.#bits
    this.perBlock = (header.clusterSize * 8) / this.#bits
  }

  /** Reads the refcount table. */
  async open(): Promise<void> {
    const { clusterSize, refcountTableOffset, refcountTableClusters } = this.#header
    const bytes = new Uint8Array(refcountTableClusters * clusterSize)
    await this.#file.read(refcountTableOffset, bytes.length, bytes, 0)
    const fileClusters = divideUp(this.#file.size(), clusterSize)
    this.#offsets = new Float64Array(bytes.length / spec.ENTRY_SIZE)
    const blocks: number[] = []
    for (let index = 0; index < this.#offsets.length; index++) {
      const high = getUint32(bytes, index * spec.ENTRY_SIZE)
      const low = getUint32(bytes, index * spec.ENTRY_SIZE + 4)
      if (high === 0 && low === 0) continue
      const offset = high * TWO_32 + ((low & spec.OFFSET_LOW) >>> 0)
      this.#offsets[index] = offset
      if ((low & spec.REFT_RESERVED_LOW) !== 0) this.flaws.set(index, 'has reserved bits set')
      else if (offset % clusterSize !== 0) this.flaws.set(index, 'leads to no cluster’s start')
      else if (offset / clusterSize >= fileClusters) this.flaws.set(index, 'leads past the end of the file')
      else if (offset !== 0) blocks.push(offset)
    }
    this.blocks = blocks
  }

  /** The end of the clusters that have a block, right or wrong. */
  get end(): number {
    return (this.#offsets.findLastIndex((offset) => offset !== 0) + 1) * this.perBlock
  }

  /** True when the counts of the cluster's block cannot even be looked for. */
  isUnreadable(cluster: number): boolean {
    return (this.#offsets[Math.floor(cluster / this.perBlock)] ?? 0) % this.#header.clusterSize !== 0
  }

  /** True when the entry of the cluster's block cannot be right. */
  isFlawed(cluster: number): boolean {
    return this.flaws.has(Math.floor(cluster / this.perBlock))
  }

  /** True when the table leads to a block for the cluster, right or wrong. */
  hasBlock(cluster: number): boolean {
    return (this.#offsets[Math.floor(cluster / this.perBlock)] ?? 0) !== 0
  }

  /** Brings the page with the cluster's count into memory, in place of the one before. */
  load(cluster: number): Pending {
    const first = cluster - (cluster % this.perPage)
    if (first === this.#pageFirst) return undefined
    this.#pageFirst = -1
    const place = this.#placeOf(first)
    const wait = place === 0 ? void this.#page.fill(0) : this.#read(place)
    return andThen(wait, () => {
      this.#pageFirst = first
      return undefined
    })
  }

  /** The count of a cluster in the page that was loaded last. */
  get(cluster: number): number {
    return getCount(this.#page, cluster - this.#pageFirst, this.#bits)
  }

  /** Sets the count of a cluster in the page that was loaded last, and that is in a block of the file; `write` must follow. */
  set(cluster: number, count: number): void {
    setCount(this.#page, cluster - this.#pageFirst, this.#bits, count)
  }

  /** Writes the page that was loaded last back to where it came from. */
  write(): Pending {
    const place = this.#placeOf(this.#pageFirst)
    assert(place > 0, 'the page has a block')
    return this.#file.write(place, this.#page.length, this.#page, 0)
  }

  /** The largest count that an entry holds. */
  get largest(): number {
    return Math.min(2 ** this.#bits - 1, Number.MAX_SAFE_INTEGER)
  }

  /** Where the page that begins with the cluster is in the file; 0 for nowhere. */
  #placeOf(first: number): number {
    const block = this.isUnreadable(first) ? 0 : (this.#offsets[Math.floor(first / this.perBlock)] ?? 0)
    return block === 0 ? 0 : block + ((first % this.perBlock) * this.#bits) / 8
  }

  #read(place: number): Pending {
    if (place <= this.#file.size()) return this.#file.read(place, this.#page.length, this.#page, 0)
    this.#page.fill(0)
    return undefined
  }
}
