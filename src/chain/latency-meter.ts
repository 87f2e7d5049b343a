// How long a disk's guests wait for their data, while somebody wants to know: requests answered, and the time that all of them spent
// waiting together. What waited divided by what was answered is the mean latency (Little's law), also while a request is still stuck.
//
//   under way   ._.=====.__._       the area is the time waited; an answer within the call adds none

export class LatencyMeter {
  readonly #now: () => number
  /** Requests answered so far. */
  answered = 0
  #waitedMs = 0
  #underWay = 0
  #sinceMs = 0

  /** `now` in milliseconds, for tests. */
  constructor(now: () => number = () => performance.now()) {
    this.#now = now
  }

  /** Milliseconds that requests waited so far, those under way included. */
  waitedMs(): number {
    if (this.#underWay > 0) this.#add()
    return this.#waitedMs
  }

  begin(): void {
    this.#add()
    this.#underWay++
  }

  end(): void {
    this.#add()
    this.#underWay--
    this.answered++
  }

  #add(): void {
    const now = this.#now()
    this.#waitedMs += this.#underWay * (now - this.#sinceMs)
    this.#sinceMs = now
  }
}
