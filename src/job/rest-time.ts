// How long a job will still take, from how much was left in the last seconds: what was copied less what the guests made to do again,
// whatever the reason for either. A copy that stands still has longer and longer to go, and then, like one that does not gain on its
// guests, no end.
//
//   left   100 . . . 60     40 less in 10 s: 15 s to go
//          |-- window --|

import { REST_LEAST_MS, REST_SAMPLES, REST_WINDOW_MS } from '../base/limits.ts'

export class RestTime {
  readonly #times = new Float64Array(REST_SAMPLES)
  readonly #lefts = new Float64Array(REST_SAMPLES)
  /** Samples taken in all; each overwrites the one a window before. */
  #count = 0

  /** So many bytes are left, at a time in milliseconds. */
  note(nowMs: number, left: number): void {
    if (this.#count > 0 && nowMs - this.#timeOf(this.#count - 1) < REST_WINDOW_MS / REST_SAMPLES) return
    this.#times[this.#count % REST_SAMPLES] = nowMs
    this.#lefts[this.#count % REST_SAMPLES] = left
    this.#count++
  }

  /** What was before says nothing about what comes: the job was paused, or learned what is to do. */
  reset(): void {
    this.#count = 0
  }

  /** Milliseconds until nothing is left at the pace of the last window; undefined while that is not known, or when it would never end. */
  restMs(nowMs: number, left: number): number | undefined {
    if (this.#count === 0) return undefined
    // The last sample that is a whole window old, else the oldest.
    let sample = Math.max(0, this.#count - REST_SAMPLES)
    while (sample + 1 < this.#count && nowMs - this.#timeOf(sample + 1) >= REST_WINDOW_MS) sample++
    const oldest = sample % REST_SAMPLES
    const elapsedMs = nowMs - (this.#times[oldest] as number)
    if (elapsedMs < REST_LEAST_MS) return undefined
    if (left === 0) return 0
    const gained = (this.#lefts[oldest] as number) - left
    return gained <= 0 ? undefined : (left / gained) * elapsedMs
  }

  #timeOf(sample: number): number {
    return this.#times[sample % REST_SAMPLES] as number
  }
}
