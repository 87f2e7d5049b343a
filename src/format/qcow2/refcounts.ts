// The refcounts of a qcow2 image: how many references each host cluster has. Changed ones are kept here, in pages, and reach
// the file when a page makes room for another and by `writeBack`. When they must is the allocator's affair, as is which
// cluster to use next: while an image of version 3 is written its dirty bit is set, and whoever opens a dirty image counts
// anew (recover.ts).
//
//   cluster -> refcount table (in memory whole) -> refcount block, one cluster -> pages, loaded when needed
//
// Pages share the budget of all metadata in memory (metadata-cache.ts). One is at hand from its loading until others need
// its room, which is whenever this thread does something else: after an `await`, look again. `withPage` does.

import { assert } from '../../base/assert.ts'
import { getUint16, getUint64, setUint16, setUint32, setUint64 } from '../../base/bytes.ts'
import { QCOW2_REFCOUNT_PAGE } from '../../base/limits.ts'
import { roundDown, roundUp } from '../../base/round.ts'
import type { Pending } from '../../block/device.ts'
import { BlockError, isBlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Header } from './header.ts'
import { metadataCache, type Piece, type PieceOwner } from './metadata-cache.ts'
import type { Run } from './runs.ts'
import * as spec from './spec.ts'

export class Refcounts implements PieceOwner {
  readonly #file: HostFile
  readonly #header: Header
  readonly #clusterSize: number
  readonly #bits: number
  readonly #perPage: number
  readonly #perBlock: number
  readonly #pages = new Map<number, Piece>()
  readonly #loading = new Map<number, Promise<void>>()
  /** Writes of pages that have not completed. */
  readonly #writing = new Map<number, Promise<void>>()
  #last: Piece | undefined
  #held: Piece | undefined
  /** A page that had to make room and could not be written. */
  #stuck: Piece | undefined
  #table: Float64Array = new Float64Array(0)

  constructor(file: HostFile, header: Header) {
    this.#file = file
    this.#header = header
    this.#clusterSize = header.clusterSize
    this.#bits = 2 ** header.refcountOrder
    const pageBytes = Math.min(header.clusterSize, QCOW2_REFCOUNT_PAGE)
    this.#perPage = (pageBytes * 8) / this.#bits
    this.#perBlock = (header.clusterSize * 8) / this.#bits
  }

  /** Reads the refcount table; kind 'corrupt' when an entry cannot be right. */
  async open(): Promise<void> {
    const wrong = (await this.openLeniently())[0]
    if (wrong === undefined) return
    const { path } = this.#file
    const message = `${path} is corrupt: entry ${wrong} of its refcount table cannot be; see qemu-img check`
    throw new BlockError('corrupt', message, { path, offset: this.#header.refcountTableOffset })
  }

  /** Reads the refcount table, and gives the indexes of entries that cannot be right, which count as empty. */
  async openLeniently(): Promise<number[]> {
    const bytes = new Uint8Array(this.#header.refcountTableClusters * this.#clusterSize)
    await this.#file.read(this.#header.refcountTableOffset, bytes.length, bytes, 0)
    const fileSize = this.#file.size()
    const seen = new Set<number>([0])
    const wrong: number[] = []
    this.#table = new Float64Array(bytes.length / spec.ENTRY_SIZE)
    for (let index = 0; index < this.#table.length; index++) {
      const place = getUint64(bytes, index * spec.ENTRY_SIZE)
      if (place === 0) continue
      if (place % this.#clusterSize !== 0 || place < 0 || place >= fileSize || seen.has(place)) wrong.push(index)
      else this.#table[index] = place
      seen.add(place)
    }
    this.forget()
    return wrong
  }

  /** Empties entries of the table in the file, durably: for a repair. */
  async clearEntries(indexes: readonly number[]): Promise<void> {
    const empty = new Uint8Array(spec.ENTRY_SIZE)
    for (const index of indexes)
      await this.#file.write(this.#header.refcountTableOffset + index * spec.ENTRY_SIZE, empty.length, empty, 0)
    if (indexes.length > 0) await this.#file.sync()
  }

  /** Offsets of the refcount blocks in the file, 0 where there is none. */
  get table(): Float64Array {
    return this.#table
  }

  /** How many clusters one refcount block covers, and how many one page of it. */
  get perBlock(): number {
    return this.#perBlock
  }

  get perPage(): number {
    return this.#perPage
  }

  /** The largest count that an entry holds; what does not fit a safe integer is out of reach anyway. */
  get largest(): number {
    return Math.min(2 ** this.#bits - 1, Number.MAX_SAFE_INTEGER)
  }

  /** True when `get` can answer for the cluster now. */
  atHand(cluster: number): boolean {
    return this.#page(cluster) !== undefined || this.#blockOf(cluster) === 0
  }

  /** Brings the page that holds the cluster's count into memory. */
  load(cluster: number): Pending {
    if (this.atHand(cluster)) return undefined
    const number = Math.floor(cluster / this.#perPage)
    const already = this.#loading.get(number)
    if (already !== undefined) return already
    // Pages that cannot be written must not pile up in memory: while one is stuck, no other comes.
    const wait = this.#stuck === undefined ? undefined : this.#writePage(this.#stuck)
    if (wait !== undefined) return wait
    const bytes = new Uint8Array((this.#perPage * this.#bits) / 8)
    const reading = this.#file.read(this.#pagePlace(number), bytes.length, bytes, 0)
    if (reading === undefined) {
      this.#pages.set(number, metadataCache.add(this, number, bytes))
      return undefined
    }
    const done = reading
      .then(() => void this.#pages.set(number, metadataCache.add(this, number, bytes)))
      .finally(() => this.#loading.delete(number))
    this.#loading.set(number, done)
    return done
  }

  /** Runs `use` as soon as the cluster is at hand. */
  async withPage(cluster: number, use: () => void): Promise<void> {
    for (let wait = this.load(cluster); wait !== undefined; wait = this.load(cluster)) await wait
    use()
  }

  /** The clusters, cut where one page ends and the next begins. */
  *pagesOf(first: number, count: number): Generator<Run> {
    const end = first + count
    for (let start = first; start < end; ) {
      const stop = Math.min(end, roundDown(start, this.#perPage) + this.#perPage)
      yield { start, count: stop - start }
      start = stop
    }
  }

  /** Keeps the page of a cluster that is at hand in memory until another is held: for who comes back to it. */
  hold(cluster: number): void {
    const page = this.#page(cluster)
    if (page !== undefined) page.pins++
    if (this.#held !== undefined) this.#held.pins--
    this.#held = page
  }

  /** The count of a cluster that is at hand. */
  get(cluster: number): number {
    const page = this.#page(cluster)
    if (page === undefined) {
      assert(this.#blockOf(cluster) === 0, 'the page is loaded')
      return 0
    }
    return getCount(page.bytes, cluster % this.#perPage, this.#bits)
  }

  /** Sets the count of a cluster that is at hand and has a refcount block. */
  set(cluster: number, count: number): void {
    const page = this.#page(cluster)
    assert(page !== undefined, 'the page is loaded')
    setCount(page.bytes, cluster % this.#perPage, this.#bits, count)
    page.isDirty = true
  }

  /** True when the cluster has a refcount block, so that its count can be set. */
  hasBlock(cluster: number): boolean {
    return this.#blockOf(cluster) !== 0
  }

  /** Gives block `index` of the table, which has none, the zeroed cluster at `place`, in memory alone. */
  showBlock(index: number, place: number): void {
    this.#table[index] = place
  }

  /** Replaces the table in memory by a longer one that begins with the same blocks; the new ones are zeroed. */
  showTable(table: Float64Array): void {
    this.#table = table
  }

  /** Takes back blocks of the table in memory, with what was counted there. */
  hideBlocks(first: number, count: number): void {
    this.#table.fill(0, first, first + count)
    const perBlock = this.#perBlock / this.#perPage
    for (let number = first * perBlock; number < (first + count) * perBlock; number++) {
      const page = this.#pages.get(number)
      if (page === undefined) continue
      metadataCache.remove(page)
      this.dropped(number)
      if (this.#held === page) this.#held = undefined
      if (this.#stuck === page) this.#stuck = undefined
    }
  }

  /** Writes entry `index` of the table to the file. */
  async writeEntry(index: number): Promise<void> {
    const entry = new Uint8Array(spec.ENTRY_SIZE)
    setUint64(entry, 0, this.#table[index] as number)
    await this.#file.write(this.#header.refcountTableOffset + index * spec.ENTRY_SIZE, entry.length, entry, 0)
  }

  /** Writes the table to the clusters at `place`. */
  async writeTable(place: number): Promise<void> {
    const bytes = new Uint8Array(roundUp(this.#table.length * spec.ENTRY_SIZE, this.#clusterSize))
    this.#table.forEach((block, index) => setUint64(bytes, index * spec.ENTRY_SIZE, block))
    await this.#file.write(place, bytes.length, bytes, 0)
  }

  /** Has the header lead to the table at `place`, durably. */
  async leadToTable(place: number, clusters: number): Promise<void> {
    const fields = new Uint8Array(12)
    setUint64(fields, 0, place)
    setUint32(fields, 8, clusters)
    await this.#file.write(spec.HEADER.refcount_table_offset, fields.length, fields, 0)
    await this.#file.sync()
    this.#header.refcountTableOffset = place
    this.#header.refcountTableClusters = clusters
  }

  /** Writes every changed page to the file; a sync must follow. */
  async writeBack(): Promise<void> {
    for (const page of this.#pages.values()) {
      const wait = this.#writePage(page)
      if (wait !== undefined) await wait
    }
  }

  /** Forgets every page, changed or not. */
  forget(): void {
    for (const page of this.#pages.values()) metadataCache.remove(page)
    this.#pages.clear()
    this.#last = undefined
    this.#held = undefined
    this.#stuck = undefined
  }

  dropped(number: number): void {
    this.#pages.delete(number)
    if (this.#last?.number === number) this.#last = undefined
  }

  clean(page: Piece): boolean {
    const failed = (error: unknown): boolean => {
      // What belongs to a closed file has nowhere to go any more.
      if (isBlockError(error, 'closed')) return true
      this.#stuck = page
      return false
    }
    try {
      const wait = this.#writePage(page)
      if (wait === undefined) return true
      wait.catch(failed)
      return false
    } catch (error) {
      return failed(error)
    }
  }

  /** Writes a page that changed. One write of a page at a time: those in flight together have no order. */
  #writePage(page: Piece): Pending {
    const before = this.#writing.get(page.number)
    if (before !== undefined) return before.catch(() => undefined).then(() => this.#writePage(page))
    if (!page.isDirty) return undefined
    page.isDirty = false
    const failed = (error: unknown): never => {
      page.isDirty = true
      throw error
    }
    let wait: Pending
    try {
      wait = this.#file.write(this.#pagePlace(page.number), page.bytes.length, page.bytes, 0)
    } catch (error) {
      return failed(error)
    }
    if (wait === undefined) return this.#written(page)
    page.pins++
    const done = wait
      .then(() => this.#written(page), failed)
      .finally(() => {
        page.pins--
        this.#writing.delete(page.number)
      })
    this.#writing.set(page.number, done)
    return done
  }

  #written(page: Piece): undefined {
    if (this.#stuck === page) this.#stuck = undefined
  }

  #page(cluster: number): Piece | undefined {
    const number = Math.floor(cluster / this.#perPage)
    if (this.#last?.number === number) return this.#last
    const page = this.#pages.get(number)
    if (page === undefined) return undefined
    metadataCache.touch(page)
    this.#last = page
    return page
  }

  #blockOf(cluster: number): number {
    return this.#table[Math.floor(cluster / this.#perBlock)] ?? 0
  }

  #pagePlace(number: number): number {
    const first = number * this.#perPage
    return this.#blockOf(first) + ((first % this.#perBlock) * this.#bits) / 8
  }
}

/** Entry `index` of a block with counts of `bits` bits; counts of less than a byte begin at its low end. */
export function getCount(bytes: Uint8Array, index: number, bits: number): number {
  if (bits === 16) return getUint16(bytes, index * 2)
  if (bits < 8) return ((bytes[(index * bits) >>> 3] as number) >>> ((index * bits) & 7)) & (2 ** bits - 1)
  let count = 0
  for (let i = 0; i < bits / 8; i++) count = count * 256 + (bytes[(index * bits) / 8 + i] as number)
  return count
}

export function setCount(bytes: Uint8Array, index: number, bits: number, count: number): void {
  if (bits === 16) return setUint16(bytes, index * 2, count)
  if (bits < 8) {
    const at = (index * bits) >>> 3
    const shift = (index * bits) & 7
    bytes[at] = ((bytes[at] as number) & ~((2 ** bits - 1) << shift)) | (count << shift)
    return
  }
  let rest = count
  for (let i = bits / 8 - 1; i >= 0; i--, rest = Math.floor(rest / 256)) bytes[(index * bits) / 8 + i] = rest % 256
}
