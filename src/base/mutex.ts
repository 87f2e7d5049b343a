// Waiting in line inside one thread: Mutex (one holder), and RangeLocks (byte ranges; overlapping holders wait).
// Both are fair: first come, first served. Neither knows time limits or priorities.

import { assert } from './assert.ts'

export class Mutex {
  #held = false
  readonly #waiters: (() => void)[] = []

  /** Takes the mutex at once when it is free, and says whether it did. */
  tryAcquire(): boolean {
    if (this.#held) return false
    this.#held = true
    return true
  }

  acquire(): Promise<void> | undefined {
    if (this.tryAcquire()) return undefined
    return new Promise((resolve) => this.#waiters.push(resolve))
  }

  release(): void {
    assert(this.#held, 'release of a free mutex')
    const next = this.#waiters.shift()
    if (next === undefined) this.#held = false
    else next()
  }

  /** Runs `work` while holding the mutex. */
  async run<T>(work: () => Promise<T> | T): Promise<T> {
    const wait = this.acquire()
    if (wait !== undefined) await wait
    try {
      return await work()
    } finally {
      this.release()
    }
  }
}

interface RangeHold {
  readonly start: number
  readonly end: number
  readonly exclusive: boolean
  granted: boolean
  grant: (() => void) | undefined
}

interface RangeWatcher {
  readonly start: number
  readonly length: number
  readonly tell: () => void
}

/** A granted or waiting range, to be given back to `release`. */
export type RangeToken = object

/**
 * Locks on byte ranges. Shared holders of one range go together; an exclusive one goes alone. The list is as long as
 * the requests in flight, which the caller bounds, so it is searched in a line.
 */
export class RangeLocks {
  readonly #holds: RangeHold[] = []
  #watchers: RangeWatcher[] = []

  get idle(): boolean {
    return this.#holds.length === 0
  }

  /** True when an exclusive holder would have to wait for this range. */
  isBusy(start: number, length: number): boolean {
    return this.#holds.some((hold) => hold.start < start + length && start < hold.end)
  }

  /** Visits each range that somebody holds or awaits. */
  visitBusy(visit: (start: number, length: number) => void): void {
    for (const { start, end } of this.#holds) visit(start, end - start)
  }

  /**
   * Resolves when nobody holds or awaits any of the range, which must be busy now. Takes nothing: whoever waited looks again,
   * and of several one goes on. (Were the range taken and given back, two that wait could keep each other waiting for ever.)
   */
  whenIdle(start: number, length: number): Promise<void> {
    assert(this.isBusy(start, length), 'the range is busy')
    return new Promise((tell) => this.#watchers.push({ start, length, tell }))
  }

  /** The token at once, or undefined when a holder that came before conflicts. */
  tryAcquire(start: number, length: number, exclusive: boolean): RangeToken | undefined {
    const hold: RangeHold = { start, end: start + length, exclusive, granted: true, grant: undefined }
    if (this.#conflicts(hold, this.#holds.length)) return undefined
    this.#holds.push(hold)
    return hold
  }

  /** Resolves with the token when the range is free of conflicting holders that came before. */
  async acquire(start: number, length: number, exclusive: boolean): Promise<RangeToken> {
    const hold: RangeHold = { start, end: start + length, exclusive, granted: false, grant: undefined }
    const mustWait = this.#conflicts(hold, this.#holds.length)
    this.#holds.push(hold)
    if (mustWait) await new Promise<void>((resolve) => (hold.grant = resolve))
    else hold.granted = true
    return hold
  }

  release(token: RangeToken): void {
    const index = this.#holds.indexOf(token as RangeHold)
    assert(index >= 0, 'release of a range that is not held')
    this.#holds.splice(index, 1)
    for (let i = 0; i < this.#holds.length; i++) {
      const hold = this.#holds[i] as RangeHold
      if (hold.granted || this.#conflicts(hold, i)) continue
      hold.granted = true
      hold.grant?.()
    }
    if (this.#watchers.length > 0) this.#tellWatchers()
  }

  #tellWatchers(): void {
    const told = this.#watchers.filter(({ start, length }) => !this.isBusy(start, length))
    this.#watchers = this.#watchers.filter((watcher) => !told.includes(watcher))
    for (const { tell } of told) tell()
  }

  #conflicts(hold: RangeHold, before: number): boolean {
    for (let i = 0; i < before; i++) {
      const other = this.#holds[i] as RangeHold
      const overlap = other.start < hold.end && hold.start < other.end
      if (overlap && (hold.exclusive || other.exclusive)) return true
    }
    return false
  }
}
