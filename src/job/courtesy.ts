// How a job makes way for the guests of its disks. It watches what their requests take, and copies slower when that is more than it may
// be: its pace is halved while they wait too long, and grows by a step while they do not (additive increase, multiplicative decrease, as
// TCP shares a line). What they may take is what was asked for, or half as much again as without the job: to know that, the job stands
// still for a moment, now and then. A disk whose guests are idle, or are answered within the call, does not slow it.
// Unless they ask so much that the thread has no rest: then they wait where no meter sees it, in their sockets, and whatever the copy takes
// of processors and memory they lack. The job slows down in the same way, though not so far.
//
//   pace   ####.  .###.####.     listening: nothing is copied, what requests take now is the base
//   base       |--|
//
// It knows only its own disks: what else loads the storage looks to it like the storage.

import {
  COURTESY_CROWD,
  COURTESY_CROWDED,
  COURTESY_CROWDED_FLOOR,
  COURTESY_FLOOR,
  COURTESY_LEAST_MS,
  COURTESY_LISTEN_EVERY_MS,
  COURTESY_LISTEN_MS,
  COURTESY_RATE_LEAST,
  COURTESY_RATIO,
  COURTESY_REQUESTS,
  COURTESY_SETTLE_MS,
  COURTESY_STEP,
  COURTESY_WINDOW_MAX_MS,
  COURTESY_WINDOW_MS,
} from '../base/limits.ts'

/** What the guests of some disks of one thread did so far. All of it only grows. */
export interface GuestsHeard {
  /** Requests answered. */
  readonly answered: number
  /** Milliseconds that all requests waited together, those under way included. */
  waitedMs(): number
  /** Milliseconds that their thread was at work. */
  activeMs(): number
}

interface Heard {
  readonly answered: number
  readonly waitedMs: number
  readonly activeMs: number
}

/** How the guests of a job's disks fare. */
export interface GuestStatus {
  /** Milliseconds that a request took on the average in the last window, and may take. */
  readonly latencyMs: number
  readonly targetMs: number
  /** Bytes per second that the job keeps to for them; undefined while it need not. */
  readonly rate: number | undefined
}

/** Copying, letting what is on its way end, listening. */
type Phase = 'copying' | 'settling' | 'listening'

const PHASE_MS: Record<Phase, number> = {
  copying: COURTESY_WINDOW_MS,
  settling: COURTESY_SETTLE_MS,
  listening: COURTESY_LISTEN_MS,
}

export class Courtesy {
  readonly #guests: readonly GuestsHeard[]
  readonly #asked: number | undefined
  #phase: Phase = 'copying'
  /** When the phase began, what was heard of each thread by then, and the bytes copied since. */
  #sinceMs: number | undefined
  #before: readonly Heard[] = []
  #bytes = 0
  /** Milliseconds that a request takes without the job. */
  #base: number | undefined
  #listenedMs = -Infinity
  /** Of the last windows, the older the less. */
  #answered = 0
  #waitedMs = 0
  /** Bytes per second: what it keeps to, and the fastest that it was. */
  #rate = Infinity
  #peak = 0
  #paidUntil = 0

  /** `guests` are those of each thread; `targetMs` is what a request may take on the average, found out unless told. */
  constructor(guests: readonly GuestsHeard[], targetMs?: number) {
    this.#guests = guests
    this.#asked = targetMs
  }

  /** Undefined before there is something to say. */
  get status(): GuestStatus | undefined {
    const targetMs = this.#targetMs
    if (targetMs === undefined || this.#answered === 0) return undefined
    const rate = this.#rate < this.#peak ? this.#rate : undefined
    return { latencyMs: this.#waitedMs / this.#answered, targetMs, rate }
  }

  /** How many milliseconds the job is to wait, at a time in milliseconds, when it has copied so many bytes since it asked last. 0: it goes on. */
  waitMs(nowMs: number, bytes: number): number {
    this.#bytes += bytes
    if (this.#rate !== Infinity)
      this.#paidUntil = Math.max(this.#paidUntil, nowMs - BURST_MS) + (bytes / this.#rate) * 1000
    if (this.#sinceMs === undefined) this.#begin('copying', nowMs)
    else if (nowMs - this.#sinceMs >= PHASE_MS[this.#phase]) this.#turn(nowMs, nowMs - this.#sinceMs)
    if (this.#phase !== 'copying') return PHASE_MS[this.#phase] - (nowMs - (this.#sinceMs as number))
    return Math.max(0, this.#paidUntil - nowMs)
  }

  get #targetMs(): number | undefined {
    if (this.#asked !== undefined) return this.#asked
    return this.#base === undefined ? undefined : Math.max(COURTESY_LEAST_MS, this.#base * COURTESY_RATIO)
  }

  #begin(phase: Phase, nowMs: number): void {
    this.#phase = phase
    this.#sinceMs = nowMs
    this.#bytes = 0
    this.#before = this.#hear()
  }

  /** A phase is over. */
  #turn(nowMs: number, elapsedMs: number): void {
    const heard = this.#since()
    const answered = heard.reduce((sum, one) => sum + one.answered, 0)
    const waitedMs = heard.reduce((sum, one) => sum + one.waitedMs, 0)
    switch (this.#phase) {
      case 'copying':
        if (answered < COURTESY_REQUESTS && elapsedMs < COURTESY_WINDOW_MAX_MS) return
        this.#judge(elapsedMs, heard, { answered, waitedMs })
        this.#begin(waitedMs > 0 && this.#isDue(nowMs) ? 'settling' : 'copying', nowMs)
        return
      case 'settling':
        this.#begin('listening', nowMs)
        return
      case 'listening':
        if (answered > 0) this.#learn(waitedMs / answered)
        this.#listenedMs = nowMs
        this.#begin('copying', nowMs)
    }
  }

  #isDue(nowMs: number): boolean {
    return this.#asked === undefined && nowMs - this.#listenedMs >= COURTESY_LISTEN_EVERY_MS
  }

  #learn(latencyMs: number): void {
    this.#base = this.#base === undefined ? latencyMs : (this.#base + latencyMs) / 2
  }

  #judge(
    elapsedMs: number,
    heard: readonly Heard[],
    { answered, waitedMs }: Pick<Heard, 'answered' | 'waitedMs'>,
  ): void {
    const pace = (this.#bytes / elapsedMs) * 1000
    this.#peak = Math.max(this.#peak, pace)
    this.#answered = this.#answered / 2 + answered
    this.#waitedMs = this.#waitedMs / 2 + waitedMs
    const targetMs = this.#targetMs
    const isSlow = targetMs !== undefined && this.#waitedMs > targetMs * this.#answered
    // A job that copied nothing slowed nobody.
    if (isSlow && pace > 0) this.#slow(pace, COURTESY_FLOOR)
    else if (heard.some((one) => isCrowded(one, elapsedMs)) && pace > 0) this.#slow(pace, COURTESY_CROWDED_FLOOR)
    else if (isSlow) return
    else if (this.#rate !== Infinity) this.#rate = Math.min(this.#rate + this.#peak * COURTESY_STEP, this.#peak * 2)
  }

  /** To a half, but never below this part of the fastest pace. */
  #slow(pace: number, floor: number): void {
    // What it reaches when nothing holds it is the fastest now: it may have been faster over holes.
    if (pace < this.#rate / 2) this.#peak = pace
    const half = Math.min(this.#rate, pace) / 2
    this.#rate = Math.max(half, Math.min(this.#rate, Math.max(this.#peak * floor, COURTESY_RATE_LEAST)))
    // What was before says nothing about the new pace.
    this.#answered = 0
    this.#waitedMs = 0
  }

  /** Of each thread, so far. */
  #hear(): Heard[] {
    return this.#guests.map((guests) => ({
      answered: guests.answered,
      waitedMs: guests.waitedMs(),
      activeMs: guests.activeMs(),
    }))
  }

  /** Of each thread, since the phase began. */
  #since(): Heard[] {
    return this.#hear().map((now, index) => {
      const before = this.#before[index] as Heard
      return {
        answered: now.answered - before.answered,
        waitedMs: now.waitedMs - before.waitedMs,
        activeMs: now.activeMs - before.activeMs,
      }
    })
  }
}

/** The guests ask much, and their thread has no rest. */
function isCrowded({ answered, activeMs }: Heard, elapsedMs: number): boolean {
  return answered > COURTESY_CROWD * elapsedMs && activeMs > COURTESY_CROWDED * elapsedMs
}

/** A copy that was woken late makes up for so many milliseconds. */
const BURST_MS = 10
