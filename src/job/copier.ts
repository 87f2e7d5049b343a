// The one loop of every job: copy the granules of a bitmap from a source to a target, while writes go on. It picks the next run
// of to-do granules, clears them, copies, and goes round until none is left. As a disk's interceptor it sees guest writes:
//
//   background   a write marks its granules, before it and again at its end: they are copied (again), and not done for good before
//   write-both   a write to granules already copied goes to the target too; overlapping copies and writes wait for each
//                other, so the to-do set only shrinks and the end is near, however fast the guest writes
//   yielding     the target is the disk itself: a write waits while its granules are copied, and what it wrote whole is no
//                longer to do
//
// A granule that a copy could not bring to the target is marked again. `checkpoint` makes progress durable: what was copied and
// has been flushed at the target, and was not touched since, is done for good.

import { CHECKPOINT_RANGES, COPY_PIECE } from '../base/limits.ts'
import { Breather, nextTurn } from '../base/breather.ts'
import { isZero } from '../base/bytes.ts'
import { Mutex, RangeLocks, type RangeToken } from '../base/mutex.ts'
import { divideUp, roundDown, roundUp } from '../base/round.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import type { ExtentVisitor, Pending } from '../block/device.ts'
import { MAY_UNMAP, ZERO } from '../block/device.ts'
import { type BufferPool, copyPool, pool } from '../block/pool.ts'
import { threadGuests } from '../block/thread-guests.ts'
import type { Change, Interceptor } from '../chain/disk.ts'
import type { Job } from './job.ts'

export interface CopySource {
  read(offset: number, length: number, into: Uint8Array, at: number): Pending
  extents(offset: number, length: number, visit: ExtentVisitor): Pending
}

export interface CopyTarget {
  write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending
  zero(offset: number, length: number, flags: number): Pending
}

/** Takes what is done for good out of a durable to-do set. */
export interface Settled {
  range(offset: number, length: number): Pending
  /** In memory before it returns: what is marked from then on stays. */
  many(granules: Bitmap): Promise<void>
}

/** A part of the to-do set, in bytes. */
interface Run {
  readonly offset: number
  readonly length: number
}

export type CopyMode = 'background' | 'write-both' | 'yielding'

export interface CopierOptions {
  readonly job: Job
  readonly source: CopySource
  readonly target: CopyTarget
  /** The to-do set; the copier clears and sets it. */
  readonly todo: Bitmap
  /** Called after each piece of a pass with what it was: releasing a view, noting progress, checkpoints. */
  readonly copied?: (offset: number, length: number) => Promise<void> | undefined
  /** Bytes of a piece; a power of two. COPY_PIECE unless told. */
  readonly piece?: number
  /** Pieces that are copied at once; 1 unless told. More of them share what a target waits for. */
  readonly lanes?: number
  /** How many of them in the pool while no guest of the thread asks for anything; one more is then copied within the call. None unless told. */
  readonly idleLanes?: number | undefined
  /** Bytes of a piece meanwhile, and while the job has no limit on its speed; as ever unless told. */
  readonly idlePiece?: number | undefined
  /** Smallest unit of the target's offsets and lengths, in bytes, at most a granule; 1 unless told. */
  readonly unit?: number
  /** Somebody waits for what is at the offset that this gives: it is copied first, when it is to do. */
  readonly first?: () => number | undefined
  /** Pieces in a row that may fail before a pass ends; it goes on with the next meanwhile. 1 unless told. */
  readonly failures?: number
  /** What guest writes mean at first; 'background' unless told. */
  readonly mode?: CopyMode
  /** Marks a range in the durable log; needed where the copier is attached to a disk, unless it yields. */
  readonly mark?: (offset: number, length: number) => Pending
}

export class Copier implements Interceptor {
  readonly #options: CopierOptions
  readonly #todo: Bitmap
  /** Copied since the last checkpoint, by pieces or by writes that went to both. */
  #copied: Bitmap
  /** One checkpoint at a time: a second one would take over what the first has not flushed. */
  readonly #checkpoints = new Mutex()
  readonly #locks = new RangeLocks()
  readonly #breather = new Breather()
  readonly #held = new Map<Change, RangeToken>()
  /** In the background: changes that have passed here and have not ended, whether a copy has seen them or not. */
  readonly #flying = new Set<Change>()
  #mode: CopyMode
  readonly #piece: number
  /** Pieces under way in the pool. */
  #pooled = 0
  /** Bytes moved by this copier: read from the source, and written to the target as data. */
  readBytes = 0
  writtenBytes = 0
  /** Bytes that pieces have brought to the target, and that guest writes have made to do again. */
  copiedBytes = 0
  dirtiedBytes = 0

  constructor(options: CopierOptions) {
    this.#options = options
    this.#todo = options.todo
    this.#mode = options.mode ?? 'background'
    this.#piece = options.piece ?? COPY_PIECE
    this.#copied = new Bitmap(options.todo.size, options.todo.granule)
  }

  /** Granules still to copy. */
  get todo(): Bitmap {
    return this.#todo
  }

  /** From now on writes to granules already copied go to the target too. The disk must be drained. */
  writeBoth(): void {
    this.#mode = 'write-both'
  }

  /** From now on writes mark what is to do again. The disk must be drained. */
  background(): void {
    this.#mode = 'background'
  }

  /** Detached from its disk: resolves when no write that passed here is on its way to the target any more. */
  async quiet(): Promise<void> {
    const { size } = this.#todo
    while (this.#locks.isBusy(0, size)) await this.#locks.whenIdle(0, size)
  }

  /** Something was copied since the last checkpoint. */
  get hasUnsettled(): boolean {
    return this.#copied.count > 0
  }

  get mode(): CopyMode {
    return this.#mode
  }

  /** One pass over the to-do set, from the disk's start to its end. When it fails, nothing of it is under way any more. */
  async pass(): Promise<void> {
    const { job, lanes = 1, idleLanes, idlePiece = this.#piece, failures: most = 1 } = this.#options
    const underWay = new Set<Promise<void>>()
    const failures: unknown[] = []
    let inARow = 0
    let position = 0
    let moved = 0
    try {
      while (inARow < most) {
        await job.pausePoint(moved)
        const isAlone = !job.isLimited && threadGuests.areIdle(performance.now())
        const mayHasten = idleLanes !== undefined && isAlone
        // One processor copies what its own cache holds, while others do in the pool what is worth waking them for.
        const isWithin = mayHasten && this.#pooled >= idleLanes
        const wanted = this.#wantedRun()
        const run = wanted ?? this.#nextRun(position, isAlone ? idlePiece : this.#piece)
        if (run === undefined) break
        if (wanted === undefined) position = run.offset + run.length
        moved = run.length
        const copied: Promise<void> = this.copyRange(run.offset, run.length, isWithin ? pool : copyPool)
          .then(
            () => void (inARow = 0),
            (error: unknown) => {
              inARow++
              failures[0] ??= error
            },
          )
          .finally(() => underWay.delete(copied))
        underWay.add(copied)
        if (underWay.size >= (mayHasten ? idleLanes + 1 : lanes)) await Promise.race(underWay)
        // The loop hears of what the pool has done only when it turns: else the other processors wait for this one.
        const breath = isWithin && this.#pooled > 0 ? nextTurn() : this.#breather.pause()
        if (breath !== undefined) await breath
      }
    } finally {
      await Promise.all(underWay)
    }
    if (failures.length > 0) throw failures[0]
  }

  /** Copies what is left while nothing is written: for the end of a job, under a drain. */
  async drainPass(): Promise<void> {
    for (let run = this.#nextRun(0, this.#piece); run !== undefined; ) {
      await this.copyRange(run.offset, run.length)
      run = this.#nextRun(run.offset + run.length, this.#piece)
    }
  }

  /** Copies one range of at most a piece, through buffers that say where. On failure its granules are to do again. */
  async copyRange(offset: number, length: number, buffers = copyPool): Promise<void> {
    if (buffers === copyPool) this.#pooled++
    const token = await this.#locks.acquire(offset, length, true)
    this.#todo.clear(offset, length)
    try {
      await this.#copyExtents(offset, length, buffers)
    } catch (error) {
      this.#todo.set(offset, length)
      throw error
    } finally {
      if (buffers === copyPool) this.#pooled--
      this.#locks.release(token)
    }
    this.#copied.set(offset, length)
    this.copiedBytes += length
    const noted = this.#options.copied?.(offset, length)
    if (noted !== undefined) await noted
  }

  /**
   * Flushes the target and then says through `settled` what need not be copied again, whatever crashes: what was copied
   * before the flush, less what was marked, copied or claimed since it began.
   */
  checkpoint(flush: () => Pending, settled?: Settled): Promise<void> {
    return this.#checkpoints.run(() => this.#settle(flush, settled))
  }

  async #settle(flush: () => Pending, settled: Settled | undefined): Promise<void> {
    const candidates = this.#copied
    this.#copied = new Bitmap(candidates.size, candidates.granule)
    try {
      await flush()
    } catch (error) {
      // What a failed flush was to bring to stable storage may be lost, and no later flush would say so.
      this.#todo.or(candidates)
      throw error
    }
    // A piece may have been copied since such a change passed here and before it reached the disk, where a crash would leave it.
    for (const { offset, length } of this.#flying) {
      if (candidates.hasAny(offset, length)) this.#copied.set(offset, length)
    }
    candidates.andNot(this.#todo)
    candidates.andNot(this.#copied)
    if (settled === undefined) return
    const ranges: number[] = []
    const most = CHECKPOINT_RANGES * 2
    candidates.runs(0, candidates.size, COPY_PIECE, (offset, length) => ranges.push(offset, length) <= most)
    if (ranges.length > most) return this.#settleMany(candidates, settled)
    for (let i = 0; i < ranges.length; i += 2) {
      const offset = ranges[i] as number
      const length = ranges[i + 1] as number
      // The loop may wait below: each range is asked anew whether it is still untouched.
      const touched = this.#locks.isBusy(offset, length) || this.#todo.hasAny(offset, length)
      if (touched || this.#copied.hasAny(offset, length)) this.#copied.set(offset, length)
      else {
        const pending = settled.range(offset, length)
        if (pending !== undefined) await pending
      }
    }
  }

  /** All at once, within this call. */
  async #settleMany(candidates: Bitmap, settled: Settled): Promise<void> {
    const claimed: number[] = []
    this.#locks.visitBusy((start, length) =>
      candidates.runs(start, start + length, length, (at, bytes) => claimed.push(at, bytes) > 0),
    )
    for (let i = 0; i < claimed.length; i += 2) {
      this.#copied.set(claimed[i] as number, claimed[i + 1] as number)
      candidates.clear(claimed[i] as number, claimed[i + 1] as number)
    }
    await settled.many(candidates)
  }

  before(change: Change): Pending {
    if (this.#mode === 'background') {
      this.#flying.add(change)
      this.#dirty(change)
      return undefined
    }
    const { granule } = this.#todo
    const start = roundDown(change.offset, granule)
    const length = roundUp(change.offset + change.length, granule) - start
    const token = this.#locks.tryAcquire(start, length, true)
    if (token !== undefined) {
      this.#held.set(change, token)
      return undefined
    }
    return this.#locks.acquire(start, length, true).then((late) => {
      this.#held.set(change, late)
    })
  }

  after(change: Change, succeeded: boolean): Pending {
    if (this.#mode === 'yielding') {
      if (succeeded && change.kind === 'write') this.#spare(change)
      this.#letGo(change)
      return undefined
    }
    if (this.#mode === 'background' || !this.#held.has(change)) {
      // A copy may have claimed and read these granules between the first mark and the write itself.
      this.#flying.delete(change)
      this.#dirty(change)
      return this.#options.mark?.(change.offset, change.length)
    }
    return this.#mirror(change, succeeded)
  }

  #dirty({ offset, length }: Change): void {
    this.dirtiedBytes += this.#todo.set(offset, length) * this.#todo.granule
  }

  /** Brings the target along with a write that the disk has done, then lets the range go. */
  async #mirror(change: Change, succeeded: boolean): Promise<void> {
    const { offset, length } = change
    try {
      if (!succeeded || this.#todo.hasAny(offset, length)) this.#todo.set(offset, length)
      else {
        await this.#apply(change)
        this.#copied.set(offset, length)
      }
    } catch {
      // The target's trouble is the job's, not the guest's: the copy loop meets it again and reports it.
      this.#todo.set(offset, length)
    } finally {
      this.#letGo(change)
    }
  }

  /** Granules that the guest wrote whole need no copy. */
  #spare({ offset, length }: Change): void {
    const { granule, size } = this.#todo
    const start = roundUp(offset, granule)
    const end = offset + length >= size ? size : roundDown(offset + length, granule)
    if (start >= end || !this.#todo.hasAny(start, end - start)) return
    this.#todo.clear(start, end - start)
    this.#copied.set(start, end - start)
  }

  #letGo(change: Change): void {
    const token = this.#held.get(change)
    this.#held.delete(change)
    if (token !== undefined) this.#locks.release(token)
  }

  #apply(change: Change): Pending {
    const { offset, length } = change
    const { unit = 1 } = this.#options
    const start = roundDown(offset, unit)
    const end = Math.min(roundUp(offset + length, unit), this.#todo.size)
    // The claim of the change covers whole granules, so what is around it stands still.
    if (end - start > length) return this.#copyExtents(start, end - start, copyPool)
    if (change.kind === 'write') return this.#options.target.write(offset, length, change.from, change.at, 0)
    // A trimmed block may read as before or as zeros, and both sides must agree: what the disk shows now decides.
    return change.kind === 'zero'
      ? this.#options.target.zero(offset, length, MAY_UNMAP)
      : this.#copyExtents(offset, length, copyPool)
  }

  /** What is to do of the next piece that somebody waits for. */
  #wantedRun(): { offset: number; length: number } | undefined {
    const { first } = this.#options
    if (first === undefined) return undefined
    for (let place = first(); place !== undefined; place = first()) {
      const run = this.#nextRun(place, this.#piece, place + this.#piece)
      if (run !== undefined) return run
    }
    return undefined
  }

  /** What is to do of the first piece from `position` on, when it begins before `before`. */
  #nextRun(position: number, piece: number, before: number = this.#todo.size): Run | undefined {
    const { granule, size, length } = this.#todo
    const last = Math.min(length, divideUp(before, granule))
    const first = this.#todo.nextSet(divideUp(position, granule), last)
    if (first >= last) return undefined
    const offset = first * granule
    // Cut at multiples of the piece, so that the target sees whole, aligned pieces where it can.
    const cut = roundDown(offset, piece) + piece
    const end = this.#todo.nextClear(first, Math.min(length, divideUp(cut, granule)))
    return { offset, length: Math.min(end * granule, cut, size) - offset }
  }

  /** Copies a range: what its source calls zero, in whole granules, as zeros; all else as data. */
  async #copyExtents(offset: number, length: number, buffers: BufferPool): Promise<void> {
    const pieces: number[] = []
    const pending = this.#options.source.extents(offset, length, (piece, extent) => pieces.push(piece, extent) > 0)
    if (pending !== undefined) await pending
    const { granule } = this.#todo
    const end = offset + length
    let position = offset
    let dataStart = offset
    for (let i = 0; i < pieces.length; i += 2) {
      const pieceEnd = position + (pieces[i] as number)
      const zeroStart = position === offset ? offset : roundUp(position, granule)
      const zeroEnd = pieceEnd === end ? end : roundDown(pieceEnd, granule)
      position = pieceEnd
      if (((pieces[i + 1] as number) & ZERO) === 0 || zeroStart >= zeroEnd) continue
      if (dataStart < zeroStart) await this.#copyData(dataStart, zeroStart - dataStart, buffers)
      const zeroed = this.#options.target.zero(zeroStart, zeroEnd - zeroStart, MAY_UNMAP)
      if (zeroed !== undefined) await zeroed
      dataStart = zeroEnd
    }
    if (dataStart < end) await this.#copyData(dataStart, end - dataStart, buffers)
  }

  async #copyData(offset: number, length: number, buffers: BufferPool): Promise<void> {
    const buffer = buffers.take(length)
    try {
      const read = this.#options.source.read(offset, length, buffer, 0)
      if (read !== undefined) await read
      this.readBytes += length
      const isAllZero = isZero(buffer, 0, length)
      const done = isAllZero
        ? this.#options.target.zero(offset, length, MAY_UNMAP)
        : this.#options.target.write(offset, length, buffer, 0, 0)
      if (done !== undefined) await done
      if (!isAllZero) this.writtenBytes += length
    } finally {
      buffers.give(buffer)
    }
  }
}
