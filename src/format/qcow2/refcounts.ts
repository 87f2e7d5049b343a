// The refcounts of a qcow2 image: how many references each host cluster has. While an image is written its dirty bit is
// set, so changed refcounts are kept here, in pages, and reach the file when a page makes room for another and at the end
// (`writeBack`); a flush does not write them. Whoever opens a dirty image rebuilds them (check.ts). Which cluster to use next
// is the allocator's work.
//
//   cluster -> refcount table (in memory whole) -> refcount block, one cluster -> pages, loaded when needed

import { assert } from '../../base/assert.ts'
import { getUint16, getUint64, setUint16, setUint32, setUint64 } from '../../base/bytes.ts'
import { QCOW2_REFCOUNT_PAGE, QCOW2_REFCOUNT_PAGES } from '../../base/limits.ts'
import { andThen, type Pending } from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Header } from './header.ts'
import * as spec from './spec.ts'

interface Page {
  readonly bytes: Uint8Array
  isDirty: boolean
}

export class Refcounts {
  readonly #file: HostFile
  readonly #header: Header
  readonly #clusterSize: number
  readonly #bits: number
  readonly #perPage: number
  readonly #perBlock: number
  readonly #pages = new Map<number, Page>()
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
    this.#pages.clear()
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
    return this.#pages.has(Math.floor(cluster / this.#perPage)) || this.#blockOf(cluster) === 0
  }

  /** Brings the page that holds the cluster's count into memory. */
  load(cluster: number): Pending {
    if (this.atHand(cluster)) return undefined
    const number = Math.floor(cluster / this.#perPage)
    return andThen(this.#makeRoom(), () => {
      const page: Page = { bytes: new Uint8Array((this.#perPage * this.#bits) / 8), isDirty: false }
      return andThen(this.#file.read(this.#pagePlace(number), page.bytes.length, page.bytes, 0), () => {
        // Two loads of one page may cross; the first one's page may have been changed already.
        if (!this.#pages.has(number)) this.#pages.set(number, page)
        return undefined
      })
    })
  }

  /** The count of a cluster that is at hand. */
  get(cluster: number): number {
    const page = this.#pages.get(Math.floor(cluster / this.#perPage))
    if (page === undefined) {
      assert(this.#blockOf(cluster) === 0, 'the page is loaded')
      return 0
    }
    return getCount(page.bytes, cluster % this.#perPage, this.#bits)
  }

  /** Sets the count of a cluster that is at hand and has a refcount block. */
  set(cluster: number, count: number): void {
    const page = this.#pages.get(Math.floor(cluster / this.#perPage))
    assert(page !== undefined, 'the page is loaded')
    setCount(page.bytes, cluster % this.#perPage, this.#bits, count)
    page.isDirty = true
  }

  /** True when the cluster has a refcount block, so that its count can be set. */
  hasBlock(cluster: number): boolean {
    return this.#blockOf(cluster) !== 0
  }

  /** Gives block `index` of the table, which has none, the zeroed cluster at `place`. */
  async setBlock(index: number, place: number): Promise<void> {
    const entry = new Uint8Array(spec.ENTRY_SIZE)
    setUint64(entry, 0, place)
    await this.#file.write(this.#header.refcountTableOffset + index * spec.ENTRY_SIZE, entry.length, entry, 0)
    this.#table[index] = place
  }

  /** Writes another table to the clusters at `place`, and has the header lead to it. Durable on return. */
  async replaceTable(table: Float64Array, place: number, clusters: number): Promise<void> {
    const bytes = new Uint8Array(clusters * this.#clusterSize)
    table.forEach((block, index) => setUint64(bytes, index * spec.ENTRY_SIZE, block))
    await this.#file.write(place, bytes.length, bytes, 0)
    await this.#file.sync()
    const fields = new Uint8Array(12)
    setUint64(fields, 0, place)
    setUint32(fields, 8, clusters)
    await this.#file.write(spec.HEADER.refcount_table_offset, fields.length, fields, 0)
    await this.#file.sync()
    this.#table = table
    this.#header.refcountTableOffset = place
    this.#header.refcountTableClusters = clusters
  }

  /** Writes every changed page to the file; a sync must follow. */
  async writeBack(): Promise<void> {
    for (const [number, page] of this.#pages) await this.#writePage(number, page)
  }

  #makeRoom(): Pending {
    for (const [number, page] of this.#pages) {
      if (this.#pages.size < QCOW2_REFCOUNT_PAGES) return undefined
      const wait = this.#writePage(number, page)
      if (wait !== undefined)
        return wait.then(() => {
          if (!page.isDirty) this.#pages.delete(number)
        })
      this.#pages.delete(number)
    }
    return undefined
  }

  #writePage(number: number, page: Page): Pending {
    if (!page.isDirty) return undefined
    page.isDirty = false
    const failed = (error: unknown): never => {
      page.isDirty = true
      throw error
    }
    try {
      return this.#file.write(this.#pagePlace(number), page.bytes.length, page.bytes, 0)?.catch(failed)
    } catch (error) {
      return failed(error)
    }
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

function setCount(bytes: Uint8Array, index: number, bits: number, count: number): void {
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
