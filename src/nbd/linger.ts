// A client that sends one request, waits for its answer and sends the next makes the server sleep and wake each time, which takes longer
// than the answer. So after such an answer the event loop goes on turning for a moment instead of sleeping, as QEMU's own loops do: for
// a client that has shown that its next request comes soon, and no longer than that. Nobody else waits: a turn serves all.
//
//   answer --soon--> request --> answer --soon--> request ... a row of them: linger after each
//   answer --late--> request: the row begins anew

import { LINGER_GAP_MS, LINGER_MS, LINGER_ROW } from '../base/limits.ts'
import type { Clock } from '../base/clock.ts'

/** Whether the requests of one connection come so that it is worth while to linger. */
export class Linger {
  readonly #now: () => number
  readonly #stay: (untilMs: number) => void
  #row = 0
  /** When the last answer left; below 0 when it was not the answer to a lone request. */
  #answeredMs = -1

  constructor(now: Clock['now'] = () => performance.now(), stay: (untilMs: number) => void = stayAwake) {
    this.#now = now
    this.#stay = stay
  }

  /** Something arrived. */
  arrived(): void {
    if (this.#answeredMs < 0) return
    this.#row = this.#now() - this.#answeredMs < LINGER_GAP_MS ? Math.min(this.#row + 1, LINGER_ROW) : 0
    this.#answeredMs = -1
  }

  /** A request that was alone on its connection is answered. */
  answered(): void {
    this.#answeredMs = this.#now()
    if (this.#row === LINGER_ROW) this.#stay(this.#answeredMs + LINGER_MS)
  }
}

let awakeUntilMs = 0
let isTurning = false

/** Keeps the event loop of this thread turning until then, on performance.now(). */
function stayAwake(untilMs: number): void {
  awakeUntilMs = untilMs
  if (isTurning) return
  isTurning = true
  setImmediate(turn)
}

function turn(): void {
  if (performance.now() < awakeUntilMs) setImmediate(turn)
  else isTurning = false
}
