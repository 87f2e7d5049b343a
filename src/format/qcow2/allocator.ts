// Which host cluster is used next. Every cluster that `allocate` gives reads as zeros, also after a crash. Most come from
// beyond the end of the file. A freed one takes the long way, so that nothing durable refers to it when it is used again:
//
//   free -> freed -> (flush: its freeing is durable) -> punched -> (flush: its zeros are durable) -> ready
//
// Clusters that were free when the image was opened are found by a scan, a page of refcounts at each flush.
//
// An image of version 2 has no dirty bit that would let the next opening count anew, so the counts in its file may be too
// high, never too low: the allocator is strict. It counts some clusters ahead of use, durably, and gives out only those; and
// it drops a reference only when its removal is durable. A crash leaks what was counted and not used.
//
//   free -> dropped -> (flush: its removal is durable) -> freed ... punched -> (flush) -> spare -> counted -> (sync) -> ready

import { QCOW2_FREED_MAX, QCOW2_REFCOUNT_TABLE_MAX, QCOW2_REFILL_MAX, QCOW2_REFILL_MIN } from '../../base/limits.ts'
import { Mutex } from '../../base/mutex.ts'
import { divideUp, roundDown } from '../../base/round.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Header } from './header.ts'
import { structureAt } from './overlap.ts'
import type { Refcounts } from './refcounts.ts'
import { joined, type Run, takePiece, takeSome } from './runs.ts'
import type { SharedSync } from './shared-sync.ts'
import * as spec from './spec.ts'

/** What the sync of a flush makes durable: that references are gone, that clusters are free, and that others are zero. */
export interface Settlement {
  readonly dropped: Run[]
  readonly freed: Run[]
  readonly punched: Run[]
}

export class Allocator {
  readonly refcounts: Refcounts
  /** The syncs of the image. */
  readonly sync: SharedSync
  /** True for version 2: see above. */
  readonly isStrict: boolean
  readonly #file: HostFile
  readonly #header: Header
  /** Clusters of a host block device, which has no end to grow; undefined for a file. */
  readonly #deviceClusters: number | undefined
  readonly #clusterSize: number
  readonly #mutex = new Mutex()
  /** Of a strict allocator: references whose removal is not durable yet. */
  #dropped: Run[] = []
  #freed: Run[] = []
  #punched: Run[] = []
  /** Of a strict allocator: clusters that could be used, and are not counted yet. */
  #spare: Run[] = []
  /** Sorted, the lowest last. */
  #ready: Run[] = []
  #refill = QCOW2_REFILL_MIN
  #scanNext = 0
  #scanEnd = 0

  /** The first cluster after all that are or were in use. */
  end = 0
  /** How many clusters the last `allocate` gave. */
  granted = 0
  /** True after a failure that may have left the file's refcounts wrong: the dirty bit then stays. */
  isDamaged = false

  /** `deviceSize`: bytes of the host block device that the image is in; undefined for a file. */
  constructor(file: HostFile, header: Header, refcounts: Refcounts, sync: SharedSync, deviceSize: number | undefined) {
    this.#file = file
    this.sync = sync
    this.isStrict = header.version === 2
    this.#header = header
    this.refcounts = refcounts
    this.#clusterSize = header.clusterSize
    this.#deviceClusters = deviceSize === undefined ? undefined : Math.floor(deviceSize / header.clusterSize)
  }

  /** Begins anew after the refcounts were opened. `usedEnd`: clusters before it are in use, whatever the counts say. */
  async open(usedEnd = 0): Promise<void> {
    this.#dropped = []
    this.#freed = []
    this.#punched = []
    this.#spare = []
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
    if (this.#isRefilled || !this.refcounts.hasBlock(this.end) || !this.refcounts.atHand(this.end)) return -1
    const first = this.#passEnd(most)
    if (first >= 0) this.#take(first, this.granted)
    return first
  }

  /** True when clusters from the end are made ready some at a time, since they need work and a sync first. */
  get #isRefilled(): boolean {
    return this.isStrict || this.#deviceClusters !== undefined
  }

  /**
   * Moves the end past up to `most` clusters without a count, neighbours in one page that is at hand. Gives the first, and
   * their number in `granted`; -1 when the page has none left.
   */
  #passEnd(most: number): number {
    const { refcounts } = this
    // A count after the end of the file is a leak of somebody else's; such a cluster is passed over.
    const pageEnd = roundDown(this.end, refcounts.perPage) + refcounts.perPage
    while (this.end < pageEnd && refcounts.get(this.end) !== 0) this.end++
    if (this.end === pageEnd) return -1
    const first = this.end
    const room = Math.min(most, pageEnd - first)
    let count = 1
    while (count < room && refcounts.get(first + count) === 0) count++
    this.end = first + count
    this.granted = count
    return first
  }

  /** Makes the next `allocate` succeed, as far as memory and tables go. Kind 'no-space' when the image is full. */
  prepare(): Promise<void> {
    return this.#mutex.run(async () => {
      if (this.#ready.length === 0 && this.#isRefilled) await this.#makeReady()
      if (this.isStrict) return
      const next = this.#ready.at(-1)?.start ?? this.end
      if (!this.refcounts.hasBlock(next)) await this.#cover(next)
      await this.refcounts.withPage(next, () => this.refcounts.hold(next))
    })
  }

  /** Takes `count` clusters in one piece; gives the first. They read as zeros, and the file covers them. */
  allocateRun(count: number): Promise<number> {
    return this.#mutex.run(async () => {
      // Where snapshots come and go, a block device would be full one day if all were taken after the end.
      let first = this.isStrict ? -1 : takePiece(this.#ready, count)
      if (first >= 0) {
        await this.#setAll(first, count, 1)
        return first
      }
      do {
        first = this.end
        await this.#cover(first + count - 1)
      } while (this.end !== first)
      this.#needRoom(count)
      this.end = first + count
      await this.#zeroOnDevice(first, count)
      await this.extendTo(first + count)
      await this.#setAll(first, count, 1)
      await this.makeCountsDurable()
      return first
    })
  }

  /** True when `free` can be called for clusters from `first` to `last`; else `freeLater` must. */
  canFree(first: number, last: number): boolean {
    if (this.isStrict) return this.#dropped.length < QCOW2_FREED_MAX
    return this.refcounts.atHand(first) && this.refcounts.atHand(last)
  }

  /** Drops one reference to each of the clusters, when `canFree` says so. They are used again after two flushes. */
  free(first: number, count: number): void {
    if (!this.isStrict) return this.release(first, count)
    const last = this.#dropped.at(-1)
    if (last !== undefined && last.start + last.count === first) last.count += count
    else if (count > 0) this.#dropped.push({ start: first, count })
  }

  /** Drops one reference to each of the clusters, which are at hand, where its removal is durable already. */
  release(first: number, count: number): void {
    for (let cluster = first; cluster < first + count; cluster++) {
      const before = this.refcounts.get(cluster)
      // A count that is zero already was wrong in the image; the cluster may have other users, so it is left alone.
      if (before === 0) continue
      this.refcounts.set(cluster, before - 1)
      if (before === 1) this.#addFreed(cluster)
    }
  }

  /** Drops one reference to each of the clusters, and brings about what that needs. */
  async freeLater(first: number, count: number): Promise<void> {
    if (!this.isStrict) return this.#releaseAll([{ start: first, count }])
    if (!this.canFree(first, first)) {
      const dropped = this.#dropped
      this.#dropped = []
      await this.sync.run()
      await this.#releaseAll(dropped)
    }
    this.free(first, count)
  }

  async #releaseAll(runs: readonly Run[]): Promise<void> {
    for (const run of runs)
      for (const { start, count } of this.refcounts.pagesOf(run.start, run.count))
        await this.refcounts.withPage(start, () => this.release(start, count))
  }

  /** Before the sync of a flush: what that sync will make durable. To be passed to `settle`. */
  async collect(): Promise<Settlement> {
    const punched = this.#punched
    this.#punched = []
    await this.#scan()
    const freed = joined(this.#freed)
    this.#freed = []
    const dropped = this.#dropped
    this.#dropped = []
    return { dropped, freed, punched }
  }

  /**
   * After the sync: gives out what an earlier flush deallocated, and deallocates what is free now. While requests are in
   * flight that may still use it (`isQuiet` false), it stays freed.
   */
  async settle({ dropped, freed, punched }: Settlement, isQuiet: boolean): Promise<void> {
    if (this.isStrict) this.#spare = joined([...this.#spare, ...punched])
    else if (punched.length > 0) this.#ready = joined([...this.#ready, ...punched]).reverse()
    await this.#orDamaged(() => this.#releaseAll(dropped))
    // Nothing durable refers to what was released just now.
    if (this.isStrict) freed = joined([...freed, ...this.#freed.splice(0)])
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

  /** After the last flush: counts are written as they are, and the file ends after what is in use. A sync must follow. */
  async finish(): Promise<void> {
    if (this.isStrict) await this.#giveBack()
    await this.refcounts.writeBack()
    const size = this.end * this.#clusterSize
    if (this.#deviceClusters === undefined && this.#file.size() !== size) await this.#file.truncate(size)
  }

  /** What a strict allocator made ready and did not give out is free. */
  async #giveBack(): Promise<void> {
    const ready = this.#ready
    this.#ready = []
    for (const { start, count } of ready) {
      await this.#setAll(start, count, 0)
      this.#spare.push({ start, count })
    }
    this.#spare = joined(this.#spare)
    const last = this.#spare.at(-1)
    if (last === undefined || last.start + last.count !== this.end) return
    this.end = last.start
    this.#spare.pop()
  }

  /** Gives block `index` of the refcounts a place at the end. */
  async addBlock(index: number, isCounted: boolean): Promise<void> {
    this.#needRoom(1)
    const place = this.end++
    await this.#zeroOnDevice(place, 1)
    await this.extendTo(place + 1)
    this.refcounts.showBlock(index, place * this.#clusterSize)
    try {
      if (isCounted) await this.#setAll(place, 1, 1)
      await this.makeCountsDurable()
      await this.refcounts.writeEntry(index)
    } catch (error) {
      this.refcounts.hideBlocks(index, 1)
      this.isDamaged = true
      throw error
    }
  }

  /**
   * Replaces the refcount table by one that reaches past the end, with blocks for the area that holds it. Durable on return.
   */
  async growTable(isCounted: boolean): Promise<void> {
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
    const old = this.refcounts.table
    this.refcounts.showTable(table)
    try {
      if (isCounted) await this.#setAll(start, clusters + blocks, 1)
      await this.refcounts.writeTable(start * this.#clusterSize)
      if (this.isStrict) await this.refcounts.writeBack()
      await this.sync.run()
    } catch (error) {
      this.refcounts.hideBlocks(firstIndex, blocks)
      this.refcounts.showTable(old)
      this.isDamaged = true
      throw error
    }
    try {
      await this.refcounts.leadToTable(start * this.#clusterSize, clusters)
    } catch (error) {
      // Which of the tables the file now has is unknown, so that no count is certain to be kept.
      this.isDamaged = true
      this.sync.fail(error)
      throw error
    }
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
        await this.growTable(true)
        await this.freeLater(old.start, old.count)
      } else if (this.refcounts.table[index] === 0) {
        // The block of the end itself comes first: it counts the clusters that the others take.
        const endIndex = Math.floor(this.end / this.refcounts.perBlock)
        await this.addBlock((this.refcounts.table[endIndex] ?? 0) === 0 ? endIndex : index, true)
      } else {
        cluster = (index + 1) * this.refcounts.perBlock
        continue
      }
      cluster = this.end
    }
  }

  /** That counts stay too high costs space, which the next opening finds or a repair; the request stands. */
  async #orDamaged(work: () => Promise<void>): Promise<void> {
    try {
      await work()
    } catch {
      this.isDamaged = true
    }
  }

  /** What a strict allocator counts must be durable before anything refers to it. */
  async makeCountsDurable(): Promise<void> {
    if (!this.isStrict) return
    await this.refcounts.writeBack()
    await this.sync.run()
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
    if (!this.isStrict && !refcounts.atHand(run.start)) return -1
    const first = run.start
    const count = Math.min(most, run.count, refcounts.perPage - (first % refcounts.perPage))
    run.start += count
    run.count -= count
    if (run.count === 0) this.#ready.pop()
    this.granted = count
    if (!this.isStrict) this.#take(first, count)
    return first
  }

  #take(first: number, count: number): void {
    for (let cluster = first; cluster < first + count; cluster++) this.refcounts.set(cluster, 1)
  }

  #addFreed(cluster: number): void {
    // What the scan has yet to pass, it finds.
    if (cluster >= this.#scanNext && cluster < this.#scanEnd) return
    // Whatever the counts of a damaged image say, what the header leads to is in use.
    if (structureAt(this.#header, cluster * this.#clusterSize, this.#clusterSize) !== undefined) return
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

  /** Makes some clusters ready: spare ones, or else from the end, zeroed on a device, counted when strict, and synced. */
  async #makeReady(): Promise<void> {
    const runs = takeSome(this.#spare, this.#refill)
    if (runs.length === 0) runs.push(await this.#takeEnd(this.#refill))
    try {
      if (this.isStrict) for (const { start, count } of runs) await this.#setAll(start, count, 1)
      if (this.isStrict) await this.refcounts.writeBack()
      await this.sync.run()
    } catch (error) {
      await this.#orDamaged(async () => {
        for (const { start, count } of runs) if (this.isStrict) await this.#setAll(start, count, 0)
      })
      this.#spare.push(...runs)
      throw error
    }
    this.#ready = joined([...this.#ready, ...runs]).reverse()
    this.#refill = Math.min(QCOW2_REFILL_MAX, this.#refill * 2)
  }

  /** Takes up to `most` clusters from the end, which then read as zeros. */
  async #takeEnd(most: number): Promise<Run> {
    let start = -1
    while (start < 0) {
      await this.#cover(this.end)
      const left = this.#deviceClusters === undefined ? most : Math.min(most, this.#deviceClusters - this.end)
      if (left <= 0) throw this.#full()
      await this.refcounts.withPage(this.end, () => {
        start = this.#passEnd(left)
      })
    }
    const count = this.granted
    await this.#zeroOnDevice(start, count)
    await this.extendTo(start + count)
    return { start, count }
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
