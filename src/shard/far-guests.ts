// The guests of a disk in another thread, as a job of this one hears of them: what they wait there is asked for now and then, by message.
// What the job sees is so much late, and never goes back, whatever becomes of the other thread.

import { COURTESY_ASK_MS } from '../base/limits.ts'
import type { GuestEar } from '../engine/guest-ears.ts'
import type { GuestsHeard } from '../job/courtesy.ts'
import type { Remote } from './calls.ts'
import type { GuestFunctions } from './messages.ts'

/** What the guests of a disk and its thread did so far, in milliseconds and requests. */
export interface GuestSample {
  readonly answered: number
  readonly waitedMs: number
  readonly activeMs: number
}

const NOTHING: GuestSample = { answered: 0, waitedMs: 0, activeMs: 0 }

export class FarGuests implements GuestEar {
  readonly heard: GuestsHeard
  readonly #remote: Remote<GuestFunctions>
  readonly #disk: string
  readonly #asker: number
  readonly #timer: NodeJS.Timeout
  #isAsking = false
  #last: GuestSample = NOTHING
  #sum: GuestSample = NOTHING

  /** `asker` is the number of this shard. Ends with `close`. */
  constructor(disk: string, asker: number, remote: Remote<GuestFunctions>) {
    this.#disk = disk
    this.#asker = asker
    this.#remote = remote
    const sum = (): GuestSample => this.#sum
    this.heard = {
      get answered(): number {
        return sum().answered
      },
      waitedMs: () => sum().waitedMs,
      activeMs: () => sum().activeMs,
    }
    this.#timer = setInterval(() => this.#ask(), COURTESY_ASK_MS).unref()
  }

  close(): void {
    clearInterval(this.#timer)
    // A thread that is gone hears nothing any more.
    this.#remote.guestsLeave(this.#disk, this.#asker).catch(() => undefined)
  }

  #ask(): void {
    if (this.#isAsking) return
    this.#isAsking = true
    this.#remote
      .guestsHear(this.#disk, this.#asker)
      .then((sample) => this.#add(sample))
      .catch(() => undefined)
      .finally(() => (this.#isAsking = false))
  }

  /** A thread that was started again counts from the beginning. */
  #add(sample: GuestSample): void {
    const grown = (name: keyof GuestSample): number => {
      const since = sample[name] - this.#last[name]
      return this.#sum[name] + (since >= 0 ? since : sample[name])
    }
    this.#sum = { answered: grown('answered'), waitedMs: grown('waitedMs'), activeMs: grown('activeMs') }
    this.#last = sample
  }
}
