// Whether a copy gains on a guest that goes on writing: from what it copied and what the guest made to do again, window by window.
// It decides nothing: the mirror does. A guest that rewrites all of its disk faster than it is copied dirties, in the end, exactly
// what is copied, give or take; so a gain of a small part of what is copied is none.
//
//   to do   ----.____.----.__      copied less dirtied, for each window; windows in a row without a gain: it is lost

import { MIRROR_LOST_WINDOWS, MIRROR_WINDOW_MS } from '../base/limits.ts'

export interface Estimate {
  /** Bytes a second: brought to the target, and made to do again by the guest. */
  readonly copyRate: number
  readonly dirtyRate: number
}

export class Convergence {
  #startMs: number | undefined
  #copied = 0
  #dirtied = 0
  #windowsLost = 0
  #estimate: Estimate | undefined

  /** Of the last whole window. */
  get estimate(): Estimate | undefined {
    return this.#estimate
  }

  /** For several windows in a row the guest made nearly as much to do again as was copied, or more. */
  get isLost(): boolean {
    return this.#windowsLost >= MIRROR_LOST_WINDOWS
  }

  /** What was copied and dirtied so far in all, and what is left, in bytes, at a time in milliseconds. True when a window ended. */
  note(nowMs: number, copied: number, dirtied: number, left: number): boolean {
    const tookMs = this.#startMs === undefined ? Infinity : nowMs - this.#startMs
    if (tookMs < MIRROR_WINDOW_MS) return false
    // The job was paused in between, or began: that says nothing.
    const counts = tookMs < MIRROR_WINDOW_MS * LONGEST
    if (counts) this.#measure(tookMs / 1000, copied - this.#copied, dirtied - this.#dirtied, left)
    this.#startMs = nowMs
    this.#copied = copied
    this.#dirtied = dirtied
    return counts
  }

  #measure(seconds: number, copied: number, dirtied: number, left: number): void {
    const copyRate = copied / seconds
    const dirtyRate = dirtied / seconds
    const gain = copyRate - dirtyRate
    this.#windowsLost = left > 0 && gain <= copyRate * GAIN_LEAST ? this.#windowsLost + 1 : 0
    this.#estimate = { copyRate, dirtyRate }
  }
}

/** The part of what is copied that a gain must be. */
const GAIN_LEAST = 1 / 8

/** A window that took so many times its length is none. */
const LONGEST = 5
