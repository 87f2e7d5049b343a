// Which host cluster is used next. Every cluster that `allocate` gives reads as zeros, also after a crash. Most come from
// beyond the end of the file. A freed one takes the long way, so that nothing durable refers to it when it is used again:
//
//   free -> freed -> (flush: its freeing is durable) -> punched -> (flush: its zeros are durable) -> ready
//
// Clusters that were free when the image was opened are found by a scan, a page of refcounts at each flush.

import { QCOW2_FREED_MAX, QCOW2_REFCOUNT_TABLE_MAX } from '../../base/limits.ts'
import { Mutex } from '../../base/mutex.ts'
import { divideUp, roundDown } from '../../base/round.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Header } from './header.ts'
import type { Refcounts, Run } from './refcounts.ts'
import * as spec from './spec.ts'

/** What the sync of a flush makes durable: that clusters are free, and that others are zero. */
export interface Settlement {
  readonly freed: Run[]
  readonly punched: Run[]
}

/** Clusters that a host block device gives to the allocator at a time, zeroed and synced. */
const REFILL = 64

export class Allocator {
  readonly refcounts: Refcounts
  readonly #file: HostFile
  readonly #header: Header
  /** Clusters of a host block device, which has no end to grow; undefined for a file. */
  readonly #deviceClusters: number | undefined
  readonly #clusterSize: number
  readonly #mutex = new Mutex()
  #freed: Run[] = []
  #punched: Run[] = []
  /** Sorted, the lowest last. */
  #ready: Run[] = []
  #scanNext = 0
  #scanEnd = 0

  /** The first cluster after all that are or were in use. */
  end = 0
  /** How many clusters the last `allocate` gave. */
  granted = 0
  /** True after a failure that may have left the file's refcounts wrong: the dirty bit then stays. */
  isDamaged = false

  constructor(file: HostFile, header: Header, refcounts: Refcounts, deviceSize: number | undefined) {
    this.#file = file
    this.#header = header
    this.refcounts = refcounts
    this.#clusterSize = header.clusterSize
    this.#deviceClusters = deviceSize === undefined ? undefined : Math.floor(deviceSize / header.clusterSize)
  }

  /** Begins anew after the refcounts were opened. `usedEnd`: clusters before it are in use, whatever the counts say. */
  async open(usedEnd = 0): Promise<void> {
    this.#freed = []
    this.#punched = []
    this.#ready = []
    this.#scanNext = 0
    const isFile = this.#deviceClusters === undefined
    const end = isFile ? divideUp(this.#file.size(), this.#clusterSize) : await this.#lastUsed()
    this.end = Math.max(end, usedEnd)
    this.#scanEnd = this.end
  }

  /**
   * Takes up to `most` neighbouring clusters; gives the first, and their number in `granted`. -1 when `prepare` must come
   * first.
   */
  allocate(most: number): number {
    const run = this.#ready.at(-1)
    if (run !== undefined) return this.#allocateReady(run, most)
    const { refcounts } = this
    if (this.#deviceClusters !== undefined || !refcounts.hasBlock(this.end) || !refcounts.atHand(this.end)) return -1
    // A count after the end of the file is a leak of somebody else's; such a cluster is passed over.
    const pageEnd = roundDown(this.end, refcounts.perPage) + refcounts.perPage
    while (this.end < pageEnd && refcounts.get(this.end) !== 0) this.end++
    if (this.end === pageEnd) return -1
    const first = this.end
    const room = Math.min(most, pageEnd - first)
    let count = 1
    while (count < room && refcounts.get(first + count) === 0) count++
    this.end = first + count
    this.#take(first, count)
    return first
  }

  /** Makes the next `allocate` succeed, as far as memory and tables go. Kind 'no-space' when the image is full. */
  prepare(): Promise<void> {
    return this.#mutex.run(async () => {
      if (this.#ready.length === 0 && this.#deviceClusters !== undefined) await this.#refill(this.#deviceClusters)
      const next = this.#ready.at(-1)?.start ?? this.end
      if (!this.refcounts.hasBlock(next)) await this.#cover(next)
      await this.refcounts.withPage(next, () => this.refcounts.hold(next))
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
      const before = this.refcounts.get(cluster)
      // A count that is zero already was wrong in the image; the cluster may have other users, so it is left alone.
      if (before === 0) continue
      this.refcounts.set(cluster, before - 1)
      if (before === 1) this.#addFreed(cluster)
    }
  }

  /** Loads the counts of the clusters, then frees them. */
  async freeLater(first: number, count: number): Promise<void> {
    for (const piece of this.refcounts.pagesOf(first, count))
      await this.refcounts.withPage(piece.start, () => this.free(piece.start, piece.count))
  }

  /** Before the sync of a flush: what that sync will make durable. To be passed to `settle`. */
  async collect(): Promise<Settlement> {
    const punched = this.#punched
    this.#punched = []
    await this.#scan()
    const freed = joined(this.#freed)
    this.#freed = []
    return { freed, punched }
  }

  /**
   * After the sync: gives out what an earlier flush deallocated, and deallocates what is free now. While requests are in
   * flight that may still use it (`isQuiet` false), it stays freed.
   */
  async settle({ freed, punched }: Settlement, isQuiet: boolean): Promise<void> {
    if (punched.length > 0) this.#ready = joined([...this.#ready, ...punched]).reverse()
    for (const [index, run] of freed.entries()) {
      try {
        if (isQuiet) await this.#file.punch(run.start * this.#clusterSize, run.count * this.#clusterSize)
      } catch {
        // What was to be flushed is durable all the same; the next flush tries again to deallocate the rest.
        isQuiet = false
      }
      if (!isQuiet) {
        this.#freed = [...this.#freed, ...freed.slice(index)]
        return
      }
      this.#punched.push(run)
    }
  }

  /** Gives block `index` of the refcounts a place at the end, and does not count it. Gives the place, as a cluster. */
  async addBlock(index: number): Promise<number> {
    this.#needRoom(1)
    const place = this.end++
    await this.#zeroOnDevice(place, 1)
    await this.extendTo(place + 1)
    await this.refcounts.setBlock(index, place * this.#clusterSize)
    return place
  }

  /**
   * Replaces the refcount table by one that reaches past the end, with blocks for the area that holds it. Gives the
   * clusters that hold new table and blocks. The dirty bit is set: a crash in between costs a rebuild, no more.
   */
  async growTable(): Promise<Run> {
    const start = this.end
    const firstIndex = this.refcounts.table.length
    let blocks = 1
    let clusters = 0
    let lastIndex = 0
    for (let isEnough = false; !isEnough; ) {
      const entries = Math.max(lastIndex + 1, this.refcounts.table.length * 2)
      clusters = divideUp(entries * spec.ENTRY_SIZE, this.#clusterSize)
      lastIndex = Math.floor((start + clusters + blocks - 1) / this.refcounts.perBlock)
      isEnough = lastIndex - firstIndex + 1 <= blocks && lastIndex < (clusters * this.#clusterSize) / spec.ENTRY_SIZE
      blocks = Math.max(blocks, lastIndex - firstIndex + 1)
    }
    if (clusters * this.#clusterSize > Math.max(QCOW2_REFCOUNT_TABLE_MAX, this.#clusterSize)) throw this.#full()
    this.#needRoom(clusters + blocks)
    this.end = start + clusters + blocks
    await this.#zeroOnDevice(start, clusters + blocks)
    await this.extendTo(start + clusters + blocks)
    const table = new Float64Array((clusters * this.#clusterSize) / spec.ENTRY_SIZE)
    table.set(this.refcounts.table)
    for (let i = 0; i < blocks; i++) table[firstIndex + i] = (start + clusters + i) * this.#clusterSize
    await this.refcounts.replaceTable(table, start * this.#clusterSize, clusters)
    return { start, count: clusters + blocks }
  }

  /** Sees to it that every cluster from the end to `last`, and what this itself takes, has a refcount block. */
  async #cover(last: number): Promise<void> {
    for (let cluster = this.end; cluster <= last; ) {
      const index = Math.floor(cluster / this.refcounts.perBlock)
      if (index >= this.refcounts.table.length) {
        const old: Run = {
          start: this.#header.refcountTableOffset / this.#clusterSize,
          count: this.#header.refcountTableClusters,
        }
        const taken = await this.growTable()
        await this.#setAll(taken.start, taken.count, 1)
        await this.freeLater(old.start, old.count)
      } else if (this.refcounts.table[index] === 0) {
        // The block of the end itself comes first: it counts the clusters that the others take.
        const endIndex = Math.floor(this.end / this.refcounts.perBlock)
        const place = await this.addBlock((this.refcounts.table[endIndex] ?? 0) === 0 ? endIndex : index)
        await this.#setAll(place, 1, 1)
      } else {
        cluster = (index + 1) * this.refcounts.perBlock
        continue
      }
      cluster = this.end
    }
  }

  async #setAll(first: number, count: number, value: number): Promise<void> {
    try {
      for (const { start, count: length } of this.refcounts.pagesOf(first, count))
        await this.refcounts.withPage(start, () => {
          for (let cluster = start; cluster < start + length; cluster++) this.refcounts.set(cluster, value)
        })
    } catch (error) {
      this.isDamaged = true
      throw error
    }
  }

  #allocateReady(run: Run, most: number): number {
    const { refcounts } = this
    if (!refcounts.atHand(run.start)) return -1
    const first = run.start
    const count = Math.min(most, run.count, refcounts.perPage - (first % refcounts.perPage))
    run.start += count
    run.count -= count
    if (run.count === 0) this.#ready.pop()
    this.#take(first, count)
    return first
  }

  #take(first: number, count: number): void {
    for (let cluster = first; cluster < first + count; cluster++) this.refcounts.set(cluster, 1)
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
    const end = Math.min(this.#scanEnd, first + this.refcounts.perPage)
    await this.refcounts.withPage(first, () => {
      // Another flush may have passed the page meanwhile; found twice, a cluster would be given out twice.
      if (this.#scanNext !== first) return
      this.#scanNext = end
      if (!this.refcounts.hasBlock(first)) return
      for (let cluster = first; cluster < end; cluster++) if (this.refcounts.get(cluster) === 0) this.#addFreed(cluster)
    })
  }

  /** On a host block device nothing is known to be zero: takes a few clusters after the end and makes them so. */
  async #refill(deviceClusters: number): Promise<void> {
    await this.#cover(this.end)
    const start = this.end
    const count = Math.min(REFILL, deviceClusters - start, this.refcounts.perBlock - (start % this.refcounts.perBlock))
    if (count <= 0) throw this.#full()
    await this.#zeroOnDevice(start, count)
    await this.#file.sync()
    this.end = start + count
    this.#ready.push({ start, count })
  }

  /** The end of what is in use on a host block device. */
  async #lastUsed(): Promise<number> {
    for (
      let page = (this.refcounts.table.length * this.refcounts.perBlock) / this.refcounts.perPage - 1;
      page >= 0;
      page--
    ) {
      const first = page * this.refcounts.perPage
      if (!this.refcounts.hasBlock(first)) continue
      let last = first + this.refcounts.perPage - 1
      await this.refcounts.withPage(first, () => {
        while (last >= first && this.refcounts.get(last) === 0) last--
      })
      if (last >= first) return last + 1
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
}

/** The runs in order, neighbours as one: few large holes in place of many small ones. */
function joined(runs: Run[]): Run[] {
  const result: Run[] = []
  for (const run of runs.sort((a, b) => a.start - b.start)) {
    const last = result.at(-1)
    if (last !== undefined && last.start + last.count === run.start) last.count += run.count
    else result.push(run)
  }
  return result
}
