// Judges whether the event loop may turn while requests are under way in the ring, instead of sleeping until it is told: that spares
// waking two threads for each answer, and takes the processor meanwhile. So only at a disk whose answers follow each other quickly, and
// never for long without one. Knows no ring: it is told times.

import { RING_SPIN_MS, RING_SPIN_ROW } from '../base/limits.ts'

export class SpinPace {
  /** Answers in a row that came quickly after the one before, or after the ring began to be busy. */
  #row = 0
  #lastMs = 0

  /** The first request is under way, at this time in milliseconds of a clock that only goes forward. */
  began(nowMs: number): void {
    this.#lastMs = nowMs
  }

  /** So many are answered since the last time: when one was told of them late, they come together. */
  answered(nowMs: number, count: number): void {
    const isQuick = nowMs - this.#lastMs < RING_SPIN_MS * count
    this.#row = isQuick ? Math.min(this.#row + count, RING_SPIN_ROW) : 0
    this.#lastMs = nowMs
  }

  /** While something is under way. */
  maySpin(nowMs: number): boolean {
    return this.#row === RING_SPIN_ROW && nowMs - this.#lastMs < RING_SPIN_MS
  }
}
