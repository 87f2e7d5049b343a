// The durable bitmaps of one disk. A guest write marks here before it goes on; jobs clear what they have done; edits add, drop and
// merge bitmaps. docs/internals/dirty-log.md has the format and the argument why no bit is ever missing. This file decides
// when to log, to wait and to fold; the parts (areas, slots, hot regions, edits, recovery) are its neighbours.
//
// The order of the disk's writes is the caller's: it marks, waits, writes; and it edits while the disk is drained.

import { assert } from '../base/assert.ts'
import { DIRTYLOG_AREA, DIRTYLOG_FOLD_AT, DIRTYLOG_FOLD_MS, DIRTYLOG_HOT_REGIONS } from '../base/limits.ts'
import type { Pending } from '../block/device.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import type { HostFile } from '../host/host.ts'
import { Appends } from './appends.ts'
import { applyChanges, type BitmapChange, checkText, type Directory, type Entry, type LoggedBitmap } from './changes.ts'
import { type Durability, recordFor } from './durability.ts'
import { formatArea, LogArea } from './log-area.ts'
import type { Health, State } from './health.ts'
import { ignore, settled } from './outcome.ts'
import { type DirtyLogFiles, recordingOf, type Recovery, recover } from './recovery.ts'
import { HotRegions } from './regions.ts'
import { type SlotContent, writeSlot } from './slot.ts'
import { CLEAR, COLD_MARK, HEAT, MARK, RECORD_BYTES, type RecordKind } from './spec.ts'
import { systemTimer, type Timer } from './timer.ts'

export type { BitmapChange, DirtyLogFiles, Durability, Health, LoggedBitmap, Recovery, Timer }

export interface DirtyLogOptions {
  /** The host's boot id. */
  readonly bootId: string
  readonly timer?: Timer
}

/** A clear that waits until it can be logged. */
interface WaitingClear {
  readonly offset: number
  readonly length: number
  cancelled: boolean
}

export class DirtyLog {
  readonly #files: DirtyLogFiles
  readonly #options: DirtyLogOptions
  readonly #areas: readonly [LogArea, LogArea]
  readonly #regions: HotRegions
  #size: number
  #directory: Directory
  #recording: readonly Entry[] = []
  #state: State = { kind: 'open' }
  #health: Health = { state: 'good' }
  /** The epoch of new records, and that of the newest durable slot: equal, unless a fold is under way or failed. */
  #epoch: number
  #durableEpoch: number
  /** Edits made, and those that the newest durable slot includes. */
  #edits = 0
  #durableEdits = 0
  /** That of a clean close, until the first mark takes it back. */
  #stamp: string | undefined
  #folding: Promise<void> | undefined
  #foldsBegun = 0
  readonly #appends = new Appends()
  readonly #waitingClears: WaitingClear[] = []
  #stopTimer: (() => void) | undefined
  /** Nothing special is going on: a mark of granules that are set needs no more thought. */
  #calm = true

  private constructor(files: DirtyLogFiles, options: DirtyLogOptions, content: SlotContent) {
    this.#files = files
    this.#options = options
    this.#areas = [new LogArea(files.areas[0]), new LogArea(files.areas[1])]
    this.#size = content.size
    this.#directory = { entries: new Map(content.entries.map((entry) => [entry.name, entry])), nextId: content.nextId }
    this.#epoch = this.#durableEpoch = content.epoch
    this.#stamp = content.stamp
    this.#regions = new HotRegions(content.size, content.epoch, (epoch) => this.#syncArea(epoch))
    this.#area.begin(this.#epoch)
    this.#settle()
  }

  /**
   * Makes a new log, without bitmaps, for a disk of `size` bytes; what the files held is gone. `areaBytes`, a multiple of 32, is the
   * size of each log area. The log owns the files from now on.
   */
  static async create(
    files: DirtyLogFiles,
    options: DirtyLogOptions & { readonly size: number; readonly areaBytes?: number },
  ): Promise<DirtyLog> {
    const { size, bootId, areaBytes = DIRTYLOG_AREA } = options
    assert(areaBytes >= RECORD_BYTES && areaBytes % RECORD_BYTES === 0, 'an area holds whole records')
    for (const file of files.slots) {
      await file.truncate(0)
      await file.sync()
    }
    for (const file of files.areas) await formatArea(file, areaBytes)
    const content = { epoch: 0, bootId, stamp: undefined, size, start: 0, nextId: 1, entries: [] }
    const log = new DirtyLog(files, options, content)
    await log.#begin(undefined)
    return log
  }

  /**
   * Opens a log and makes what it recovered durable, so that the next crash starts from here. `stamp` is that of the last
   * clean close, if nothing was marked since. The log owns the files from now on. Fails with kind 'corrupt' when both slots are damaged.
   */
  static async open(
    files: DirtyLogFiles,
    options: DirtyLogOptions,
  ): Promise<{ log: DirtyLog; recovery: Recovery; stamp: string | undefined }> {
    const { recovery, content } = await recover(files, options.bootId)
    const stamp = recovery === 'clean' ? content.stamp : undefined
    if (recovery === 'clean' && content.bootId === options.bootId) {
      return { log: new DirtyLog(files, options, content), recovery, stamp }
    }
    // Two epochs may have records, one in each area. The next but one after them has its slot beside that of the first.
    const log = new DirtyLog(files, options, { ...content, epoch: content.epoch + 2, stamp })
    await log.#begin(stamp)
    return { log, recovery, stamp }
  }

  /** Bytes of the disk. */
  get size(): number {
    return this.#size
  }

  /** By name. */
  get bitmaps(): ReadonlyMap<string, LoggedBitmap> {
    return this.#directory.entries
  }

  get health(): Health {
    return this.#health
  }

  /**
   * A change of this range of the disk is about to be made: sets its granules in all recording bitmaps. The change may begin
   * when this is done. Fails when the log is closed or has failed: then the change must not be made.
   */
  mark(offset: number, length: number): Pending {
    // Also while no bitmap records: the first one then begins with what is written warm.
    this.#regions.touch(offset, length)
    if (!this.#calm) return this.#markWithCare(offset, length)
    for (const entry of this.#recording) {
      if (!entry.bits.hasAll(offset, length)) return this.#logMark(offset, length)
    }
    return this.#regions.busy || this.#appends.answered !== undefined ? this.#wait(offset, length) : undefined
  }

  /**
   * A job is done with this range: clears the granules that lie whole in it. Logged, not synced: a power loss may bring
   * them back. While an edit is not yet durable it waits; granules marked meanwhile stay set. Rejects when it could not be logged.
   */
  clear(name: string, offset: number, length: number): Pending {
    if (this.#state.kind === 'voiding') return this.#state.done.then(() => this.clear(name, offset, length))
    this.#checkWorks()
    const entry = this.#directory.entries.get(name)
    if (entry === undefined) throw new BlockError('not-found', `There is no bitmap "${name}" on this disk`)
    if (entry.state === 'void' || !entry.bits.hasAny(offset, length)) return undefined
    if (this.#edits !== this.#durableEdits || this.#isFull) return this.#clearLater(name, offset, length)
    const written = this.#append(CLEAR, entry.id, offset, length)
    if (this.#state.kind === 'open') entry.bits.clear(offset, length)
    this.#considerFold()
    return written
  }

  /**
   * Makes all of the changes, or none when one of them cannot be: kinds 'exists', 'not-found', 'invalid-argument'. They hold in memory before
   * this call returns; the promise resolves when they are durable. If it rejects because the log could not be written, they
   * hold in memory all the same, and are tried again with the next fold. After a crash before that, the bitmaps are as
   * before the edit, with all marks since.
   */
  async edit(changes: readonly BitmapChange[]): Promise<void> {
    this.#checkWorks()
    await this.#install(applyChanges(this.#directory, this.#size, changes))
  }

  /** As an edit: the disk has `size` bytes. What is added counts as changed in every bitmap. */
  async resize(size: number): Promise<void> {
    this.#checkWorks()
    const after = applyChanges(this.#directory, size, [])
    for (const entry of after.entries.values()) entry.bits = entry.bits.resized(size)
    this.#size = size
    this.#regions.resize(size)
    await this.#install(after)
  }

  /** Makes all bitmaps durable as they are, and all regions cold. After a failure of the log it tries again to void the bitmaps. */
  async fold(): Promise<void> {
    if (this.#state.kind === 'failed') await this.#void(this.#state.cause)
    else await this.#foldSoon()
  }

  /** Folds, leaves `stamp` (at most 4 KiB) for the next open, and closes the files. The disk must be drained. */
  async close(stamp: string): Promise<void> {
    if (this.#state.kind === 'closed') return
    checkText(stamp, 'stamp')
    try {
      while (this.#folding !== undefined) await settled(this.#folding)
      // Only an epoch without records has a stamp: that of a fold that failed must end first.
      if (this.#epoch !== this.#durableEpoch) await this.#beginFold()
      await this.#beginFold(stamp)
    } finally {
      await this.abandon()
    }
  }

  /** Closes the files and leaves them as they are, as the death of the process would. */
  async abandon(): Promise<void> {
    const before = this.#state
    this.#retire()
    if (before.kind === 'voiding') await settled(before.done)
    while (this.#folding !== undefined) await settled(this.#folding)
    for (const area of this.#areas) area.release()
    await Promise.all([...this.#files.areas, ...this.#files.slots].map((file) => file.close()))
  }

  /** The first fold. If it fails, the log never was, and the caller keeps its files. */
  async #begin(stamp: string | undefined): Promise<void> {
    try {
      await this.#beginFold(stamp)
    } catch (error) {
      this.#retire()
      throw error
    }
  }

  #retire(): void {
    this.#state = { kind: 'closed' }
    this.#stopTimer?.()
    this.#stopTimer = undefined
    this.#settle()
  }

  get #area(): LogArea {
    return this.#areas[this.#epoch % 2] as LogArea
  }

  /** Until a fold is done. */
  get #isFull(): boolean {
    return this.#area.position >= this.#area.capacity
  }

  #markWithCare(offset: number, length: number): Pending {
    if (this.#state.kind === 'voiding') return this.#state.done.then(() => this.mark(offset, length))
    this.#checkWorks()
    for (const clear of this.#waitingClears) {
      if (clear.offset < offset + length && offset < clear.offset + clear.length) clear.cancelled = true
    }
    const mustLog = this.#stamp !== undefined || this.#edits !== this.#durableEdits
    if (mustLog || this.#recording.some(({ bits }) => !bits.hasAll(offset, length)))
      return this.#logMark(offset, length)
    return this.#wait(offset, length)
  }

  #logMark(offset: number, length: number): Pending {
    const needed = this.#calm ? recordFor(this.#recording, offset, length) : 'host'
    if (needed === 'none') {
      for (const entry of this.#recording) entry.bits.set(offset, length)
      return this.#wait(offset, length)
    }
    const isCold = needed === 'host' && this.#regions.isCold(offset, length)
    if (this.#isFull || (isCold && this.#regions.count >= DIRTYLOG_HOT_REGIONS)) {
      return this.#makeRoom().then(() => this.mark(offset, length))
    }
    const written = this.#append(isCold ? COLD_MARK : MARK, 0, offset, length)
    if (this.#state.kind !== 'open') return written
    for (const entry of this.#recording) entry.bits.set(offset, length)
    const pending = isCold ? this.#regions.heat(offset, length) : this.#wait(offset, length)
    this.#considerFold()
    return pending
  }

  /** Waits for what was logged before for this range. */
  #wait(offset: number, length: number): Pending {
    const synced = this.#regions.wait(offset, length)
    const { answered } = this.#appends
    if (synced === undefined || answered === undefined) return synced ?? answered
    return Promise.all([synced, answered]).then(() => undefined)
  }

  async #clearLater(name: string, offset: number, length: number): Promise<void> {
    const clear: WaitingClear = { offset, length, cancelled: false }
    this.#waitingClears.push(clear)
    this.#settle()
    try {
      await (this.#folding ?? this.#foldSoon())
    } finally {
      this.#waitingClears.splice(this.#waitingClears.indexOf(clear), 1)
      this.#settle()
    }
    if (clear.cancelled || !this.#directory.entries.has(name)) return
    const pending = this.clear(name, offset, length)
    if (pending !== undefined) await pending
  }

  /** Appends a record; there is room. A failure voids the bitmaps, and what is returned waits for that. */
  #append(kind: RecordKind, bitmap: number, offset: number, length: number): Pending {
    let written: Pending
    try {
      written = this.#area.append(kind, bitmap, offset, length)
    } catch (error) {
      return this.#void(error)
    }
    this.#stopTimer ??= this.#startTimer()
    if (written === undefined) return undefined
    return this.#appends.add(written, (error) => this.#void(error))
  }

  async #syncArea(epoch: number): Promise<void> {
    try {
      await this.#appends.answered
      await (this.#areas[epoch % 2] as LogArea).file.sync()
    } catch (error) {
      return this.#void(error)
    }
    if (this.#stamp === undefined) return
    this.#stamp = undefined
    this.#settle()
  }

  #install(after: Directory): Promise<void> {
    const known = new Map(Array.from(this.#directory.entries.values(), (entry) => [entry.id, entry]))
    const entries = new Map<string, Entry>()
    for (const [name, entry] of after.entries) {
      const old = known.get(entry.id)
      entries.set(name, old === undefined ? entry : Object.assign(old, entry))
    }
    this.#directory = { entries, nextId: after.nextId }
    this.#edits++
    this.#settle()
    return this.#foldSoon()
  }

  /** Draws the conclusions from a change of state. */
  #settle(): void {
    this.#recording = recordingOf(this.#directory.entries.values())
    const isOpen = this.#state.kind === 'open' && this.#stamp === undefined
    this.#calm = isOpen && this.#edits === this.#durableEdits && this.#waitingClears.length === 0
  }

  #checkWorks(): void {
    if (this.#state.kind === 'failed') throw this.#state.cause
    if (this.#state.kind !== 'closed') return
    const { path } = this.#area.file
    throw new BlockError('closed', `The dirty log ${path} is closed`, { path })
  }

  #startTimer(): () => void {
    return (this.#options.timer ?? systemTimer)(DIRTYLOG_FOLD_MS, () => {
      this.#stopTimer = undefined
      ignore(this.#foldSoon())
    })
  }

  #considerFold(): void {
    const isDue =
      this.#regions.count >= DIRTYLOG_HOT_REGIONS || this.#area.position >= DIRTYLOG_FOLD_AT * this.#area.capacity
    const isPossible = this.#state.kind === 'open' && this.#epoch === this.#durableEpoch && this.#folding === undefined
    if (isDue && isPossible) ignore(this.#beginFold())
  }

  /** For marks that find the area full: a fold must succeed now. */
  async #makeRoom(): Promise<void> {
    try {
      await (this.#folding ?? this.#beginFold())
    } catch (error) {
      if (this.#state.kind === 'open') await this.#void(error)
    }
  }

  /** A fold that begins at this moment or later; all that wait for the end of one share the next. */
  async #foldSoon(): Promise<void> {
    const begun = this.#foldsBegun
    while (this.#folding !== undefined && this.#foldsBegun === begun) await settled(this.#folding)
    await (this.#folding ?? this.#beginFold())
  }

  /** Begins an epoch, unless the fold before failed and its epoch still goes on, and writes its slot. */
  #beginFold(stamp?: string): Promise<void> {
    assert(this.#folding === undefined, 'one fold at a time')
    if (this.#state.kind === 'voiding') return this.#state.done.then(() => this.#foldSoon())
    try {
      this.#checkWorks()
    } catch (error) {
      return Promise.reject(error as Error)
    }
    if (this.#epoch === this.#durableEpoch) {
      this.#beginEpoch(this.#epoch + 1)
      // A log that is closed has no next write.
      if (stamp === undefined) this.#keepHot()
    }
    this.#foldsBegun++
    const edits = this.#edits
    this.#folding = this.#writeSlot(this.#epoch, stamp).then(
      () => {
        this.#folding = undefined
        this.#durableEdits = edits
        if (this.#health.state === 'late') this.#health = { state: 'good' }
        this.#stamp = this.#area.position === 0 ? stamp : undefined
        this.#settle()
      },
      (error: unknown) => {
        this.#folding = undefined
        const cause = toBlockError(error, 'The bitmaps could not be written')
        if (this.#health.state === 'good') this.#health = { state: 'late', cause }
        if (this.#state.kind === 'open') this.#stopTimer ??= this.#startTimer()
        throw cause
      },
    )
    return this.#folding
  }

  #beginEpoch(epoch: number): void {
    assert(epoch < 2 ** 32, 'an epoch fits its 32 bits')
    this.#epoch = epoch
    this.#area.begin(epoch)
    this.#regions.begin(epoch)
    this.#stopTimer?.()
    this.#stopTimer = undefined
  }

  /**
   * Makes the regions hot that were written lately, all by one sync: their next writes will hardly wait. After a power loss they
   * count as written. As many as leave room for what else is written.
   */
  #keepHot(): void {
    if (this.#state.kind !== 'open' || !this.#recording.some(({ durability }) => durability === 'host')) return
    this.#regions.visitRecent(this.#area.capacity, (offset, length) => {
      const written = this.#append(HEAT, 0, offset, length)
      if (this.#state.kind !== 'open') return false
      ignore(this.#regions.heat(offset, length))
      if (written !== undefined) ignore(written)
      return true
    })
  }

  async #writeSlot(epoch: number, stamp: string | undefined): Promise<void> {
    const { nextId } = this.#directory
    const entries = Array.from(this.#directory.entries.values(), (entry) => ({ ...entry }))
    const { bootId } = this.#options
    const content = { epoch, bootId, stamp, size: this.#size, start: this.#area.position, nextId, entries }
    const late = this.#appends.over
    await writeSlot(this.#files.slots[epoch % 2] as HostFile, content)
    // A record that is written so late would come over one of the next epoch but one, which has the same area.
    await late
    this.#durableEpoch = epoch
  }

  /** The log broke: nothing that it holds can be relied on. Resolves when that is durable; rejects when it cannot be made so. */
  #void(error: unknown): Promise<void> {
    if (this.#state.kind === 'voiding') return this.#state.done
    if (this.#state.kind === 'closed')
      return Promise.reject(toBlockError(error, 'The dirty log failed after its close'))
    const cause = toBlockError(error, 'The dirty log could not be written')
    for (const entry of this.#directory.entries.values()) {
      entry.state = 'void'
      entry.bits.setAll()
    }
    this.#edits++
    const done = this.#writeVoid(cause)
    ignore(done)
    this.#state = { kind: 'voiding', done }
    this.#settle()
    return done
  }

  async #writeVoid(cause: BlockError): Promise<void> {
    while (this.#folding !== undefined) await settled(this.#folding)
    // Beside the durable slot first; then over it, since what it says is not true any more.
    const isBeside = (this.#epoch + 1) % 2 !== this.#durableEpoch % 2
    const first = this.#epoch + (isBeside ? 1 : 2)
    for (const epoch of [first, first + 1]) {
      this.#beginEpoch(epoch)
      const edits = this.#edits
      try {
        await this.#writeSlot(epoch, undefined)
      } catch {
        continue
      }
      this.#durableEdits = edits
      this.#stamp = undefined
      this.#end({ kind: 'open' }, { state: 'voided', cause })
      return
    }
    const failure = new BlockError(
      'io',
      `Cannot keep the disk's bitmaps, nor say that they are lost: ${cause.message}`,
      {},
      cause,
    )
    this.#end({ kind: 'failed', cause: failure }, { state: 'failed', cause: failure })
    throw failure
  }

  #end(state: State, health: Health): void {
    if (this.#state.kind === 'closed') return
    this.#state = state
    this.#health = health
    this.#settle()
  }
}
