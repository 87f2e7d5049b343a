// How often each host cluster of a qcow2 image is referred to, and as what: one window of clusters at a time, so that memory
// stays bounded whatever the image's size. What refers to them is references.ts; what to make of it is check.ts.
//
//   a cluster's byte | 7 refcount in the file is one | 6 clash | 5 4 first kind | 3 ... 0 count |
//
// A count of 15 means: look into the page's wide counts, which exist only where clusters are used so often. Pages of
// clusters that nothing refers to do not exist either.

import { divideUp } from '../../base/round.ts'

/** What an area of the file is. 'unique' structures have one reference; the others can be shared, by snapshots for instance. */
export const AREA_KINDS = ['unique', 'L2 table', 'data', 'compressed'] as const
export type AreaKind = (typeof AREA_KINDS)[number]

const KIND_NUMBER: Readonly<Record<AreaKind, number>> = { unique: 0, 'L2 table': 1, data: 2, compressed: 3 }

const PAGE_BITS = 16
const PAGE = 2 ** PAGE_BITS
const IN_PAGE = PAGE - 1
const COUNT_MASK = 15
const WIDE = 15
const KIND_SHIFT = 4
const KIND_MASK = 3
const CLASH = 64
const STORED_ONE = 128
const WIDE_MAX = 0xffff_ffff

export class Tally {
  /** The clusters `start` to `end` - 1 are counted; others are ignored. */
  readonly start: number
  readonly end: number
  /** The last cluster with a reference; -1 for none. */
  lastUsed = -1
  readonly #clusterSize: number
  readonly #pages: (Uint8Array | undefined)[]
  readonly #wide: (Uint32Array | undefined)[]

  constructor(start: number, end: number, clusterSize: number) {
    this.start = start
    this.end = end
    this.#clusterSize = clusterSize
    this.#pages = Array.from({ length: divideUp(end - start, PAGE) }, () => undefined)
    this.#wide = this.#pages.map(() => undefined)
  }

  /** Adds `times` references to each cluster that the area touches. Offset and length in bytes. */
  add(offset: number, length: number, kind: AreaKind, times: number): void {
    const first = Math.max(this.start, Math.floor(offset / this.#clusterSize))
    const end = Math.min(this.end, divideUp(offset + length, this.#clusterSize))
    if (first >= end) return
    for (let cluster = first; cluster < end; cluster++) this.#addOne(cluster - this.start, KIND_NUMBER[kind], times)
    if (end > this.lastUsed) this.lastUsed = end - 1
  }

  /** Remembers that the file's refcount of the cluster is one: entries that lead to it should be flagged as copied. */
  markStoredOne(cluster: number): void {
    const index = cluster - this.start
    const page = this.#page(index)
    page[index & IN_PAGE] = (page[index & IN_PAGE] as number) | STORED_ONE
  }

  has(cluster: number): boolean {
    return cluster >= this.start && cluster < this.end
  }

  /** How often the cluster, which is in the window, was added. */
  count(cluster: number): number {
    const index = cluster - this.start
    const count = this.#byte(index) & COUNT_MASK
    return count < WIDE ? count : ((this.#wide[index >>> PAGE_BITS] as Uint32Array)[index & IN_PAGE] as number)
  }

  /** True when it was added as two different things, or twice as something that has one reference. */
  isClash(cluster: number): boolean {
    return (this.#byte(cluster - this.start) & CLASH) !== 0
  }

  isStoredOne(cluster: number): boolean {
    return (this.#byte(cluster - this.start) & STORED_ONE) !== 0
  }

  /** True when nothing was added to the clusters `first` to `end` - 1, by a quick look: false does not mean the contrary. */
  isSurelyEmpty(first: number, end: number): boolean {
    const last = (Math.min(end, this.end) - 1 - this.start) >>> PAGE_BITS
    for (let page = (first - this.start) >>> PAGE_BITS; page <= last; page++)
      if (this.#pages[page] !== undefined) return false
    return true
  }

  #byte(index: number): number {
    return this.#pages[index >>> PAGE_BITS]?.[index & IN_PAGE] ?? 0
  }

  #page(index: number): Uint8Array {
    const number = index >>> PAGE_BITS
    let page = this.#pages[number]
    if (page === undefined) {
      page = new Uint8Array(PAGE)
      this.#pages[number] = page
    }
    return page
  }

  #addOne(index: number, kind: number, times: number): void {
    const page = this.#page(index)
    const at = index & IN_PAGE
    const before = page[at] as number
    const count = before & COUNT_MASK
    const isFirst = count === 0
    const first = isFirst ? kind : (before >>> KIND_SHIFT) & KIND_MASK
    const isClash = !isFirst && (first !== kind || kind === 0)
    const flags = (before & (STORED_ONE | CLASH)) | (first << KIND_SHIFT) | (isClash ? CLASH : 0)
    if (count !== WIDE && count + times < WIDE) {
      page[at] = flags | (count + times)
      return
    }
    const number = index >>> PAGE_BITS
    let wide = this.#wide[number]
    if (wide === undefined) {
      wide = new Uint32Array(PAGE)
      this.#wide[number] = wide
    }
    wide[at] = Math.min(WIDE_MAX, (count === WIDE ? (wide[at] as number) : count) + times)
    page[at] = flags | WIDE
  }
}
