// Judges whether the one request in the ring may be waited for within the call: that spares waking two threads, but while it lasts nobody
// else is served. So only where the disk is quick (pace.ts), and where requests come one at a time: after a row of them that had
// the ring to themselves, and now and then one is not waited for, to see whether another comes meanwhile. Knows no ring: it is told.

import { RING_SOLO_PROBE, RING_SOLO_ROW, RING_SOLO_SPARED_MS } from '../base/limits.ts'
import { Pace } from './pace.ts'

export class SoloPace {
  readonly #pace = new Pace()
  #row = 0
  #asked = 0

  /** Whether a request that is alone in the ring is to be waited for. */
  mayWait(): boolean {
    if (!this.#pace.isQuick || this.#row < RING_SOLO_ROW) return false
    this.#asked = (this.#asked + 1) % RING_SOLO_PROBE
    return this.#asked !== 0
  }

  /** A request was waited for, between these times in milliseconds. */
  waited(beganMs: number, endedMs: number): void {
    this.#pace.tookInCall(Math.min(beganMs + RING_SOLO_SPARED_MS, endedMs), endedMs, 0)
  }

  /** A request was not waited for, and had the ring to itself or not. */
  answered(beganMs: number, endedMs: number, wasAlone: boolean): void {
    this.#row = wasAlone ? Math.min(this.#row + 1, RING_SOLO_ROW) : 0
    this.#pace.tookInPool(beganMs, endedMs, 0)
  }
}
