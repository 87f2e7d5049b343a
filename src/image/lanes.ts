// Work on a sequence of pieces, several at once: each piece is made ready (read, compressed) in a buffer of its own as soon as
// one is free, and finished (written) in the order of the pieces. Work that is done within the call goes on with the same
// buffer, which is then still in the processor's cache. The buffers are all the memory that it takes.
//
//   ready     | 4 ... | 5 .... | 6 |          each lane makes one piece ready
//   finish        2 -> 3 -> (4)               started in order, not waiting for each other

import type { Pending } from '../block/device.ts'

export interface Lane {
  readonly buffer: Uint8Array
  /** Counts the lanes from 0. */
  readonly index: number
}

export interface LaneWork {
  ready(lane: Lane): Pending
  finish(lane: Lane): Pending
}

export class Lanes {
  readonly #free: Lane[]
  readonly #count: number
  readonly #inOrder: boolean
  /** Until the finish of every earlier piece has begun; undefined when it has. */
  #turn: Promise<void> | undefined
  #failure: { readonly error: unknown } | undefined
  #wake: (() => void) | undefined

  /** `bytes` of each buffer. Without `inOrder` pieces are finished as they become ready. */
  constructor(count: number, bytes: number, inOrder = true) {
    this.#free = Array.from({ length: count }, (_, index) => ({ index, buffer: Buffer.allocUnsafeSlow(bytes) }))
    this.#count = count
    this.#inOrder = inOrder
  }

  /** Starts a piece; the promise waits for a free lane, not for the piece. Fails with what an earlier piece failed with. */
  start(work: LaneWork): Pending {
    this.#throwFailure()
    const lane = this.#free.pop()
    if (lane === undefined) return this.#laneFreed().then(() => this.start(work))
    try {
      const wait = this.#run(work, lane)
      if (wait === undefined) this.#free.push(lane)
      else void this.#follow(wait, lane)
    } catch (error) {
      this.#fail(error)
      this.#free.push(lane)
    }
    return undefined
  }

  /** Waits until every piece is done. Fails with what the first one failed with, when none is at work any more. */
  async drain(): Promise<void> {
    while (this.#free.length < this.#count) await this.#laneFreed()
    this.#throwFailure()
  }

  #run(work: LaneWork, lane: Lane): Pending {
    const ready = work.ready(lane)
    const turn = this.#inOrder ? this.#turn : undefined
    if (ready === undefined && turn === undefined) return work.finish(lane)
    const begun = Promise.all([ready, turn]).then(() => {
      // A later piece must not be finished when this one could not: the target then ends here.
      this.#throwFailure()
      return { finished: work.finish(lane) }
    })
    const passed: Promise<void> = begun
      .then(undefined, (error: unknown) => this.#fail(error))
      .then(() => {
        // The fast way is open again when nobody waits for this piece.
        if (this.#turn === passed) this.#turn = undefined
      })
    this.#turn = passed
    return begun.then(({ finished }) => finished)
  }

  async #follow(wait: Promise<void>, lane: Lane): Promise<void> {
    try {
      await wait
    } catch (error) {
      this.#fail(error)
    }
    this.#free.push(lane)
    this.#wake?.()
  }

  #fail(error: unknown): void {
    this.#failure ??= { error }
  }

  #laneFreed(): Promise<void> {
    return new Promise((resolve) => {
      this.#wake = resolve
    })
  }

  #throwFailure(): void {
    if (this.#failure !== undefined) throw this.#failure.error
  }
}
