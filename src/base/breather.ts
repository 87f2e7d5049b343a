// Keeps long loops over data at hand from starving the sockets: awaiting what is already there never returns to the
// event loop, so such a loop asks the breather, which lets the loop turn once its time slice is used up.

import { BREATH_MS } from './limits.ts'

export class Breather {
  #since = performance.now()

  /** Undefined while the slice lasts; then a promise to be awaited. */
  pause(): Promise<void> | undefined {
    if (performance.now() - this.#since < BREATH_MS) return undefined
    return nextTurn().then(() => void (this.#since = performance.now()))
  }
}

/** Resolves when the event loop has turned: what came meanwhile has been heard. */
export function nextTurn(): Promise<void> {
  return new Promise((resolve) => void setImmediate(resolve))
}
