// What all jobs that share a line may copy in a second, together. Each pays for its bytes into one account of the time at which the line
// is free again, in cells that may be shared memory: the jobs of several threads keep to one limit. First come, first served, by
// pieces, so that jobs that copy at once get about the same, and one that copies nothing leaves its part to the others.
//
//   cells   | KiB per second, 0 is no limit | free again at | changes of the limit |

import { SPEED_BURST_MS } from '../base/limits.ts'

const RATE = 0
const FREE_AT = 1
const CHANGES = 2
const CELLS = 3
/** Times are in units of so many milliseconds, on a clock that all threads share; they wrap, and only differences count. */
const UNIT_MS = 0.01
/** What a byte takes at one KiB per second. */
const BYTE_UNITS = 1000 / UNIT_MS / 1024
/** Whoever waits asks again after so many milliseconds: the limit may be another one by then. */
const ASK_AGAIN_MS = 250

export class Bandwidth {
  /** To be handed to other threads. */
  readonly cells: Int32Array
  readonly #now: () => number

  /** `nowMs` is the same clock in all threads. */
  constructor(cells?: Int32Array, nowMs: () => number = sharedClock) {
    this.cells = cells ?? new Int32Array(new SharedArrayBuffer(CELLS * Int32Array.BYTES_PER_ELEMENT))
    this.#now = () => Math.floor(nowMs() / UNIT_MS) | 0
  }

  /** Bytes per second, in whole KiB; 0 is no limit. */
  get limit(): number {
    return Atomics.load(this.cells, RATE) * 1024
  }

  /** What was paid by an old limit is forgotten. */
  set limit(bytesPerSecond: number) {
    Atomics.store(this.cells, RATE, Math.min(2 ** 31 - 1, Math.ceil(bytesPerSecond / 1024)))
    Atomics.store(this.cells, FREE_AT, this.#now())
    Atomics.add(this.cells, CHANGES, 1)
  }

  /** A job's part of it. */
  share(): BandwidthShare {
    return new BandwidthShare(this.cells, this.#now)
  }
}

class BandwidthShare {
  readonly #cells: Int32Array
  readonly #now: () => number
  /** When this job may go on, by the limit of that many changes; undefined while nothing holds it. */
  #mayGoOnAt: number | undefined
  #changes = 0

  constructor(cells: Int32Array, now: () => number) {
    this.#cells = cells
    this.#now = now
  }

  /** How many milliseconds the job is to wait when it has copied so many bytes since it asked last; it then asks again. */
  waitMs(bytes: number): number {
    const kibPerSecond = Atomics.load(this.#cells, RATE)
    const changes = Atomics.load(this.#cells, CHANGES)
    if (changes !== this.#changes) this.#mayGoOnAt = undefined
    this.#changes = changes
    if (kibPerSecond === 0) return 0
    const now = this.#now()
    if (bytes > 0) this.#mayGoOnAt = this.#pay(now, Math.ceil((bytes / kibPerSecond) * BYTE_UNITS))
    if (this.#mayGoOnAt === undefined) return 0
    return Math.min(ASK_AGAIN_MS, Math.max(0, ((this.#mayGoOnAt - now) | 0) * UNIT_MS))
  }

  /** Takes the line for so many units, after whoever has it; returns when that is over. */
  #pay(now: number, units: number): number {
    const earliest = (now - SPEED_BURST_MS / UNIT_MS) | 0
    let freeAt = Atomics.load(this.#cells, FREE_AT)
    for (;;) {
      const from = ((freeAt - earliest) | 0) < 0 ? earliest : freeAt
      const until = (from + units) | 0
      const found = Atomics.compareExchange(this.#cells, FREE_AT, freeAt, until)
      if (found === freeAt) return until
      freeAt = found
    }
  }
}

/** Milliseconds of the machine's monotonic clock, whose zero all threads share. */
function sharedClock(): number {
  const [seconds, nanoseconds] = process.hrtime()
  return seconds * 1000 + nanoseconds / 1e6
}

export type { BandwidthShare }
