// Which host clusters are in use: the refcounts of a qcow2 image, and the allocator over them. While an image is written
// its dirty bit is set, so refcounts are kept here, in pages, and reach the file when a page makes room for another and at
// the end (`writeBack`); a flush does not write them. Whoever opens a dirty image rebuilds them (check.ts).
//
//   cluster -> refcount table (in memory whole) -> refcount block, one cluster -> pages, loaded when needed
//
// Every cluster that `allocate` gives reads as zeros, also after a crash. Most come from beyond the end of the file. A
// freed one takes the long way, so that nothing durable refers to it when it is used again:
//
//   free -> freed -> (flush: its freeing is durable) -> punched -> (flush: its zeros are durable) -> ready

import { assert } from '../../base/assert.ts'
import { getUint16, getUint64, setUint16, setUint32, setUint64 } from '../../base/bytes.ts'
import {
  QCOW2_FREED_MAX,
  QCOW2_REFCOUNT_PAGE,
  QCOW2_REFCOUNT_PAGES,
  QCOW2_REFCOUNT_TABLE_MAX,
} from '../../base/limits.ts'
import { Mutex } from '../../base/mutex.ts'
import { divideUp } from '../../base/round.ts'
import { andThen, type Pending } from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Header } from './header.ts'
import * as spec from './spec.ts'

interface Page {
  readonly bytes: Uint8Array
  isDirty: boolean
}

/** Neighbouring clusters. */
export interface Run {
  start: number
  count: number
}

/** Clusters that a host block device gives to the allocator at a time, zeroed and synced. */
const REFILL = 64

export class Refcounts {
  readonly #file: HostFile
  readonly #header: Header
  /** Clusters of a host block device, which has no end to grow; undefined for a file. */
  readonly #deviceClusters: number | undefined
  readonly #clusterSize: number
  readonly #bits: number
  readonly #perPage: number
  readonly #perBlock: number
  readonly #pages = new Map<number, Page>()
  readonly #mutex = new Mutex()
  #table: Float64Array = new Float64Array(0)
  #freed: Run[] = []
  #punched: Run[] = []
  #ready: Run[] = []
  #scanNext = 0
  #scanEnd = 0

  /** The first cluster after all that are or were in use. */
  end = 0
  /** How many clusters the last `allocate` gave. */
  granted = 0
  /** True after a failure that may have left the file's refcounts wrong: the dirty bit then stays. */
  isDamaged = false

  constructor(file: HostFile, header: Header, deviceSize: number | undefined) {
    this.#file = file
    this.#header = header
    this.#clusterSize = header.clusterSize
    this.#deviceClusters = deviceSize === undefined ? undefined : Math.floor(deviceSize / header.clusterSize)
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
    this.#freed = []
    this.#punched = []
    this.#ready = []
    this.#scanNext = 0
    this.end = this.#deviceClusters === undefined ? divideUp(fileSize, this.#clusterSize) : await this.#lastUsed()
    this.#scanEnd = this.end
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

  /**
   * Takes up to `most` neighbouring clusters that read as zeros; gives the first, and their number in `granted`. -1 when
   * `prepare` must come first.
   */
  allocate(most: number): number {
    const run = this.#ready.at(-1)
    if (run !== undefined) return this.#allocateReady(run, most)
    if (this.#deviceClusters !== undefined) return -1
    const page = this.#pages.get(Math.floor(this.end / this.#perPage))
    if (page === undefined) return -1
    // A count after the end of the file is a leak of somebody else's; such a cluster is passed over.
    const first = this.end
    const room = Math.min(most, this.#perPage - (first % this.#perPage))
    let count = 0
    while (count < room && getCount(page.bytes, (first + count) % this.#perPage, this.#bits) === 0) count++
    this.end = first + Math.max(1, count)
    if (count === 0) return this.allocate(most)
    this.#take(first, count)
    return first
  }

  /** Makes the next `allocate` succeed, as far as memory and tables go. Kind 'no-space' when the image is full. */
  prepare(): Promise<void> {
    return this.#mutex.run(async () => {
      if (this.#ready.length === 0 && this.#deviceClusters !== undefined) await this.#refill(this.#deviceClusters)
      const next = this.#ready.at(-1)?.start ?? this.end
      if (this.#blockOf(next) === 0) await this.#cover(next)
      await this.load(next)
    })
  }

  /** Takes `count` clusters in one piece, after the end; gives the first. They read as zeros, and the file covers them. */
  allocateRun(count: number): Promise<number> {
    return this.#mutex.run(async () => {
      let first: number
      do {
        first = this.end
        await this.#cover(first + count - 1)
      } while (this.end !== first)
      this.#needRoom(count)
      this.end = first + count
      await this.#zeroOnDevice(first, count)
      await this.extendTo(first + count)
      await this.#setAll(first, count, 1)
      return first
    })
  }

  /** Drops one reference to each of the clusters, which are at hand. They are used again after two flushes. */
  free(first: number, count: number): void {
    for (let cluster = first; cluster < first + count; cluster++) {
      const before = this.get(cluster)
      // A count that is zero already was wrong in the image; the cluster may have other users, so it is left alone.
      if (before === 0) continue
      this.set(cluster, before - 1)
      if (before === 1) this.#addFreed(cluster)
    }
  }

  /** Loads the counts of the clusters, then frees them. */
  async freeLater(first: number, count: number): Promise<void> {
    for (let cluster = first; cluster < first + count; cluster++) {
      await this.load(cluster)
      this.free(cluster, 1)
    }
  }

  /** Before the sync of a flush: the clusters whose freeing that sync makes durable. To be passed to `settle`. */
  async collect(): Promise<Run[]> {
    await this.#scan()
    const freed = this.#freed
    this.#freed = []
    return freed
  }

  /**
   * After the sync: deallocates what was collected before it, and gives out what an earlier flush deallocated. While
   * requests are in flight that may still use them (`isQuiet` false), they stay freed.
   */
  async settle(collected: Run[], punchedBefore: Run[], isQuiet: boolean): Promise<void> {
    for (const run of punchedBefore) this.#ready.push(run)
    this.#ready.sort((a, b) => b.start - a.start)
    if (!isQuiet) {
      this.#freed.push(...collected)
      return
    }
    for (const [index, run] of collected.entries()) {
      try {
        await this.#file.punch(run.start * this.#clusterSize, run.count * this.#clusterSize)
      } catch {
        // What was to be flushed is durable. The next flush tries again to deallocate the rest.
        this.#freed.push(...collected.slice(index))
        return
      }
      this.#punched.push(run)
    }
  }

  /** Before the sync: the clusters whose zeros that sync makes durable. */
  takePunched(): Run[] {
    const punched = this.#punched
    this.#punched = []
    return punched
  }

  /** Writes every changed page to the file; a sync must follow. */
  async writeBack(): Promise<void> {
    for (const [number, page] of this.#pages) await this.#writePage(number, page)
  }

  /** Forgets the pages, which `writeBack` wrote. */
  forget(): void {
    this.#pages.clear()
  }

  /** Gives block `index` a place at the end, without counting it: for a repair, which counts everything after. */
  async addBlock(index: number): Promise<number> {
    this.#needRoom(1)
    const place = this.end++
    await this.#zeroOnDevice(place, 1)
    await this.extendTo(place + 1)
    const entry = new Uint8Array(spec.ENTRY_SIZE)
    setUint64(entry, 0, place * this.#clusterSize)
    await this.#file.write(this.#header.refcountTableOffset + index * spec.ENTRY_SIZE, entry.length, entry, 0)
    this.#table[index] = place * this.#clusterSize
    return place
  }

  /**
   * Replaces the refcount table by one that reaches past the end, with blocks for the area that holds it. Gives the
   * clusters that hold new table and blocks. The dirty bit is set: a crash in between costs a rebuild, no more.
   */
  async growTable(): Promise<Run> {
    const start = this.end
    const firstIndex = this.#table.length
    let blocks = 1
    let clusters = 0
    let lastIndex = 0
    for (let isEnough = false; !isEnough; ) {
      const entries = Math.max(lastIndex + 1, this.#table.length * 2)
      clusters = divideUp(entries * spec.ENTRY_SIZE, this.#clusterSize)
      lastIndex = Math.floor((start + clusters + blocks - 1) / this.#perBlock)
      isEnough = lastIndex - firstIndex + 1 <= blocks && lastIndex < (clusters * this.#clusterSize) / spec.ENTRY_SIZE
      blocks = Math.max(blocks, lastIndex - firstIndex + 1)
    }
    if (clusters * this.#clusterSize > Math.max(QCOW2_REFCOUNT_TABLE_MAX, this.#clusterSize)) throw this.#full()
    this.#needRoom(clusters + blocks)
    this.end = start + clusters + blocks
    await this.#zeroOnDevice(start, clusters + blocks)
    await this.extendTo(start + clusters + blocks)
    const table = new Float64Array((clusters * this.#clusterSize) / spec.ENTRY_SIZE)
    table.set(this.#table)
    for (let i = 0; i < blocks; i++) table[firstIndex + i] = (start + clusters + i) * this.#clusterSize
    await this.#switchTable(table, start * this.#clusterSize, clusters)
    return { start, count: clusters + blocks }
  }

  async #switchTable(table: Float64Array, place: number, clusters: number): Promise<void> {
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

  /** Sees to it that every cluster from the end to `last`, and what this itself takes, has a refcount block. */
  async #cover(last: number): Promise<void> {
    for (let cluster = this.end; cluster <= last; ) {
      const index = Math.floor(cluster / this.#perBlock)
      if (index >= this.#table.length) {
        const old: Run = {
          start: this.#header.refcountTableOffset / this.#clusterSize,
          count: this.#header.refcountTableClusters,
        }
        const taken = await this.growTable()
        await this.#setAll(taken.start, taken.count, 1)
        await this.freeLater(old.start, old.count)
      } else if (this.#table[index] === 0) {
        // The block of the end itself comes first: it counts the clusters that the others take.
        const endIndex = Math.floor(this.end / this.#perBlock)
        const place = await this.addBlock((this.#table[endIndex] ?? 0) === 0 ? endIndex : index)
        await this.#setAll(place, 1, 1)
      } else {
        cluster = (index + 1) * this.#perBlock
        continue
      }
      cluster = this.end
    }
  }

  async #setAll(first: number, count: number, value: number): Promise<void> {
    try {
      for (let cluster = first; cluster < first + count; cluster++) {
        await this.load(cluster)
        this.set(cluster, value)
      }
    } catch (error) {
      this.isDamaged = true
      throw error
    }
  }

  #allocateReady(run: Run, most: number): number {
    const page = this.#pages.get(Math.floor(run.start / this.#perPage))
    if (page === undefined) return -1
    const first = run.start
    const count = Math.min(most, run.count, this.#perPage - (first % this.#perPage))
    run.start += count
    run.count -= count
    if (run.count === 0) this.#ready.pop()
    this.#take(first, count)
    return first
  }

  #take(first: number, count: number): void {
    for (let cluster = first; cluster < first + count; cluster++) this.set(cluster, 1)
    this.granted = count
  }

  #addFreed(cluster: number): void {
    // What the scan has yet to pass, it finds.
    if (cluster >= this.#scanNext && cluster < this.#scanEnd) return
    const last = this.#freed.at(-1)
    if (last !== undefined && last.start + last.count === cluster) last.count++
    else if (this.#freed.length < QCOW2_FREED_MAX) this.#freed.push({ start: cluster, count: 1 })
  }

  /** Looks through one page of the image as it was opened for clusters that are free, so that they are used again. */
  async #scan(): Promise<void> {
    if (this.#scanNext >= this.#scanEnd) return
    const first = this.#scanNext
    const end = Math.min(this.#scanEnd, first + this.#perPage)
    if (this.#blockOf(first) !== 0) await this.load(first)
    this.#scanNext = end
    if (this.#blockOf(first) === 0) return
    for (let cluster = first; cluster < end; cluster++) if (this.get(cluster) === 0) this.#addFreed(cluster)
  }

  /** On a host block device nothing is known to be zero: takes a few clusters after the end and makes them so. */
  async #refill(deviceClusters: number): Promise<void> {
    await this.#cover(this.end)
    const start = this.end
    const count = Math.min(REFILL, deviceClusters - start, this.#perBlock - (start % this.#perBlock))
    if (count <= 0) throw this.#full()
    await this.#zeroOnDevice(start, count)
    await this.#file.sync()
    this.end = start + count
    this.#ready.push({ start, count })
  }

  /** The end of what is in use on a host block device. */
  async #lastUsed(): Promise<number> {
    for (let page = (this.#table.length * this.#perBlock) / this.#perPage - 1; page >= 0; page--) {
      const first = page * this.#perPage
      if (this.#blockOf(first) === 0) continue
      await this.load(first)
      for (let cluster = first + this.#perPage - 1; cluster >= first; cluster--) {
        if (this.get(cluster) !== 0) return cluster + 1
      }
    }
    return 1
  }

  async #zeroOnDevice(first: number, count: number): Promise<void> {
    if (this.#deviceClusters === undefined) return
    await this.#file.zero(first * this.#clusterSize, count * this.#clusterSize)
  }

  /**
   * Makes the file reach to `end`, the end of new clusters of the caller that nothing was written to yet, so that no table
   * refers past it. By a zero byte: setting the length could cut off what others write meanwhile.
   */
  async extendTo(end: number): Promise<void> {
    const size = end * this.#clusterSize
    if (this.#deviceClusters === undefined && this.#file.size() < size)
      await this.#file.write(size - 1, 1, new Uint8Array(1), 0)
  }

  #needRoom(count: number): void {
    if (this.#deviceClusters !== undefined && this.end + count > this.#deviceClusters) throw this.#full()
  }

  #full(): BlockError {
    const { path } = this.#file
    return new BlockError('no-space', `${path} is full: no cluster is left that the image can hold`, { path })
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
function getCount(bytes: Uint8Array, index: number, bits: number): number {
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
