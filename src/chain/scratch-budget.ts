// How much old data may be kept at once: of one disk, or of all of a host together. The cells may be shared memory, so that the disks
// of several threads take from one budget; each thread's part is counted too, and comes back when the thread dies.
//
//   cells   | limit | used | peak | part 0 | part 1 | ...      in granules

import { assert } from '../base/assert.ts'
import { GRANULE } from '../base/limits.ts'

const LIMIT = 0
const USED = 1
const PEAK = 2
const PARTS = 3
/** A cell holds no more. */
const GRANULES_MAX = 2 ** 31 - 1

export class ScratchBudget {
  /** To be handed to other threads, when they were made for them. */
  readonly cells: Int32Array
  readonly #part: number

  /** A limit in bytes of its own; `threads` of them may share it, this one as the first. */
  static of(limit: number, threads: number): ScratchBudget {
    const cells = new Int32Array(new SharedArrayBuffer((PARTS + threads) * Int32Array.BYTES_PER_ELEMENT))
    const budget = new ScratchBudget(cells, 0)
    budget.limit = limit
    return budget
  }

  /** The budget of these cells, for the thread of that number. */
  constructor(cells: Int32Array, thread: number) {
    this.cells = cells
    this.#part = PARTS + thread
    assert(this.#part < cells.length, 'each thread has its cell')
  }

  /** Bytes. A new limit holds for what is taken from now on. */
  get limit(): number {
    return Atomics.load(this.cells, LIMIT) * GRANULE
  }

  set limit(bytes: number) {
    Atomics.store(this.cells, LIMIT, Math.min(GRANULES_MAX, Math.floor(bytes / GRANULE)))
  }

  /** Bytes in use by all threads, and the most that ever were. */
  get used(): number {
    return Atomics.load(this.cells, USED) * GRANULE
  }

  get peak(): number {
    return Atomics.load(this.cells, PEAK) * GRANULE
  }

  /** Takes whole granules, in bytes, or says that there is no room. */
  take(bytes: number): boolean {
    assert(bytes % GRANULE === 0, 'scratch is taken in granules')
    const { cells } = this
    const count = bytes / GRANULE
    let used = Atomics.load(cells, USED)
    for (;;) {
      if (used + count > Atomics.load(cells, LIMIT)) return false
      const found = Atomics.compareExchange(cells, USED, used, used + count)
      if (found === used) break
      used = found
    }
    Atomics.add(cells, this.#part, count)
    this.#raisePeak(used + count)
    return true
  }

  give(bytes: number): void {
    const count = bytes / GRANULE
    const had = Atomics.sub(this.cells, this.#part, count)
    assert(had >= count, 'scratch given back once')
    Atomics.sub(this.cells, USED, count)
  }

  /** A thread is gone, and its scratch with it. */
  reclaim(thread: number): void {
    Atomics.sub(this.cells, USED, Atomics.exchange(this.cells, PARTS + thread, 0))
  }

  #raisePeak(used: number): void {
    let peak = Atomics.load(this.cells, PEAK)
    while (peak < used) {
      const found = Atomics.compareExchange(this.cells, PEAK, peak, used)
      if (found === peak) return
      peak = found
    }
  }
}
