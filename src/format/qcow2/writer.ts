// Changes to a qcow2 image: write, zero, trim and flush. What needs no waiting is done within the call. The order of a
// change is always the same, so that a killed process loses nothing that it acknowledged, and a power loss nothing that
// was flushed:
//
//   new cluster (reads as zeros) -> data -> [sync] -> L2 entry -> acknowledgement -> the old cluster is free
//
// The sync is needed only where the guest saw something other than zeros before: without it, a power loss that keeps the
// entry but not the data would show zeros in place of what was there. Writers that wait for one share it.

import { assert } from '../../base/assert.ts'
import { isZero } from '../../base/bytes.ts'
import { QCOW2_COPY } from '../../base/limits.ts'
import { Mutex, RangeLocks, type RangeToken } from '../../base/mutex.ts'
import { roundDown, roundUp } from '../../base/round.ts'
import { type BlockDevice, type ExtentVisitor, type Pending, ZERO } from '../../block/device.ts'
import { BlockError, isBlockError } from '../../block/error.ts'
import { pool } from '../../block/pool.ts'
import type { HostFile } from '../../host/host.ts'
import type { Allocator } from './allocator.ts'
import type { Header } from './header.ts'
import { COMPRESSED, DATA, NO_PLACE, UNMAPPED, ZEROS } from './mapping.ts'
import { SharedSync } from './shared-sync.ts'
import type { Tables } from './tables.ts'

/** What the writer needs of the image around it. */
export interface Surroundings {
  readonly backing: BlockDevice | undefined
  readonly header: Header
  /** What the guest sees. */
  read(offset: number, length: number, into: Uint8Array, at: number): Pending
}

/** Neighbouring host clusters that take the place of old ones. */
interface Replacement {
  /** Guest offset of the first. */
  readonly offset: number
  readonly cluster: number
  readonly count: number
}

export class Writer {
  readonly #file: HostFile
  readonly #image: Surroundings
  readonly #tables: Tables
  readonly #allocator: Allocator
  readonly #clusterSize: number
  readonly #sync: SharedSync
  readonly #tableMutex = new Mutex()
  /** Guest clusters whose mapping is about to change. */
  readonly #locks = new RangeLocks()
  #inFlight = 0
  #isUnsynced = false
  #failure: BlockError | undefined
  #isBackingSlow = false
  #sawZeros = false
  readonly #seeExtent: ExtentVisitor = (_length, extent) => {
    this.#sawZeros = this.#sawZeros && (extent & ZERO) !== 0
    return this.#sawZeros
  }
  /** How many bytes the last piece did, or will have done when its promise resolves. */
  #done = 0

  constructor(file: HostFile, image: Surroundings, tables: Tables, allocator: Allocator) {
    this.#file = file
    this.#image = image
    this.#tables = tables
    this.#allocator = allocator
    this.#clusterSize = image.header.clusterSize
    this.#sync = new SharedSync(file)
  }

  write(offset: number, length: number, from: Uint8Array, at: number): Pending {
    const end = offset + length
    while (offset < end) {
      const wait = this.#writePiece(offset, end - offset, from, at)
      const done = this.#done
      if (wait !== undefined)
        return wait.then(() => {
          this.#isUnsynced = true
          return this.write(offset + done, end - offset - done, from, at + done)
        })
      offset += done
      at += done
    }
    return undefined
  }

  /** Makes the range read as zeros; whole clusters give up their place when they may. */
  zero(offset: number, length: number, mayUnmap: boolean): Pending {
    return this.#zeroPieces(offset, length, mayUnmap, true)
  }

  /** Gives up the whole clusters of the range, which then read as zeros; leaves parts, and most of what it never held. */
  trim(offset: number, length: number): Pending {
    return this.#zeroPieces(offset, length, true, false)
  }

  flush(): Pending {
    if (this.#failure !== undefined) throw this.#failure
    if (!this.#isUnsynced && this.#inFlight === 0) return undefined
    return this.flushAll()
  }

  /**
   * Syncs data and L2 entries. Refcounts stay in memory: the dirty bit says so, and writing them at each flush would cost
   * more than the rare rebuild. A failed sync may have lost writes for good, so every later flush fails too.
   */
  async flushAll(): Promise<void> {
    this.#isUnsynced = false
    const settlement = await this.#allocator.collect()
    await this.#ordered()
    await this.#allocator.settle(settlement, this.#inFlight === 0)
  }

  /** Runs `work` while no L2 table is made: for who replaces the L1 table. */
  withTables(work: () => Promise<void>): Promise<void> {
    return this.#tableMutex.run(work)
  }

  /** Counts a host request that has not completed, so that what it uses is not given to others meanwhile. */
  track(wait: Pending): Pending {
    if (wait === undefined) return undefined
    this.#inFlight++
    return wait.finally(() => {
      this.#inFlight--
    })
  }

  #writePiece(offset: number, length: number, from: Uint8Array, at: number): Pending {
    const tables = this.#tables
    this.#done = 0
    if (!tables.find(offset, length)) return tables.load(offset)
    this.#isUnsynced = true
    if (tables.kind === DATA && tables.exclusive) {
      this.#done = tables.length
      return this.track(this.#file.write(tables.host, tables.length, from, at))
    }
    const wait = this.#obstacle(offset, tables.length)
    if (wait !== undefined) return wait
    return this.#needsCopy(offset, tables.length)
      ? this.#replace(offset, tables.length, from, at)
      : this.#writeFresh(offset, tables.length, from, at)
  }

  /** What must be waited for before the mapping of the range can change; then all is looked up anew. */
  #obstacle(offset: number, length: number): Pending {
    const first = roundDown(offset, this.#clusterSize)
    const span = roundUp(offset + length, this.#clusterSize) - first
    if (!this.#locks.idle && this.#locks.isBusy(first, span)) return this.#unlocked(first, span)
    return this.#tables.isWritable(offset) ? undefined : this.#makeTable(offset)
  }

  async #unlocked(first: number, span: number): Promise<void> {
    this.#locks.release(await this.#locks.acquire(first, span, true))
  }

  /** True when the clusters found last must be replaced with care: something other than zeros is or may be seen there. */
  #needsCopy(offset: number, length: number): boolean {
    const { kind, host } = this.#tables
    if (kind === UNMAPPED) return this.#showsBacking(offset) && !this.#isZeroBelow(offset, length)
    return kind !== ZEROS || host !== NO_PLACE
  }

  /** True when the backing device says at once that it holds only zeros under the clusters of the range. */
  #isZeroBelow(offset: number, length: number): boolean {
    const { backing } = this.#image
    if (backing === undefined || this.#isBackingSlow) return backing === undefined
    const first = roundDown(offset, this.#clusterSize)
    const end = Math.min(roundUp(offset + length, this.#clusterSize), backing.size)
    this.#sawZeros = true
    const wait = backing.extents(first, end - first, this.#seeExtent)
    if (wait === undefined) return this.#sawZeros
    // A device that has to look it up would cost each write a wait; it is not asked again.
    this.#isBackingSlow = true
    wait.catch(() => undefined)
    return false
  }

  #showsBacking(offset: number): boolean {
    const { backing } = this.#image
    return backing !== undefined && roundDown(offset, this.#clusterSize) < backing.size
  }

  /** True when something below may show through an unmapped cluster: now, or when the chain has opened it. */
  #mayShowBacking(offset: number): boolean {
    return this.#image.backing === undefined ? this.#image.header.backing !== undefined : this.#showsBacking(offset)
  }

  /** Writes to clusters that read as zeros and have no place. */
  #writeFresh(offset: number, length: number, from: Uint8Array, at: number): Pending {
    const first = roundDown(offset, this.#clusterSize)
    const cluster = this.#allocator.allocate((roundUp(offset + length, this.#clusterSize) - first) / this.#clusterSize)
    if (cluster < 0) return this.#allocator.prepare()
    const count = this.#allocator.granted
    const bytes = Math.min(length, first + count * this.#clusterSize - offset)
    let wait: Pending
    try {
      wait = this.#file.write(cluster * this.#clusterSize + offset - first, bytes, from, at)
    } catch (error) {
      this.#allocator.free(cluster, count)
      throw error
    }
    this.#done = bytes
    if (wait !== undefined) return this.#linkAfter(wait, { offset: first, cluster, count })
    return this.#holding(first, count, this.#link(first, count, cluster))
  }

  async #linkAfter(wait: Promise<void>, fresh: Replacement): Promise<void> {
    const token = this.#lock(fresh.offset, fresh.count)
    try {
      await this.#orGiveBack([fresh], () => wait)
      await this.#linkLoaded(fresh)
    } finally {
      this.#locks.release(token)
    }
  }

  /**
   * Gives a run of clusters new places: with `from` at the range, or zeros without it, and around it what was there. Their
   * old places lose a reference.
   */
  async #replace(offset: number, length: number, from: Uint8Array | undefined, at: number): Promise<void> {
    const size = this.#clusterSize
    const { kind, host, compressedLength } = this.#tables
    const first = roundDown(offset, size)
    const most = Math.max(1, Math.floor(QCOW2_COPY / size))
    const count = Math.min(most, this.#tables.roomInSlice(offset), (roundUp(offset + length, size) - first) / size)
    const end = Math.min(offset + length, first + count * size)
    this.#done = end - offset
    const token = this.#lock(first, count)
    try {
      const replacements: Replacement[] = []
      await this.#orGiveBack(replacements, async () => {
        for (let taken = 0; taken < count; ) {
          const fresh = await this.#allocate(first + taken * size, count - taken)
          replacements.push(fresh)
          taken += fresh.count
          // Zeros are not written, so that the file might end before the clusters do.
          await this.#allocator.extendTo(fresh.cluster + fresh.count)
          await this.#fill(fresh, offset, end, from, at)
        }
        if (kind !== ZEROS) await this.#ordered()
      })
      for (const fresh of replacements) await this.#linkLoaded(fresh)
      if (kind === COMPRESSED) await this.#freeCompressed(host, compressedLength)
      else if (kind !== UNMAPPED) await this.#freeOld(Math.floor(host / size), count)
    } finally {
      this.#locks.release(token)
    }
  }

  /** Writes what new clusters hold of the range `offset` to `end`, and around it what the guest sees there now. */
  async #fill(
    fresh: Replacement,
    offset: number,
    end: number,
    from: Uint8Array | undefined,
    at: number,
  ): Promise<void> {
    const start = fresh.offset
    const stop = Math.min(start + fresh.count * this.#clusterSize, this.#image.header.size)
    const place = fresh.cluster * this.#clusterSize
    const dataStart = Math.max(start, offset)
    const dataEnd = Math.min(stop, end)
    if (dataStart > start) await this.#copyOld(start, dataStart - start, place)
    if (from !== undefined)
      await this.#file.write(place + dataStart - start, dataEnd - dataStart, from, at + dataStart - offset)
    if (stop > dataEnd) await this.#copyOld(dataEnd, stop - dataEnd, place + dataEnd - start)
  }

  async #copyOld(offset: number, length: number, place: number): Promise<void> {
    const buffer = pool.take(length)
    try {
      await this.#image.read(offset, length, buffer, 0)
      if (!isZero(buffer, 0, length)) await this.#file.write(place, length, buffer, 0)
    } finally {
      pool.give(buffer)
    }
  }

  #zeroPieces(offset: number, length: number, mayUnmap: boolean, parts: boolean): Pending {
    const end = offset + length
    while (offset < end) {
      const wait = this.#zeroPiece(offset, end - offset, mayUnmap, parts)
      const done = this.#done
      if (wait !== undefined)
        return wait.then(() => {
          this.#isUnsynced = true
          return this.#zeroPieces(offset + done, end - offset - done, mayUnmap, parts)
        })
      offset += done
    }
    return undefined
  }

  #zeroPiece(offset: number, length: number, mayUnmap: boolean, parts: boolean): Pending {
    const tables = this.#tables
    this.#done = 0
    if (!tables.find(offset, length)) return tables.load(offset)
    const { kind, host } = tables
    const first = roundDown(offset, this.#clusterSize)
    const end = offset + tables.length
    // The disk's short last cluster counts as whole.
    const wholeEnd =
      end >= this.#image.header.size ? roundUp(end, this.#clusterSize) : roundDown(end, this.#clusterSize)
    const isWhole = offset === first && wholeEnd > first
    const isZeroNow = kind === ZEROS && (host === NO_PLACE || !mayUnmap || !isWhole)
    // A trim takes no space: where it would need a new table, what shows from below goes on to show.
    const isLeft = !parts && !tables.isWritable(offset)
    const isEmpty = kind === UNMAPPED && (isLeft || !this.#mayShowBacking(offset))
    const partEnd = Math.min(end, first + this.#clusterSize)
    if (isZeroNow || isEmpty || (!isWhole && !parts)) {
      this.#done = (isZeroNow || isEmpty ? end : partEnd) - offset
      return undefined
    }
    this.#isUnsynced = true
    if (!isWhole && kind === DATA && tables.exclusive) {
      this.#done = partEnd - offset
      return this.track(this.#file.zero(host, partEnd - offset))
    }
    const wait = this.#obstacle(offset, (isWhole ? wholeEnd : partEnd) - offset)
    if (wait !== undefined) return wait
    if (!isWhole) return this.#replace(offset, partEnd - offset, undefined, 0)
    return this.#zeroWhole(first, (wholeEnd - first) / this.#clusterSize, Math.min(wholeEnd, end), mayUnmap)
  }

  /** Makes whole clusters, as found last, read as zeros. */
  #zeroWhole(offset: number, count: number, end: number, mayUnmap: boolean): Pending {
    const { kind, host, exclusive, compressedLength } = this.#tables
    const size = this.#clusterSize
    if (kind === DATA && exclusive && !mayUnmap) {
      this.#done = end - offset
      return this.#holding(offset, count, this.#tables.hide(offset, count * size))
    }
    const firstOld = Math.floor(host / size)
    const last = kind === COMPRESSED ? Math.floor((host + compressedLength - 1) / size) : firstOld + count - 1
    if (kind !== UNMAPPED) {
      if (!this.#allocator.refcounts.atHand(firstOld)) return this.#allocator.refcounts.load(firstOld)
      if (!this.#allocator.refcounts.atHand(last)) return this.#allocator.refcounts.load(last)
    }
    this.#done = end - offset
    const wait = this.#tables.unlink(offset, count * size, this.#mayShowBacking(offset))
    if (wait !== undefined) {
      const freed = wait.then(() => (kind === UNMAPPED ? undefined : this.#freeOld(firstOld, last - firstOld + 1)))
      return this.#holding(offset, count, freed)
    }
    if (kind !== UNMAPPED) this.#allocator.free(firstOld, last - firstOld + 1)
    return undefined
  }

  /** Gives the offset an L2 table that belongs to this disk alone: a new one, or a copy of a shared one. */
  #makeTable(offset: number): Promise<void> {
    return this.#tableMutex.run(async () => {
      if (this.#tables.isWritable(offset)) return
      const l1Index = Math.floor(offset / this.#tables.tableReach)
      const old = this.#tables.tableAt(l1Index)
      const fresh = await this.#allocate(offset, 1)
      const place = fresh.cluster * this.#clusterSize
      await this.#orGiveBack([fresh], async () => {
        await this.#allocator.extendTo(fresh.cluster + 1)
        // A new cluster reads as zeros even after a crash, which is what an empty table is; a copy must be durable first.
        if (old !== 0) await this.#copyTable(old, place)
      })
      try {
        await this.#tables.setTable(l1Index, place)
      } catch (error) {
        this.#damaged(error)
      }
      if (old !== 0) await this.#freeOld(old / this.#clusterSize, 1)
    })
  }

  async #copyTable(old: number, place: number): Promise<void> {
    const bytes = new Uint8Array(this.#clusterSize)
    await this.#file.read(old, bytes.length, bytes, 0)
    // The old table keeps its references, so that none of the clusters is exclusive.
    for (let at = 0; at < bytes.length; at += this.#image.header.l2EntrySize) bytes[at] = (bytes[at] as number) & 0x7f
    await this.#file.write(place, bytes.length, bytes, 0)
    await this.#ordered()
  }

  async #allocate(offset: number, most: number): Promise<Replacement> {
    for (;;) {
      const cluster = this.#allocator.allocate(most)
      if (cluster >= 0) return { offset, cluster, count: this.#allocator.granted }
      await this.#allocator.prepare()
    }
  }

  /** Runs `work`; when it fails, nothing refers to the new clusters yet, and they are taken back. */
  async #orGiveBack(fresh: readonly Replacement[], work: () => Promise<void>): Promise<void> {
    try {
      await work()
    } catch (error) {
      for (const { cluster, count } of fresh) await this.#freeOld(cluster, count)
      throw error
    }
  }

  async #freeCompressed(host: number, length: number): Promise<void> {
    const first = Math.floor(host / this.#clusterSize)
    await this.#freeOld(first, Math.floor((host + length - 1) / this.#clusterSize) - first + 1)
  }

  /** Drops references. That they cannot be dropped costs space, which the next opening finds; the request stands. */
  async #freeOld(first: number, count: number): Promise<void> {
    try {
      await this.#allocator.freeLater(first, count)
    } catch {
      this.#allocator.isDamaged = true
    }
  }

  async #linkLoaded(fresh: Replacement): Promise<void> {
    while (!this.#tables.find(fresh.offset, 1)) await this.#tables.load(fresh.offset)
    await this.#link(fresh.offset, fresh.count, fresh.cluster)
  }

  /** A change of a table that fails may have reached the file or not, so that what is allocated is uncertain. */
  #link(offset: number, count: number, cluster: number): Pending {
    try {
      const size = this.#clusterSize
      return this.#tables.link(offset, count * size, cluster * size)?.catch((error) => this.#damaged(error))
    } catch (error) {
      return this.#damaged(error)
    }
  }

  #damaged(error: unknown): never {
    this.#allocator.isDamaged = true
    throw error
  }

  /** Keeps others from changing the mapping of the clusters until `wait` is over. */
  #holding(offset: number, count: number, wait: Pending): Pending {
    if (wait === undefined) return undefined
    const token = this.#lock(offset, count)
    return wait.finally(() => this.#locks.release(token))
  }

  #lock(offset: number, count: number): RangeToken {
    const token = this.#locks.tryAcquire(offset, count * this.#clusterSize, true)
    assert(token !== undefined, 'the clusters were found unlocked')
    return token
  }

  async #ordered(): Promise<void> {
    if (this.#failure !== undefined) throw this.#failure
    try {
      await this.#sync.run()
    } catch (error) {
      if (isBlockError(error, 'closed')) throw error
      const { path } = this.#file
      const message = `${path}: a sync failed, so that writes may be lost; close the image and open it again`
      this.#failure ??= new BlockError('io', message, { path }, error)
      throw this.#failure
    }
  }
}
