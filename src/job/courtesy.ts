// How a job makes way for the guests of its disks. It watches what their requests take, and copies slower when that is more than it may
// be: its pace is halved while they wait too long, and grows by a step while they do not (additive increase, multiplicative decrease, as
// TCP shares a line). What they may take is what was asked for, or half as much again as without the job (beside a live restore more):
// to know that, the job stands still for a moment, now and then. A disk whose guests are idle, or are answered within the call, does not slow it.
// Unless they ask so much that the thread has no rest: then they wait where no meter sees it, in their sockets, and whatever the copy takes
// of processors and memory they lack. The job slows down in the same way, though not so far. A copy that takes processors from the guests
// themselves gives the thread rest: so guests who ask much count as many also where they are served less than they were without the copy.
//
//   pace   ####.  .###.####.     listening: nothing is copied, what requests take now is the base
//   base       |--|
//
// It knows only its own disks: what else loads the storage looks to it like the storage.

import {
  COURTESY_CROWD,
  COURTESY_CROWDED,
  COURTESY_CROWDED_FLOOR,
  COURTESY_CROWDED_LEAST,
  COURTESY_CROWDED_LESS,
  COURTESY_FLOOR,
  COURTESY_HELD_WINDOWS,
  COURTESY_LEAST_MS,
  COURTESY_LISTEN_AGAIN_MS,
  COURTESY_LISTEN_EVERY_MS,
  COURTESY_LISTEN_MS,
  COURTESY_OUTDATED,
  COURTESY_RATE_LEAST,
  COURTESY_RATIO,
  COURTESY_REQUESTS,
  COURTESY_SERVED,
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

/** Where a kind of job differs from the others. */
export interface CourtesyWish {
  /** Bytes per second that the job always has beside guests that leave their thread no rest. */
  readonly crowdedLeast?: number
  /** So many times what a request takes without the job it may take with it. */
  readonly ratio?: number
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
  readonly #crowdedLeast: number
  readonly #ratio: number
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
  /** Paces of the last windows, one after another, in which something else held it. */
  #held: readonly number[] = []
  #paidUntil = 0
  /** Of each thread, requests per millisecond that were answered when it listened last, or in the best window since. */
  readonly #served: number[]
  /** The same when it listened. */
  #listened: readonly number[]

  /** `guests` are those of each thread; `targetMs` is what a request may take on the average, found out unless told. */
  constructor(guests: readonly GuestsHeard[], targetMs?: number, wish: CourtesyWish = {}) {
    this.#guests = guests
    this.#asked = targetMs
    this.#crowdedLeast = wish.crowdedLeast ?? COURTESY_CROWDED_LEAST
    this.#ratio = wish.ratio ?? COURTESY_RATIO
    this.#served = guests.map(() => 0)
    this.#listened = guests.map(() => 0)
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
    return this.#base === undefined ? undefined : Math.max(COURTESY_LEAST_MS, this.#base * this.#ratio)
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
        this.#begin(this.#isDue(nowMs, elapsedMs, heard) ? 'settling' : 'copying', nowMs)
        return
      case 'settling':
        this.#begin('listening', nowMs)
        return
      case 'listening':
        if (answered > 0) this.#learn(waitedMs / answered)
        this.#listened = heard.map((one) => one.answered / elapsedMs)
        for (const [index, served] of this.#listened.entries()) this.#served[index] = served
        this.#listenedMs = nowMs
        this.#begin('copying', nowMs)
    }
  }

  /** Where nobody waits and nobody asks much there is nothing to hear. */
  #isDue(nowMs: number, elapsedMs: number, heard: readonly Heard[]): boolean {
    // Guests who are served more beside the job than they were without it were held back by something else then: a moment's first writes.
    const isOutdated = this.#served.some((most, index) => most > (this.#listened[index] as number) * COURTESY_OUTDATED)
    const everyMs = isOutdated ? COURTESY_LISTEN_AGAIN_MS : COURTESY_LISTEN_EVERY_MS
    if (this.#asked !== undefined || nowMs - this.#listenedMs < everyMs) return false
    return heard.some((one) => one.waitedMs > 0 || isCrowd(one, elapsedMs))
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
    const isCrowded = heard.some((one, index) => this.#lacksRest(one, index, elapsedMs))
    for (const [index, one] of heard.entries())
      this.#served[index] = Math.max(this.#served[index] as number, one.answered / elapsedMs)
    if (isSlow && pace > 0) this.#slow(pace, COURTESY_FLOOR, COURTESY_RATE_LEAST)
    else if (isCrowded && pace > 0) this.#slow(pace, COURTESY_CROWDED_FLOOR, this.#crowdedLeast)
    else if (isSlow) return
    else if (this.#rate !== Infinity) this.#rate = Math.min(this.#rate + this.#peak * COURTESY_STEP, this.#peak * 2)
  }

  /** The guests of a thread ask much, and it has no rest, or they get less than they did. */
  #lacksRest(one: Heard, index: number, elapsedMs: number): boolean {
    if (!isCrowd(one, elapsedMs)) return false
    if (one.activeMs > COURTESY_CROWDED * elapsedMs) return true
    const isLess = one.answered < COURTESY_SERVED * (this.#served[index] as number) * elapsedMs
    return isLess && one.activeMs > COURTESY_CROWDED_LESS * elapsedMs
  }

  /** To a half, but never below this part of the fastest pace, nor below so many bytes a second. */
  #slow(pace: number, floor: number, least: number): void {
    this.#held = pace < this.#rate / 2 ? [...this.#held, pace] : []
    // What it reaches when nothing holds it is the fastest now: it may have been faster over holes. One window may be that of a sync.
    if (this.#held.length === COURTESY_HELD_WINDOWS) {
      this.#peak = Math.max(...this.#held)
      this.#held = []
    }
    const half = Math.min(this.#rate, pace) / 2
    this.#rate = Math.max(half, Math.min(this.#rate, Math.max(this.#peak * floor, least)))
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

/** The guests ask much. */
function isCrowd({ answered }: Heard, elapsedMs: number): boolean {
  return answered > COURTESY_CROWD * elapsedMs
}

/** A copy that was woken late makes up for so many milliseconds. */
const BURST_MS = 10
