// Where the guest's data goes when it cannot simply be written over what it has: to new clusters, or to a place that is kept for it.
// What needs no waiting is done within the call. The order of a change is always the same, so that a killed process loses
// nothing that it acknowledged, and a power loss nothing that was flushed:
//
//   new cluster (reads as zeros) -> data -> [sync] -> L2 entry -> acknowledgement -> the old cluster is free
//
// The sync is needed only where the guest saw something other than zeros before: without it, a power loss that keeps the
// entry but not the data would show zeros in place of what was there. Writers that wait for one share it.
//
// A unit (a cluster, or with extended L2 entries a subcluster) that shows no data but has a place of its own in the file
// is written there: subclusters of a cluster with data, preallocated zeros, all of an external data file. What lies in the
// place then counts as seen. When that is zeros, no sync is needed: what a power loss may bring back there is zeros, or
// something that the guest itself had there since the last flush. Not so when a place that was hidden was emptied since:
// what is brought back there may be older than what a flush covered.

import { assert } from '../../base/assert.ts'
import { QCOW2_COPY } from '../../base/limits.ts'
import { RangeLocks, type RangeToken } from '../../base/mutex.ts'
import { roundDown, roundUp } from '../../base/round.ts'
import { type BlockDevice, type ExtentVisitor, type Pending, ZERO } from '../../block/device.ts'
import type { HostFile } from '../../host/host.ts'
import type { Allocator } from './allocator.ts'
import { type Content, Filler, type Seen } from './filler.ts'
import type { Header } from './header.ts'
import { COMPRESSED, NO_PLACE, UNMAPPED, ZEROS } from './mapping.ts'
import { structureAt } from './overlap.ts'
import { Places, type Replacement } from './places.ts'
import type { SharedSync } from './shared-sync.ts'
import { TableMaker } from './table-maker.ts'
import type { Tables } from './tables.ts'

/** What changes need of the image around them. */
export interface Surroundings extends Seen {
  readonly backing: BlockDevice | undefined
  readonly header: Header
}

/** Who waits for the requests that began before so many hidings. */
interface Landing {
  readonly before: number
  readonly tell: () => void
}

export class Changes {
  /** The file that holds the guest's data: the image's own, or its external data file. */
  readonly data: HostFile
  readonly image: Surroundings
  readonly tables: Tables
  readonly allocator: Allocator
  readonly places: Places
  readonly sync: SharedSync
  readonly tableMaker: TableMaker
  readonly hasDataFile: boolean
  readonly #clusterSize: number
  readonly #unitSize: number
  readonly #filler: Filler
  /** Guest clusters whose mapping is about to change. */
  readonly #locks = new RangeLocks()
  #isBackingSlow = false
  /** After a failure, places may hold what no sync covers, and are not looked at any more. */
  #arePlacesUncertain = false
  /** Places that were emptied though nothing showed in them, and how many of these a sync has made durable. */
  #emptied = 0
  #emptiedSynced = 0
  #sawZeros = false
  /** Host requests in flight, by how many times places had been hidden under such requests when each began. */
  readonly #inFlightBy = new Map<number, number>()
  #hidings = 0
  readonly #landings: Landing[] = []
  readonly #seeExtent: ExtentVisitor = (_length, extent) => {
    this.#sawZeros = this.#sawZeros && (extent & ZERO) !== 0
    return this.#sawZeros
  }
  /** How many bytes the last change did, or will have done when its promise resolves. */
  done = 0
  /** Host requests that have not completed. */
  inFlight = 0
  /** True when something was written since the last sync began; at first, by a process that may have died before it synced. */
  isUnsynced = true

  /** `data` is `file` itself without an external data file. */
  constructor(file: HostFile, data: HostFile, image: Surroundings, tables: Tables, allocator: Allocator) {
    const { header } = image
    this.data = data
    this.image = image
    this.tables = tables
    this.allocator = allocator
    this.hasDataFile = header.dataFile !== undefined
    this.#clusterSize = header.clusterSize
    this.#unitSize = header.unitSize
    this.sync = allocator.sync
    this.places = new Places(allocator, header.clusterSize)
    this.tableMaker = new TableMaker(file, header, tables, this.places, this.sync)
    this.#filler = new Filler(data, image, tables)
  }

  /** A place that showed nothing was emptied: until a sync, it may hold again what was hidden in it. */
  emptiedHidden(): void {
    this.#emptied++
  }

  /** Syncs what was written. Kind 'io' when that is uncertain. */
  async syncAll(): Promise<void> {
    const emptied = this.#emptied
    await this.sync.run()
    this.#emptiedSynced = Math.max(this.#emptiedSynced, emptied)
  }

  /** Counts a host request that has not completed, so that what it uses is not given to others meanwhile. */
  track(wait: Pending): Pending {
    if (wait === undefined) return undefined
    const hidings = this.#hidings
    this.inFlight++
    this.#inFlightBy.set(hidings, (this.#inFlightBy.get(hidings) ?? 0) + 1)
    return wait.finally(() => {
      this.inFlight--
      const left = (this.#inFlightBy.get(hidings) as number) - 1
      if (left > 0) this.#inFlightBy.set(hidings, left)
      else this.#inFlightBy.delete(hidings)
      if (left === 0 && this.#landings.length > 0) this.#land()
    })
  }

  /**
   * Data is hidden whose place stays. A write that went there before may still be on its way: it must not land on what is
   * written there next.
   */
  hidden(): void {
    if (this.inFlight > 0) this.#hidings++
  }

  /** Until no request is on its way that may lead to a place hidden by now; undefined when there is none. */
  #landed(): Pending {
    const before = this.#hidings
    if (!this.#hasStrays(before)) return undefined
    return new Promise((tell) => this.#landings.push({ before, tell }))
  }

  #hasStrays(before: number): boolean {
    if (before === 0 || this.inFlight === 0) return false
    for (const hidings of this.#inFlightBy.keys()) if (hidings < before) return true
    return false
  }

  #land(): void {
    for (const landing of this.#landings.splice(0)) {
      if (this.#hasStrays(landing.before)) this.#landings.push(landing)
      else landing.tell()
    }
  }

  /** Fails with kind 'corrupt' when the map leads a write for guest offset `offset` into a structure of the image. */
  protect(host: number, length: number, offset: number): void {
    if (this.hasDataFile) return
    const structure = structureAt(this.image.header, host, length)
    if (structure !== undefined) throw this.tables.corrupt(`its ${structure} where data goes, at ${host},`, offset)
  }

  /** What must be waited for before the mapping of the range can change; then all is looked up anew. */
  obstacle(offset: number, length: number): Pending {
    const first = roundDown(offset, this.#clusterSize)
    const span = roundUp(offset + length, this.#clusterSize) - first
    if (!this.#locks.idle && this.#locks.isBusy(first, span)) return this.#locks.whenIdle(first, span)
    return this.tables.isWritable(offset) ? undefined : this.tableMaker.make(offset)
  }

  /** The place that the offset, found last, has for itself in the file; NO_PLACE without one. */
  ownPlace(offset: number): number {
    if (this.hasDataFile) return offset
    return this.tables.exclusive ? this.tables.host : NO_PLACE
  }

  /** True when what was found last must be replaced with care: something other than zeros is or may be seen there. */
  needsCopy(offset: number, length: number): boolean {
    const { kind, host } = this.tables
    return host !== NO_PLACE || (kind === UNMAPPED && this.#showsData(offset, length))
  }

  /** True when unmapped units of the range show, or may show, something other than zeros from below. */
  #showsData(offset: number, length: number): boolean {
    return this.#showsBacking(offset) && !this.#isZeroBelow(offset, length)
  }

  /** True when the backing device says at once that it holds only zeros under the units of the range. */
  #isZeroBelow(offset: number, length: number): boolean {
    const { backing } = this.image
    if (backing === undefined || this.#isBackingSlow) return backing === undefined
    const first = roundDown(offset, this.#unitSize)
    const end = Math.min(roundUp(offset + length, this.#unitSize), backing.size)
    this.#sawZeros = true
    const wait = backing.extents(first, end - first, this.#seeExtent)
    if (wait === undefined) return this.#sawZeros
    // A device that has to look it up would cost each write a wait; it is not asked again.
    this.#isBackingSlow = true
    wait.catch(() => undefined)
    return false
  }

  #showsBacking(offset: number): boolean {
    const { backing } = this.image
    return backing !== undefined && roundDown(offset, this.#unitSize) < backing.size
  }

  /** True when something below may show through an unmapped unit: now, or when the chain has opened it. */
  mayShowBacking(offset: number): boolean {
    return this.image.backing === undefined ? this.image.header.backing !== undefined : this.#showsBacking(offset)
  }

  /** Writes to clusters that read as zeros and have no place. */
  writeFresh(offset: number, length: number, from: Uint8Array, at: number): Pending {
    const size = this.#clusterSize
    const first = roundDown(offset, size)
    const cluster = this.allocator.allocate((roundUp(offset + length, size) - first) / size)
    if (cluster < 0) return this.allocator.prepare()
    const count = this.allocator.granted
    const place = cluster * size
    const bytes = Math.min(length, first + count * size - offset)
    let wait: Pending
    try {
      this.protect(place, count * size, offset)
      wait = this.data.write(place + offset - first, bytes, from, at)
    } catch (error) {
      this.allocator.free(cluster, count)
      throw error
    }
    this.done = bytes
    if (wait !== undefined) return this.#linkAfter(wait, offset, bytes, { offset: first, cluster, count })
    return this.holding(offset, bytes, this.#link(offset, bytes, place))
  }

  async #linkAfter(wait: Promise<void>, offset: number, length: number, fresh: Replacement): Promise<void> {
    const token = this.lock(offset, length)
    try {
      await this.places.orGiveBack([fresh], () => wait)
      await this.#linkLoaded(offset, length, fresh.cluster * this.#clusterSize)
    } finally {
      this.release(token)
    }
  }

  /** Writes to units that have a place of their own and no data in it: `place` is that of the offset. Zeros without `from`. */
  settle(offset: number, length: number, place: number, from: Uint8Array | undefined, at: number): Pending {
    const unit = this.#unitSize
    const start = roundDown(offset, unit)
    const end = Math.min(offset + length, start + Math.max(unit, QCOW2_COPY))
    const stop = this.#stopOf(end, unit)
    this.protect(place, end - offset, offset)
    this.done = end - offset
    const isSeen = this.tables.kind === UNMAPPED && this.#showsData(offset, end - offset)
    const hasLanded = !this.#hasStrays(this.#hidings)
    const isCertain = !this.#arePlacesUncertain && this.#emptied === this.#emptiedSynced && hasLanded
    const isClean = !isSeen && isCertain && this.#filler.isZeroAt(place - (offset - start), stop - start)
    if (!isClean || from === undefined)
      return this.track(this.#settleOver({ offset, end, from, at }, start, stop, place))
    const host = place - (offset - roundDown(offset, this.#clusterSize))
    let wait: Pending
    try {
      wait = this.data.write(place, end - offset, from, at)
    } catch (error) {
      this.#arePlacesUncertain = true
      throw error
    }
    if (wait === undefined) return this.holding(offset, end - offset, this.#link(offset, end - offset, host))
    return this.#linkSettled(wait, offset, end - offset, host)
  }

  async #linkSettled(wait: Promise<void>, offset: number, length: number, host: number): Promise<void> {
    const token = this.lock(offset, length)
    try {
      await wait
      await this.#linkLoaded(offset, length, host)
    } catch (error) {
      this.#arePlacesUncertain = true
      throw error
    } finally {
      this.release(token)
    }
  }

  /** As `settle`, where something is seen, or lies in the place: all of it is written, and synced before it shows. */
  async #settleOver(content: Content, start: number, stop: number, place: number): Promise<void> {
    const { offset, end } = content
    const token = this.lock(offset, end - offset)
    try {
      await this.#landed()
      await this.#filler.fill(content, start, stop, place - (offset - start), false)
      await this.syncAll()
      await this.#linkLoaded(offset, end - offset, place - (offset - roundDown(offset, this.#clusterSize)))
    } catch (error) {
      this.#arePlacesUncertain = true
      throw error
    } finally {
      this.release(token)
    }
  }

  /** The end of the units that a change up to `end` touches, or of the disk within the last one. */
  #stopOf(end: number, unit: number): number {
    return Math.max(end, Math.min(roundUp(end, unit), this.image.header.size))
  }

  /**
   * Gives a run of clusters new places: with `from` at the range, or zeros without it, and around it what was there. Their
   * old places lose a reference.
   */
  async replace(offset: number, length: number, from: Uint8Array | undefined, at: number): Promise<void> {
    const size = this.#clusterSize
    const { kind, host, compressedLength } = this.tables
    const unit = kind === COMPRESSED ? size : this.#unitSize
    const first = roundDown(offset, size)
    const most = Math.max(1, Math.floor(QCOW2_COPY / size))
    const count = Math.min(most, this.tables.roomInSlice(offset), (roundUp(offset + length, size) - first) / size)
    const end = Math.min(offset + length, first + count * size)
    const content: Content = { offset, end, from, at }
    this.done = end - offset
    const token = this.lock(first, count * size)
    try {
      const replacements: Replacement[] = []
      await this.places.orGiveBack(replacements, async () => {
        for (let taken = 0; taken < count; ) {
          const fresh = await this.places.take(first + taken * size, count - taken)
          replacements.push(fresh)
          taken += fresh.count
          this.protect(fresh.cluster * size, fresh.count * size, fresh.offset)
          await this.places.extendOver(fresh)
          await this.#fill(fresh, content, unit, host !== NO_PLACE && unit < size)
        }
        if (kind !== ZEROS || unit < size) await this.sync.run()
      })
      for (const fresh of replacements) {
        const start = Math.max(fresh.offset, roundDown(offset, unit))
        const stop = Math.min(fresh.offset + fresh.count * size, roundUp(end, unit))
        await this.#linkLoaded(start, stop - start, fresh.cluster * size)
      }
      if (kind === COMPRESSED) await this.places.freeCompressed(host, compressedLength)
      else if (host !== NO_PLACE) await this.places.freeOld(Math.floor(host / size), count)
    } finally {
      this.release(token)
    }
  }

  /** Writes what new clusters hold: the content, the rest of its units, and, when it had data, the other subclusters. */
  async #fill(fresh: Replacement, content: Content, unit: number, hasOthers: boolean): Promise<void> {
    const freshEnd = fresh.offset + fresh.count * this.#clusterSize
    const start = Math.max(fresh.offset, roundDown(content.offset, unit))
    const stop = Math.min(freshEnd, this.#stopOf(content.end, unit))
    const place = fresh.cluster * this.#clusterSize
    await this.#filler.fill(content, start, stop, place + start - fresh.offset, true)
    if (!hasOthers) return
    await this.#filler.copyOwned(fresh.offset, start, place)
    const after = roundUp(stop, unit)
    await this.#filler.copyOwned(after, Math.min(freshEnd, this.image.header.size), place + after - fresh.offset)
  }

  #linkLoaded(offset: number, length: number, host: number): Promise<void> {
    return this.tables.withEntry(offset, 1, () => this.#link(offset, length, host))
  }

  #link(offset: number, length: number, host: number): Pending {
    try {
      return this.tables.link(offset, length, host)?.catch((error) => this.places.damaged(error))
    } catch (error) {
      return this.places.damaged(error)
    }
  }

  /** Keeps others from changing the mapping of the range's clusters until `wait` is over. */
  holding(offset: number, length: number, wait: Pending): Pending {
    if (wait === undefined) return undefined
    const token = this.lock(offset, length)
    return wait.finally(() => this.release(token))
  }

  lock(offset: number, length: number): RangeToken {
    const first = roundDown(offset, this.#clusterSize)
    const token = this.#locks.tryAcquire(first, roundUp(offset + length, this.#clusterSize) - first, true)
    assert(token !== undefined, 'the clusters were found unlocked')
    return token
  }

  release(token: RangeToken): void {
    this.#locks.release(token)
  }
}
