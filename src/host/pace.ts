// Judges by the clock whether a file answers so quickly that its requests may be made within the call, where they stop the
// thread while they last. A file begins in the pool and earns the call by quick answers; it loses it again by the time
// that its calls took too long, of which a little is forgiven: a processor that others use too makes any call long now and then. Each
// time the call was lost soon, the pause before the next trial doubles. Knows no files: it is told times.
//
//   pool --quick answers in a row, pause over--> call --too much time--> pool, for a pause

import {
  PACE_BYTE_MS,
  PACE_CALL_MS,
  PACE_DEBT_MS,
  PACE_FORGIVEN,
  PACE_PAUSE_MAX_MS,
  PACE_PAUSE_MIN_MS,
  PACE_QUICK_MS,
  PACE_QUICK_ROW,
} from '../base/limits.ts'

/** A call that lasts for so many pauses makes the next pause short again. */
const LONG = 10

export class Pace {
  /** True while requests may be made within the call. */
  isQuick: boolean
  readonly #isTrusted: boolean
  #row = 0
  #debtMs = 0
  #countedMs = 0
  #sinceMs = 0
  #pauseMs = 0
  #retryMs = 0

  /** A trusted file begins in the call, and after a pause is back there. */
  constructor(isTrusted = false) {
    this.isQuick = this.#isTrusted = isTrusted
  }

  /** A request of `length` bytes within the call began and ended at these times, in milliseconds of a clock that only goes forward. */
  tookInCall(beganMs: number, endedMs: number, length: number): void {
    const excess = endedMs - beganMs - PACE_CALL_MS - length * PACE_BYTE_MS
    if (excess <= 0) return
    this.#debtMs = Math.max(0, this.#debtMs - (endedMs - this.#countedMs) * PACE_FORGIVEN) + excess
    this.#countedMs = endedMs
    if (this.#debtMs > PACE_DEBT_MS && this.isQuick) this.#leaveCall(endedMs)
  }

  /** The same for a request that was made in the pool. */
  tookInPool(beganMs: number, endedMs: number, length: number): void {
    const isSlow = endedMs - beganMs > PACE_QUICK_MS + length * PACE_BYTE_MS
    this.#row = isSlow ? this.#row >> 1 : this.#row + 1
    if (this.isQuick || endedMs < this.#retryMs || (!this.#isTrusted && this.#row < PACE_QUICK_ROW)) return
    this.isQuick = true
    this.#sinceMs = this.#countedMs = endedMs
    this.#debtMs = 0
  }

  #leaveCall(nowMs: number): void {
    const wasLong = nowMs - this.#sinceMs > this.#pauseMs * LONG
    this.#pauseMs = wasLong
      ? PACE_PAUSE_MIN_MS
      : Math.min(Math.max(this.#pauseMs * 2, PACE_PAUSE_MIN_MS), PACE_PAUSE_MAX_MS)
    this.#retryMs = nowMs + this.#pauseMs
    this.isQuick = false
    this.#row = 0
  }
}
