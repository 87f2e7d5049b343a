// A frozen, readable view of a disk while its guest goes on writing. Before a guest's write, zero or trim changes a granule
// that the backup still needs, the old granule goes into scratch, once (copy-before-write). The backup reads each granule from
// scratch when it was saved, else from the disk, and releases it when it has it.
//
//   guest write --> needed? --> save old granule --> write goes on        reader --> saved? scratch : disk
//                   claim         claim ends                              shared claim while it reads the disk
//
// A claim is a range lock: a second writer waits for the save in flight, a writer waits for a reader of the disk below it.
// When a save fails, or scratch is full, the view breaks and the guest goes on: it never waits for a backup's trouble.

import { assert } from '../base/assert.ts'
import { nextTurn } from '../base/breather.ts'
import { SCRATCH_READ_ROW } from '../base/limits.ts'
import { RangeLocks } from '../base/mutex.ts'
import { divideUp } from '../base/round.ts'
import type { Bitmap } from '../bitmap/bitmap.ts'
import { type BlockDevice, type Capabilities, type ExtentVisitor, HOLE, type Pending, ZERO } from '../block/device.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import { pool } from '../block/pool.ts'
import type { Change, Disk, Interceptor } from './disk.ts'
import type { Scratch } from './scratch.ts'

/** Most bytes that one read of the disk saves at a time. */
const SAVE_PIECE = 1024 * 1024

export class PointInTime implements Interceptor, BlockDevice {
  readonly name: string
  readonly size: number
  readonly can: Capabilities
  readonly #disk: Disk
  readonly #scratch: Scratch
  /** What the backup still needs and scratch does not hold: these granules are saved before they change. */
  readonly #unsaved: Bitmap
  /** What the backup still needs; anything else reads as an error. */
  readonly #needed: Bitmap
  readonly #claims = new RangeLocks()
  #broken: BlockError | undefined
  #closed = false
  /** Bytes that were saved in all, and the most that scratch held at one time. */
  savedBytes = 0
  scratchPeak = 0

  /**
   * The moment is the call: the disk must be drained. `needed` has the granules that the backup will read, at the scratch's
   * granule; it is the view's from now on.
   */
  constructor(disk: Disk, scratch: Scratch, needed: Bitmap) {
    assert(disk.drained, 'a point in time is taken under a drain')
    assert(needed.granule === scratch.granule && needed.size === disk.size, 'one granule for scratch and bitmap')
    this.name = `${disk.name} (point in time)`
    this.size = disk.size
    this.can = { ...disk.can, write: false, fua: 'none', zero: 'none', trim: 'none' }
    this.#disk = disk
    this.#scratch = scratch
    this.#needed = needed
    this.#unsaved = needed.copy()
    disk.attach(this)
  }

  /** Why the view can no longer be read; undefined while it can. */
  get broken(): BlockError | undefined {
    return this.#broken
  }

  before(change: Change): Pending {
    const { granule } = this.#scratch
    const first = Math.floor(change.offset / granule)
    const end = Math.min(this.#unsaved.length, divideUp(change.offset + change.length, granule))
    const start = first * granule
    const length = end * granule - start
    if (this.#claims.idle || !this.#claims.isBusy(start, length)) {
      if (this.#unsaved.nextSet(first, end) >= end) return undefined
      const pending = this.#save(first, end)
      if (pending === undefined) return undefined
      // Nobody else came between: a save that is done within the call needs no claim.
      const claim = this.#claims.tryAcquire(start, length, true)
      assert(claim !== undefined, 'a range that is not busy can be claimed')
      return pending.finally(() => this.#claims.release(claim))
    }
    return this.#saveAfterClaim(first, end, start, length)
  }

  after(_change: Change, _succeeded: boolean): Pending {
    return undefined
  }

  /** Reads the disk as it was. Kind 'io' with the reason when the view broke, 'invalid-argument' outside what is needed. */
  async read(offset: number, length: number, into: Uint8Array, at: number): Promise<void> {
    this.#checkReadable(offset, length)
    // Past the gate first, then the claim: a writer that a drain waits for may be waiting for this claim.
    await this.#disk.admit(async () => {
      const claim = await this.#claims.acquire(offset, length, false)
      try {
        await this.#readClaimed(offset, offset + length, into, at - offset)
      } finally {
        this.#claims.release(claim)
      }
    })
    // What was released meanwhile may have been overwritten.
    this.#checkReadable(offset, length)
  }

  /** The backup has the range: its scratch is free again and its granules are no longer saved. */
  release(offset: number, length: number): void {
    const first = Math.floor(offset / this.#scratch.granule)
    const end = Math.min(this.#needed.length, divideUp(offset + length, this.#scratch.granule))
    this.#needed.clearGranules(first, end)
    this.#unsaved.clearGranules(first, end)
    this.#scratch.free(first, end)
  }

  /** Says that only these granules are needed after all; what scratch holds of the others is free again. */
  restrict(needed: Bitmap): void {
    const unneeded = this.#needed.copy()
    unneeded.andNot(needed)
    const { granule } = this.#scratch
    unneeded.runs(0, this.size, this.size, (offset, length) => {
      this.release(offset, divideUp(length, granule) * granule)
      return true
    })
  }

  /** Extents at the moment: what was saved is data; for the rest the disk answers, since it did not change. */
  async extents(offset: number, length: number, visit: ExtentVisitor): Promise<void> {
    this.#check()
    const { granule } = this.#scratch
    const pieces: [number, number][] = []
    await this.#disk.extents(offset, length, (piece, extent) => pieces.push([piece, extent]) > 0)
    let position = offset
    for (const [piece, extent] of pieces) {
      const pieceEnd = position + piece
      while (position < pieceEnd) {
        // What is a hole now and was saved was data at the moment: the guest trimmed it since.
        const isHole = (extent & (HOLE | ZERO)) !== 0
        const endGranule = divideUp(pieceEnd, granule)
        const saved = isHole ? this.#scratch.nextSaved(Math.floor(position / granule), endGranule) : endGranule
        const plainEnd = Math.min(pieceEnd, Math.max(position, saved * granule))
        if (plainEnd > position && !visit(plainEnd - position, extent)) return
        position = plainEnd
        const savedEnd = Math.min(pieceEnd, (saved + 1) * granule)
        if (saved < endGranule && savedEnd > position) {
          if (!visit(savedEnd - position, 0)) return
          position = savedEnd
        }
      }
    }
  }

  write(): Pending {
    throw this.#readOnly()
  }

  zero(): Pending {
    throw this.#readOnly()
  }

  trim(): Pending {
    throw this.#readOnly()
  }

  flush(): Pending {
    return undefined
  }

  /** Flushes the disk itself: what it had at the moment is then on stable storage. */
  flushDisk(): Pending {
    return this.#disk.flush()
  }

  /** Ends the view: the guest's writes no longer pass through it, and scratch is given back. */
  async close(): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    this.#disk.detach(this)
    this.#needed.clearAll()
    this.#unsaved.clearAll()
    // A save or read in flight still uses the scratch file: it ends first.
    this.#claims.release(await this.#claims.acquire(0, Number.MAX_SAFE_INTEGER, true))
    await this.#scratch.close()
  }

  async #saveAfterClaim(first: number, end: number, start: number, length: number): Promise<void> {
    const claim = await this.#claims.acquire(start, length, true)
    try {
      await this.#save(first, end)
    } finally {
      this.#claims.release(claim)
    }
  }

  /** Saves the unsaved granules of a claimed range. Never fails: what goes wrong breaks the view. */
  #save(first: number, end: number): Pending {
    let index = this.#unsaved.nextSet(first, end)
    while (index < end) {
      const runEnd = this.#unsaved.nextClear(index, Math.min(end, index + SAVE_PIECE / this.#scratch.granule))
      const pending = runEnd === index + 1 ? this.#saveOne(index) : this.#saveRun(index, runEnd)
      if (pending !== undefined) return pending.then(() => this.#save(runEnd, end))
      index = this.#unsaved.nextSet(runEnd, end)
    }
    return undefined
  }

  /** What most writes take: the disk is read straight into scratch's memory. */
  #saveOne(index: number): Pending {
    const slot = this.#scratch.take()
    if (slot === undefined) return this.#saveRun(index, index + 1)
    const { granule } = this.#scratch
    const offset = index * granule
    const length = Math.min(granule, this.size - offset)
    let pending: Pending
    try {
      pending = this.#disk.chain.read(offset, length, this.#scratch.slabOf(slot), this.#scratch.placeOf(slot))
      if (pending === undefined) {
        this.#keep(index, slot, length)
        return undefined
      }
    } catch (error) {
      this.#scratch.leave(slot)
      this.#break(error)
      return undefined
    }
    return pending.then(
      () => this.#keep(index, slot, length),
      (error: unknown) => {
        this.#scratch.leave(slot)
        this.#break(error)
      },
    )
  }

  #keep(index: number, slot: number, length: number): void {
    try {
      this.#scratch.keep(index, slot, length)
    } catch (error) {
      return this.#break(error)
    }
    this.#noteSaved(index, length)
  }

  #saveRun(first: number, end: number): Pending {
    const { granule } = this.#scratch
    const offset = first * granule
    const length = Math.min(end * granule, this.size) - offset
    const buffer = pool.take(length)
    let pending: Pending
    try {
      pending = this.#disk.chain.read(offset, length, buffer, 0)
      if (pending === undefined) pending = this.#store(first, end, length, buffer)
      else pending = pending.then(() => this.#store(first, end, length, buffer))
    } catch (error) {
      this.#break(error)
    }
    if (pending === undefined) {
      pool.give(buffer)
      return undefined
    }
    return pending.then(
      () => pool.give(buffer),
      (error: unknown) => this.#break(error),
    )
  }

  /** Puts a run that was read into scratch; a granule counts as saved only once its bytes are there. */
  #store(first: number, end: number, length: number, buffer: Uint8Array): Pending {
    const { granule } = this.#scratch
    for (let index = first; index < end; index++) {
      const at = (index - first) * granule
      const piece = Math.min(granule, length - at)
      const pending = this.#scratch.save(index, buffer, at, piece)
      if (pending !== undefined) {
        return pending.then(() => {
          this.#noteSaved(index, piece)
          return this.#store(index + 1, end, length - at - granule, buffer.subarray(at + granule))
        })
      }
      this.#noteSaved(index, piece)
    }
    return undefined
  }

  #noteSaved(index: number, length: number): void {
    this.#unsaved.clearGranules(index, index + 1)
    this.savedBytes += length
    this.scratchPeak = this.#scratch.peak
    // Released while the save was in flight: nobody will free it again.
    if (!this.#needed.has(index)) this.#scratch.free(index, index + 1)
  }

  #break(error: unknown): void {
    this.#broken ??= toBlockError(error, `${this.name}: saving old data`, { device: this.name })
    this.#unsaved.clearAll()
  }

  #check(): void {
    if (this.#closed) throw new BlockError('closed', `${this.name} is closed`, { device: this.name })
    if (this.#broken === undefined) return
    throw new BlockError(
      this.#broken.kind,
      `${this.name} broke: ${this.#broken.message}`,
      this.#broken.place,
      this.#broken,
    )
  }

  #checkReadable(offset: number, length: number): void {
    this.#check()
    if (this.#needed.hasAll(offset, length)) return
    const message = `${this.name}: ${length} bytes at ${offset} are not part of this backup, or already released`
    throw new BlockError('invalid-argument', message, { device: this.name, offset, length })
  }

  #readOnly(): BlockError {
    return new BlockError('read-only', `${this.name} is read-only`, { device: this.name })
  }

  /** Reads a claimed range piece by piece: saved granules from scratch, the others from the disk. */
  async #readClaimed(offset: number, end: number, into: Uint8Array, shift: number): Promise<void> {
    const { granule } = this.#scratch
    let position = offset
    let row = 0
    while (position < end) {
      // Before it is asked where a granule is: that may change meanwhile.
      if (row === SCRATCH_READ_ROW) {
        row = 0
        await nextTurn()
      }
      const index = Math.floor(position / granule)
      if (this.#scratch.has(index)) {
        row++
        const pieceEnd = Math.min(end, (index + 1) * granule)
        const pending = this.#scratch.read(
          index,
          position - index * granule,
          pieceEnd - position,
          into,
          position + shift,
        )
        if (pending !== undefined) await pending
        position = pieceEnd
        continue
      }
      const saved = this.#scratch.nextSaved(index, divideUp(end, granule))
      const pieceEnd = Math.min(end, saved * granule)
      const pending = this.#disk.chain.read(position, pieceEnd - position, into, position + shift)
      if (pending !== undefined) await pending
      position = pieceEnd
    }
  }
}
