// What every long-running work has: a state, verbs that are legal in it, progress, a speed limit, pausing. Two tables
// decide everything: which state may follow which, and which verb may be said in which state. What the work is, is in
// the other files of this room.
//
//   created -> running ------> ready -> finalizing -> concluded
//               |  ^ |  ^       |  ^        |
//            paused  pending  standby       +--> aborting -> concluded

import { assert } from '../base/assert.ts'
import { type Clock, systemClock } from '../base/clock.ts'
import { SPEED_BURST_MS } from '../base/limits.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import type { BandwidthShare } from './bandwidth.ts'
import type { Courtesy, GuestStatus } from './courtesy.ts'
import { RestTime } from './rest-time.ts'
import { type ErrorPolicy, type JobKind, type JobTerms, TERMS } from './terms.ts'

/** Which state may follow which. */
export const MOVES = {
  created: ['running', 'aborting'], // known, not begun
  running: ['paused', 'pending', 'ready', 'finalizing', 'aborting'], // copying
  paused: ['running', 'aborting'], // told to stop copying for now, or stopped by an error that can be mended
  ready: ['standby', 'finalizing', 'aborting'], // source and target are equal and kept so
  pending: ['running', 'aborting'], // all is done but its effect, which the user is to say
  standby: ['ready', 'aborting'], // paused while ready
  finalizing: ['concluded', 'aborting'], // making the result take effect
  aborting: ['concluded'], // undoing
  concluded: [], // ended, with success or an error
} as const satisfies Record<string, readonly string[]>

export type JobState = keyof typeof MOVES

/** Which verb may be said in which state. */
export const VERBS = {
  pause: ['running', 'ready'],
  resume: ['paused', 'standby'],
  cancel: ['created', 'running', 'paused', 'pending', 'ready', 'standby'],
  finalize: ['pending'],
  complete: ['ready'],
  'set-speed': ['created', 'running', 'paused', 'pending', 'ready', 'standby'],
} as const satisfies Record<string, readonly JobState[]>

export type JobVerb = keyof typeof VERBS

/** The verbs that need nothing besides. */
export const PLAIN_VERBS = ['pause', 'resume', 'cancel', 'finalize'] as const satisfies readonly JobVerb[]
export type PlainVerb = (typeof PLAIN_VERBS)[number]

export function mayMove(from: JobState, to: JobState): boolean {
  return (MOVES[from] as readonly JobState[]).includes(to)
}

/** The verbs that may be said in a state. */
export function verbsIn(state: JobState): JobVerb[] {
  return (Object.keys(VERBS) as JobVerb[]).filter((verb) => (VERBS[verb] as readonly JobState[]).includes(state))
}

export interface JobStatus {
  readonly id: string
  readonly kind: JobKind
  /** The disk or machine that it works on. */
  readonly subject: string
  readonly state: JobState
  readonly verbs: readonly JobVerb[]
  /** Bytes copied and bytes to copy in all, as known now. `done` begins at what an earlier run had saved, and never goes back. */
  readonly done: number
  readonly total: number
  /** Milliseconds to go at the pace of the last seconds; undefined while not known, while nothing is copied, or when it would never end. */
  readonly restMs: number | undefined
  /** What `done` was when this run of the job began: above 0 when it resumed after a crash or restart. */
  readonly resumedAt: number
  /** Bytes per second; 0 is no limit. */
  readonly speed: number
  /** How the guests of its disks fare; undefined while they do nothing that takes time, or it does not look. */
  readonly guest: GuestStatus | undefined
  readonly onError: ErrorPolicy
  readonly startedMs: number
  readonly endedMs: number | undefined
  /** It ended, and is no longer in the list of what needs a look: only the history has it. */
  readonly dismissed: boolean
  readonly error: { readonly kind: string; readonly message: string } | undefined
  /** What the work says of itself: a backup's id, why it is full, bytes read and stored. */
  readonly details: Readonly<Record<string, unknown>>
}

export interface JobOptions {
  readonly id: string
  readonly kind: JobKind
  readonly subject: string
  readonly terms?: JobTerms
  /** `finalize` was said in an earlier run. */
  readonly finalized?: boolean | undefined
  readonly clock?: Clock
  readonly details?: Readonly<Record<string, unknown>>
}

export class Job {
  readonly id: string
  readonly kind: JobKind
  readonly subject: string
  readonly onError: ErrorPolicy
  readonly #clock: Clock
  #state: JobState = 'created'
  #done = 0
  #total = 0
  #resumedAt = 0
  #speed: number
  /** Its result may take effect. */
  #mayFinalize: boolean
  #ignored = 0
  readonly #dismisses: boolean
  readonly #rest = new RestTime()
  #courtesy: Courtesy | undefined
  #line: BandwidthShare | undefined
  #error: BlockError | undefined
  #details: Readonly<Record<string, unknown>>
  readonly #startedMs: number
  #endedMs: number | undefined
  #suspended = false
  #wake: (() => void) | undefined
  #rouse: (() => void) | undefined
  #resumed: { readonly promise: Promise<void>; readonly resolve: () => void } | undefined
  /** When the bytes passed so far will be within the speed, on the clock. */
  #paidUntil = 0
  readonly #listeners = new Set<(job: Job) => void>()

  constructor(options: JobOptions) {
    this.id = options.id
    this.kind = options.kind
    this.subject = options.subject
    const { speed = 0, onError, finalize, dismiss } = options.terms ?? {}
    this.onError = onError ?? TERMS[this.kind].onError[0]
    this.#speed = speed
    this.#mayFinalize = finalize !== 'manual' || options.finalized === true
    this.#dismisses = dismiss !== 'manual'
    this.#clock = options.clock ?? systemClock
    this.#details = options.details ?? {}
    this.#startedMs = this.#clock.wall()
  }

  get state(): JobState {
    return this.#state
  }

  get error(): BlockError | undefined {
    return this.#error
  }

  get status(): JobStatus {
    return {
      id: this.id,
      kind: this.kind,
      subject: this.subject,
      state: this.#state,
      verbs: verbsIn(this.#state),
      done: this.#done,
      total: this.#total,
      restMs: this.#state === 'running' ? this.#rest.restMs(this.#clock.now(), this.#total - this.#done) : undefined,
      resumedAt: this.#resumedAt,
      speed: this.#speed,
      guest: this.#state === 'running' ? this.#courtesy?.status : undefined,
      onError: this.onError,
      startedMs: this.#startedMs,
      endedMs: this.#endedMs,
      dismissed: this.#state === 'concluded' && this.#dismisses && !this.#hasFailed,
      error: this.#error === undefined ? undefined : { kind: this.#error.kind, message: this.#error.message },
      details: this.#details,
    }
  }

  /** What its user did not ask for ended it. */
  get #hasFailed(): boolean {
    return this.#error !== undefined && this.#error.kind !== 'cancelled'
  }

  /** Calls back after every change of state, progress or details; returns how to stop that. */
  watch(listener: (job: Job) => void): () => void {
    this.#listeners.add(listener)
    return () => this.#listeners.delete(listener)
  }

  /** Moves to a state that may follow; the work calls this, users say verbs. */
  move(to: JobState): void {
    assert(mayMove(this.#state, to), `job ${this.id} cannot move from ${this.#state} to ${to}`)
    this.#state = to
    this.#rest.reset()
    if (to === 'concluded') this.#endedMs = this.#clock.wall()
    this.#tell()
  }

  /** What an earlier run had done already. */
  resumeFrom(done: number, total: number): void {
    this.#resumedAt = done
    this.#done = done
    this.expect(total - done)
  }

  /** So many bytes are to do, as is known now. */
  expect(left: number): void {
    this.#rest.reset()
    this.advance(0, left)
  }

  /** So many bytes were copied, and so many are still to do: guests may have added some, or made some needless. */
  advance(bytes: number, left: number): void {
    this.#done += bytes
    this.#total = this.#done + left
    this.#rest.note(this.#clock.now(), left)
    this.#tell()
  }

  describe(details: Readonly<Record<string, unknown>>): void {
    this.#details = { ...this.#details, ...details }
    this.#tell()
  }

  /** Says that a job that is ready may end. How it is to end is the engine's; the work looks when it is woken. */
  complete(): void {
    this.#check('complete')
    this.nudge()
  }

  /**
   * All is done but its effect: true when that may be now. Else waits in `pending` until `finalize` is said; then the work looks
   * again whether all is done. Kinds as for `pausePoint`.
   */
  async mayTakeEffect(): Promise<boolean> {
    if (this.#mayFinalize) return true
    if (this.#state === 'running') this.#hold('pending')
    await this.pausePoint(0)
    return false
  }

  /** Lets the result of a job that is pending take effect. */
  finalize(): void {
    this.#check('finalize')
    this.#mayFinalize = true
    this.#goOn('running')
  }

  /** Wakes the work from `idle`: something that it looks at has changed. */
  nudge(): void {
    this.#rouse?.()
  }

  pause(): void {
    this.#check('pause')
    this.#hold(this.#state === 'ready' ? 'standby' : 'paused')
  }

  /** Stops on an error that the user can mend (a full file system): the job waits for `resume` or `cancel`. */
  pauseOnError(error: BlockError): void {
    // Cancelled meanwhile: the next pause point ends the work.
    if (this.#state === 'aborting') return
    this.#error = error
    if (this.#state === 'running') this.#hold('paused')
    else if (this.#state === 'ready') this.#hold('standby')
    else this.#tell()
  }

  /** An error that the work is about to try again for: it goes on. */
  noteIgnored(error: BlockError): void {
    this.#ignored++
    this.describe({ ignored: this.#ignored, ignoredLast: error.message })
  }

  /** An error of the storage may be waited for: the job neither ends already, nor is its result taking effect. */
  get mayWait(): boolean {
    return !this.#suspended && this.#state !== 'aborting' && this.#state !== 'finalizing'
  }

  resume(): void {
    this.#check('resume')
    this.#error = undefined
    this.#goOn(this.#state === 'standby' ? 'ready' : 'running')
  }

  /** From now on it makes way for the guests of its disks. */
  makeWay(courtesy: Courtesy): void {
    this.#courtesy = courtesy
  }

  /** From now on it keeps to a limit that it shares with other jobs. */
  shareLine(line: BandwidthShare): void {
    this.#line = line
  }

  /** Somebody has said how fast it may copy. */
  get isLimited(): boolean {
    return this.#speed > 0 || this.#line !== undefined
  }

  /** Asks the work to undo itself and end; it ends at its next pause point. */
  cancel(): void {
    this.#check('cancel')
    this.#undo(new BlockError('cancelled', `job ${this.id} was cancelled`, {}, this.#error))
  }

  /** The same for a reason that came from elsewhere while the work waits; nothing when its result takes effect already. */
  giveUp(error: BlockError): void {
    if (mayMove(this.#state, 'aborting') && this.#state !== 'finalizing') this.#undo(error)
  }

  #undo(error: BlockError): void {
    this.#error = error
    this.move('aborting')
    this.#resumed?.resolve()
    this.#resumed = undefined
    this.#wake?.()
    this.#rouse?.()
  }

  setSpeed(bytesPerSecond: number): void {
    this.#check('set-speed')
    this.#speed = bytesPerSecond
    this.#paidUntil = 0
    this.#wake?.()
    this.#tell()
  }

  /** The daemon stops: the work ends at its next pause point with kind 'closed', to go on when the daemon starts again. */
  suspend(): void {
    this.#suspended = true
    this.#resumed?.resolve()
    this.#wake?.()
    this.#rouse?.()
  }

  get suspended(): boolean {
    return this.#suspended
  }

  /** The work says that it failed; it then undoes itself and concludes. */
  fail(error: unknown): void {
    this.#error = toBlockError(error, `job ${this.id}`)
    if (this.#state !== 'aborting') this.move('aborting')
  }

  /**
   * Between two pieces of work: waits while paused, while ahead of the speed limit, and while the guests need it. `bytes` is what the last piece moved.
   * Kind 'cancelled' when the job is to end.
   */
  async pausePoint(bytes: number): Promise<void> {
    await this.#payFor(bytes)
    while (this.#resumed !== undefined && !this.#suspended) await this.#resumed.promise
    if (this.#suspended) throw new BlockError('closed', `job ${this.id} is suspended: the daemon stops`)
    if (this.#state === 'aborting') throw this.#error ?? new BlockError('cancelled', `job ${this.id} was cancelled`)
  }

  /** Nothing is to do now: waits so many milliseconds, or until it is nudged, suspended, or a verb is said. */
  async idle(forMs: number): Promise<void> {
    const roused = new Promise<void>((resolve) => (this.#rouse = resolve))
    await Promise.race([this.#clock.sleep(forMs), roused])
    this.#rouse = undefined
  }

  #goOn(state: 'running' | 'ready'): void {
    this.move(state)
    this.#resumed?.resolve()
    this.#resumed = undefined
  }

  #hold(state: 'paused' | 'standby' | 'pending'): void {
    let resolve = (): void => {}
    const promise = new Promise<void>((done) => (resolve = done))
    this.#resumed = { promise, resolve }
    this.move(state)
  }

  async #payFor(bytes: number): Promise<void> {
    if (this.#speed > 0) {
      const now = this.#clock.now()
      this.#paidUntil = Math.max(this.#paidUntil, now - SPEED_BURST_MS) + (bytes / this.#speed) * 1000
    } else if (this.#courtesy === undefined && this.#line === undefined) return
    for (let moved = bytes; ; moved = 0) {
      const now = this.#clock.now()
      const ownMs = this.#speed > 0 && bytes > 0 ? this.#paidUntil - now : 0
      const waitMs = Math.max(ownMs, this.#courtesy?.waitMs(now, moved) ?? 0, this.#line?.waitMs(moved) ?? 0)
      if (waitMs <= 0 || this.#suspended || this.#state === 'aborting') break
      const woken = new Promise<void>((resolve) => (this.#wake = resolve))
      await Promise.race([this.#clock.sleep(waitMs), woken])
    }
    this.#wake = undefined
  }

  #check(verb: JobVerb): void {
    if ((VERBS[verb] as readonly JobState[]).includes(this.#state)) return
    const legal = verbsIn(this.#state).join(', ') || 'nothing'
    throw new BlockError('busy', `job ${this.id} is ${this.#state}: ${verb} cannot be said now; what can: ${legal}`)
  }

  #tell(): void {
    for (const listener of this.#listeners) listener(this)
  }
}
