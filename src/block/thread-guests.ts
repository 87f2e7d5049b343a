// Whether any guest of this thread asks for anything, whatever its disk: a job copies within the event loop's turn while none does, and
// in the pool else. Knows no disk: each counts its guest's requests here.

import { GUESTS_IDLE_MS } from '../base/limits.ts'

export class ThreadGuests {
  /** Requests that the guests of this thread have made so far. */
  requests = 0
  #seen = 0
  #sinceMs = 0

  /** No guest has asked for anything for a while, as far as those know who looked. `nowMs` of a clock that only goes forward. */
  areIdle(nowMs: number): boolean {
    if (this.requests !== this.#seen) {
      this.#seen = this.requests
      this.#sinceMs = nowMs
    }
    return nowMs - this.#sinceMs >= GUESTS_IDLE_MS
  }
}

/** Those of this thread. */
export const threadGuests = new ThreadGuests()
