// Whose turn it is to be backed up. Backups of all threads wait here, in one line: so many machines at a time as the host's limits say,
// queued ones only within a window, and none whose expected scratch does not fit beside those that run. Everyone hears why it waits.
// Nothing of it is kept: a backup that waits has its row in the catalog, and a restart has it wait again.
//
//   take -> waiting --its turn--> running --give--> gone
//              +------give (cancelled, daemon stops)--^

import { type Clock, systemClock } from '../base/clock.ts'
import { DailyWindows } from '../base/daily-windows.ts'
import { QUEUE_LOOK_MS, QUEUE_WINDOW_LOOK_MS } from '../base/limits.ts'
import { formatSize } from '../base/size.ts'
import { BlockError } from '../block/error.ts'
import type { HostLimits } from './host-limits.ts'

/** A backup that wants its turn. */
export interface TurnWish {
  /** Of the job. */
  readonly id: string
  readonly machine: string
  readonly disks: readonly string[]
  readonly full: boolean
  /** Smaller ones first. */
  readonly place: number
  /** It begins only within a window. */
  readonly queued: boolean
}

/** What a backup hears of its turn. */
export interface TurnEvents {
  /** Why it has to wait; undefined when it waits no longer. */
  waits(reason: string | undefined): void
  /** Its window has closed, and it is to end. */
  over(error: BlockError): void
}

/** Who says whose turn it is. */
export interface Turn {
  /** Resolves when it is the backup's turn, or its turn was given back before. */
  take(wish: TurnWish, events: TurnEvents): Promise<void>
  /** Gives the turn back, or stops waiting for it; nothing for one that did neither. */
  give(id: string): void
}

export interface QueueOptions {
  readonly limits: () => HostLimits
  /** Bytes of scratch that are in use, by whomever. */
  readonly scratchUsed: () => number
  /** Bytes of scratch that a backup is expected to take. */
  readonly expected: (wish: TurnWish) => number
  readonly clock?: Pick<Clock, 'wall'>
}

interface Entry {
  readonly wish: TurnWish
  readonly events: TurnEvents
}

interface Waiting extends Entry {
  readonly go: () => void
  told: string | undefined
}

interface RunningBackup extends Entry {
  /** Scratch that is kept free for it. */
  readonly expected: number
}

/** Why a backup waits, and whether those behind it do too. */
interface Obstacle {
  readonly reason: string
  readonly forAll: boolean
  /** It may go away without a word: scratch is given back by views, too. */
  readonly silent?: boolean
}

export class BackupQueue implements Turn {
  readonly #options: QueueOptions
  readonly #clock: Pick<Clock, 'wall'>
  #waiting: readonly Waiting[] = []
  readonly #running = new Map<string, RunningBackup>()
  #timer: NodeJS.Timeout | undefined

  constructor(options: QueueOptions) {
    this.#options = options
    this.#clock = options.clock ?? systemClock
  }

  /** Jobs that have their turn, and how many wait. */
  get running(): readonly TurnWish[] {
    return [...this.#running.values()].map(({ wish }) => wish)
  }

  get waiting(): number {
    return this.#waiting.length
  }

  take(wish: TurnWish, events: TurnEvents): Promise<void> {
    return new Promise((go) => {
      const entry: Waiting = { wish, events, go, told: undefined }
      this.#waiting = [...this.#waiting, entry].toSorted((a, b) => a.wish.place - b.wish.place)
      this.look()
    })
  }

  give(id: string): void {
    const waiting = this.#waiting.find(({ wish }) => wish.id === id)
    if (waiting === undefined && !this.#running.has(id)) return
    this.#running.delete(id)
    this.#waiting = this.#waiting.filter((other) => other !== waiting)
    waiting?.go()
    this.look()
  }

  /** Lets go whoever may, and tells the others why they wait. To be called when limits changed. */
  look(): void {
    clearTimeout(this.#timer)
    const limits = this.#options.limits()
    const windows = DailyWindows.parse(limits.windows)
    const nowMs = this.#clock.wall()
    const isOpen = windows?.isOpen(nowMs) ?? true
    if (!isOpen && limits.windowEnd === 'break') this.#breakQueued()
    const closed = isOpen ? undefined : `the window ${limits.windows.join(', ')} opens ${when(windows, nowMs)}`
    let ahead: string | undefined
    let lookMs = this.#windowLookMs(windows, nowMs)
    for (const entry of this.#waiting) {
      const obstacle: Obstacle | undefined =
        entry.wish.queued && closed !== undefined
          ? { reason: closed, forAll: false }
          : ahead === undefined
            ? this.#obstacle(entry.wish, limits)
            : { reason: ahead, forAll: true }
      if (obstacle === undefined) this.#admit(entry)
      else {
        tell(entry, obstacle.reason)
        if (obstacle.silent === true) lookMs = QUEUE_LOOK_MS
        if (obstacle.forAll) ahead ??= `its turn comes after ${entry.wish.machine}, which waits`
      }
    }
    if (lookMs !== undefined) this.#timer = setTimeout(() => this.look(), lookMs).unref()
  }

  #obstacle({ disks, machine, ...wish }: TurnWish, { machines, scratchHostBytes }: HostLimits): Obstacle | undefined {
    const running = [...this.#running.values()]
    const names = running.map((other) => other.wish.machine).join(', ')
    if (running.length >= machines)
      return { reason: `${machines} at a time: its turn comes after ${names}`, forAll: true }
    const rival = running.find((other) => other.wish.disks.some((disk) => disks.includes(disk)))
    if (rival !== undefined) return { reason: `job ${rival.wish.id} backs up the same disk`, forAll: false }
    const used = this.#options.scratchUsed()
    // Alone it begins whatever is expected: else it never would, and the budget is kept in any case.
    if (running.length === 0 && used === 0) return undefined
    const kept = running.reduce((sum, { expected }) => sum + expected, 0)
    const free = Math.max(0, scratchHostBytes - Math.max(used, kept))
    const expected = this.#options.expected({ disks, machine, ...wish })
    if (expected <= free) return undefined
    const reason = `it is expected to take ${formatSize(expected)} of scratch, and ${formatSize(free)} of ${formatSize(scratchHostBytes)} are free`
    return { reason, forAll: true, silent: true }
  }

  #admit(entry: Waiting): void {
    const { wish, events, go } = entry
    this.#waiting = this.#waiting.filter((other) => other !== entry)
    this.#running.set(wish.id, { wish, events, expected: this.#options.expected(wish) })
    tell(entry, undefined)
    go()
  }

  #breakQueued(): void {
    for (const { wish, events } of this.#running.values()) {
      if (!wish.queued) continue
      events.over(new BlockError('timeout', `the window closed before the backup of ${wish.machine} was done`))
    }
  }

  /** When to look again because of the windows; undefined when they hold nobody. */
  #windowLookMs(windows: DailyWindows | undefined, nowMs: number): number | undefined {
    const opening = windows?.nextOpening(nowMs)
    const concerned = this.#waiting.some(({ wish }) => wish.queued) || this.running.some(({ queued }) => queued)
    return opening === undefined || !concerned ? undefined : Math.min(QUEUE_WINDOW_LOOK_MS, opening - nowMs)
  }
}

function tell(entry: Waiting, reason: string | undefined): void {
  if (entry.told === reason) return
  entry.told = reason
  entry.events.waits(reason)
}

function when(windows: DailyWindows | undefined, nowMs: number): string {
  const opening = windows?.nextOpening(nowMs)
  return opening === undefined ? 'never' : `at ${new Date(opening).toLocaleString('sv')}`
}
