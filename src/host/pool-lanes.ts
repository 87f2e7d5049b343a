// Who may have how many requests in Node's thread pool, which is one for the process: a thread of disks has a share of it, and each
// of its files as many lanes of that share as are still free, but always one. So one slow file takes half of the share, two a third
// each, and there is always a lane for the next. Syncs, which take longest, have a part of the share. Sizes the pool, too.

import { POOL_LANES, POOL_SYNC_SHARE, POOL_THREADS_MAX } from '../base/limits.ts'

/** What libuv starts unless told. */
const USUAL_THREADS = 4

/** A pool of the user's own size is left alone. */
const told = process.env['UV_THREADPOOL_SIZE']

function threadsNow(): number {
  const threads = Math.floor(Number(process.env['UV_THREADPOOL_SIZE'] ?? USUAL_THREADS))
  return Number.isFinite(threads) ? Math.min(Math.max(threads, 1), 1024) : USUAL_THREADS
}

/** Sizes the pool for so many threads that work with files, and returns the lanes of each. To be called before the first use of the pool. */
export function sizePool(sharers: number): number {
  const threads = told === undefined ? Math.min(sharers * POOL_LANES, POOL_THREADS_MAX) : threadsNow()
  process.env['UV_THREADPOOL_SIZE'] = String(threads)
  poolLanes.total = Math.max(1, Math.floor(threads / sharers))
  return poolLanes.total
}

/** The lanes of one thread of JavaScript. */
export class PoolLanes {
  /** Requests of this thread that the pool works on at once. */
  total: number
  #used = 0
  #syncs = 0
  readonly #waitingSyncs: (() => void)[] = []

  constructor(total: number) {
    this.total = total
  }

  get free(): number {
    return this.total - this.#used
  }

  /** For FileLanes: one more, or one less, is in the pool. */
  count(change: 1 | -1): void {
    this.#used += change
  }

  /** Runs a sync, when its turn comes. */
  async sync(work: () => Promise<void>): Promise<void> {
    if (this.#syncs >= Math.max(1, Math.floor(this.total * POOL_SYNC_SHARE))) {
      await new Promise<void>((resolve) => this.#waitingSyncs.push(resolve))
    } else this.#syncs++
    this.#used++
    try {
      await work()
    } finally {
      this.#used--
      const next = this.#waitingSyncs.shift()
      if (next === undefined) this.#syncs--
      else next()
    }
  }
}

/** Those of this thread. */
export const poolLanes = new PoolLanes(threadsNow())

/** The lanes of one file. Requests that find none free wait in line for one of the file's own; the caller bounds the line. */
export class FileLanes {
  readonly #thread: PoolLanes
  readonly #waiting: (() => void)[] = []
  #used = 0
  #whenIdle: (() => void) | undefined

  constructor(thread: PoolLanes = poolLanes) {
    this.#thread = thread
  }

  /** Runs `start` when there is a lane: at once, or when a request of the file ends. Each `start` is followed by one `leave`. */
  enter(start: () => void): void {
    if (this.#mayEnter) this.#begin(start)
    else this.#waiting.push(start)
  }

  leave(): void {
    this.#used--
    this.#thread.count(-1)
    while (this.#mayEnter) {
      const next = this.#waiting.shift()
      if (next === undefined) break
      this.#begin(next)
    }
    if (this.#used === 0) this.#whenIdle?.()
  }

  /** Resolves when nothing of the file is in the pool or waits for it. To be called once. */
  idle(): Promise<void> | undefined {
    return this.#used === 0 ? undefined : new Promise((resolve) => (this.#whenIdle = resolve))
  }

  get #mayEnter(): boolean {
    return this.#used === 0 || this.#used < this.#thread.free
  }

  #begin(start: () => void): void {
    this.#used++
    this.#thread.count(1)
    start()
  }
}
