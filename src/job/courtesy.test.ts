import assert from 'node:assert/strict'
import { test } from 'node:test'
import {
  COURTESY_BACKUP_LEAST,
  COURTESY_CROWDED_FLOOR,
  COURTESY_CROWDED_LEAST,
  COURTESY_FLOOR,
  COURTESY_LISTEN_EVERY_MS,
  COURTESY_RATIO,
} from '../base/limits.ts'
import { Courtesy } from './courtesy.ts'

const MIB = 1024 * 1024

/** A storage with a guest that asks so often a second, of which the job's copying takes its share: a request waits the longer for it. */
class Storage {
  now = 0
  answered = 0
  #waited = 0
  readonly requests: { readonly atMs: number; readonly latencyMs: number }[] = []
  guest: { readonly everyMs: number; readonly baseMs: number }
  /** How long a piece takes, and how much of that a request that comes meanwhile waits for; 0 is a storage that does not mind. */
  work: { readonly pieceMs: number; readonly suffers: number }
  #next = 0
  /** Part of the time that the thread is at work. */
  activePart = 0

  constructor(options: { everyMs: number; baseMs: number; suffers: number; pieceMs: number }) {
    this.guest = options
    this.work = options
  }

  waitedMs(): number {
    return this.#waited
  }

  activeMs(): number {
    return this.now * this.activePart
  }

  /** Copies one piece: requests that come meanwhile wait for it. */
  copy(): void {
    this.#pass(this.work.pieceMs, true)
  }

  /** Nothing is copied. */
  rest(forMs: number): void {
    this.#pass(forMs, false)
  }

  #pass(forMs: number, isCopying: boolean): void {
    const { everyMs, baseMs } = this.guest
    const end = this.now + forMs
    for (; this.#next < end; this.#next += everyMs) {
      const latencyMs = baseMs + (isCopying ? this.work.pieceMs * this.work.suffers : 0)
      this.answered++
      this.#waited += latencyMs
      this.requests.push({ atMs: this.#next, latencyMs })
    }
    this.now = end
  }

  meanSince(atMs: number): number {
    const latencies = this.requests.filter((request) => request.atMs >= atMs).map(({ latencyMs }) => latencyMs)
    return latencies.reduce((sum, latency) => sum + latency, 0) / latencies.length
  }
}

/** Copies pieces of 1 MiB for so long, as a job does; returns how many. */
function run(storage: Storage, courtesy: Courtesy, forMs: number): number {
  let pieces = 0
  for (const end = storage.now + forMs; storage.now < end; pieces++) {
    storage.copy()
    let moved = MIB
    for (let wait = courtesy.waitMs(storage.now, moved); wait > 0; wait = courtesy.waitMs(storage.now, moved)) {
      // As a timer would: no shorter than a millisecond.
      storage.rest(Math.max(1, wait))
      moved = 0
    }
  }
  return pieces
}

const SUFFERING = { everyMs: 2, baseMs: 1, suffers: 1, pieceMs: 5 }

test('a disk without a guest never slows a job', () => {
  const storage = new Storage({ ...SUFFERING, everyMs: Infinity })
  assert.equal(run(storage, new Courtesy([storage]), 60_000), 12_000)
})

test('a guest that does not suffer costs the job no more than the moments in which it listens', () => {
  for (const baseMs of [0, 1, 50]) {
    const storage = new Storage({ ...SUFFERING, baseMs, suffers: 0 })
    const pieces = run(storage, new Courtesy([storage]), 60_000)
    assert.ok(pieces > 12_000 * 0.97, `${pieces} pieces with ${baseMs} ms`)
  }
})

test('a guest that suffers gets what it may have within seconds, and the job goes on', () => {
  const storage = new Storage(SUFFERING)
  const courtesy = new Courtesy([storage])
  run(storage, courtesy, 5000)
  const began = storage.now
  const pieces = run(storage, courtesy, 60_000)
  assert.ok(storage.meanSince(began) < 1 * COURTESY_RATIO * 1.1, `a request takes ${storage.meanSince(began)} ms`)
  // With all of the time it would be 6 ms; half a millisecond more is a tenth of the time.
  assert.ok(pieces > 12_000 * 0.05, `${pieces} pieces`)
})

test('what a guest may suffer is so many times what it takes without the job as that says', () => {
  const storage = new Storage(SUFFERING)
  const courtesy = new Courtesy([storage], undefined, { ratio: 3 })
  run(storage, courtesy, 5000)
  const began = storage.now
  run(storage, courtesy, 60_000)
  const mean = storage.meanSince(began)
  assert.ok(mean > COURTESY_RATIO && mean < 3.3, `a request takes ${mean} ms`)
})

test('what was asked for is kept to, without listening', () => {
  const storage = new Storage(SUFFERING)
  const courtesy = new Courtesy([storage], 3)
  run(storage, courtesy, 5000)
  const began = storage.now
  run(storage, courtesy, 60_000)
  const mean = storage.meanSince(began)
  assert.ok(mean > 1.5 && mean < 3.3, `a request takes ${mean} ms`)
  assert.equal(courtesy.status?.targetMs, 3)
})

test('what cannot be had is not waited for: the job keeps a part of its pace, and ends', () => {
  const storage = new Storage(SUFFERING)
  const courtesy = new Courtesy([storage], 0.5)
  const pieces = run(storage, courtesy, 60_000)
  assert.ok(pieces >= 12_000 * COURTESY_FLOOR * 0.9, `${pieces} pieces`)
  assert.ok(pieces < 12_000 * COURTESY_FLOOR * 1.3, `${pieces} pieces`)
})

const CROWD = { ...SUFFERING, everyMs: 0.1, baseMs: 0, suffers: 0 }

test('guests that leave the thread no rest slow the job, though they are answered at once, and it ends', () => {
  const storage = new Storage({ ...CROWD, pieceMs: 0.5 })
  storage.activePart = 1
  const courtesy = new Courtesy([storage])
  run(storage, courtesy, 5000)
  const pieces = run(storage, courtesy, 60_000)
  assert.ok(pieces >= 120_000 * COURTESY_CROWDED_FLOOR * 0.9, `${pieces} pieces`)
  assert.ok(pieces < 120_000 * COURTESY_CROWDED_FLOOR * 1.3, `${pieces} pieces`)
})

test('a job that its syncs hold up does not crawl besides, because the thread has no rest', () => {
  const storage = new Storage(CROWD)
  storage.activePart = 1
  const courtesy = new Courtesy([storage])
  let pieces = 0
  for (let second = 0; second < 60; second++) {
    pieces += run(storage, courtesy, 500)
    // The last piece of this half second waits for a sync.
    storage.rest(500)
  }
  const least = (COURTESY_CROWDED_LEAST / MIB) * 30
  assert.ok(pieces >= least * 0.9, `${pieces} pieces`)
  assert.ok(pieces < least * 1.3, `${pieces} pieces`)
})

test('guests who ask much and get less than without the job slow it, though the thread has rest', () => {
  const storage = new Storage(CROWD)
  storage.activePart = 0.7
  // While a piece is copied, half of what the guest asks for is not served.
  const copy = storage.copy.bind(storage)
  storage.copy = () => {
    storage.guest = { ...CROWD, everyMs: 0.2 }
    copy()
    storage.guest = CROWD
  }
  const courtesy = new Courtesy([storage], undefined, { crowdedLeast: COURTESY_BACKUP_LEAST })
  run(storage, courtesy, 5000)
  const pieces = run(storage, courtesy, 60_000)
  assert.ok(pieces >= 12_000 * COURTESY_CROWDED_FLOOR * 0.9, `${pieces} pieces`)
  assert.ok(pieces < 12_000 * 0.5, `${pieces} pieces`)
})

test('what guests get without the job is heard anew soon after they are held back no longer', () => {
  const storage = new Storage(CROWD)
  storage.activePart = 0.7
  const copy = storage.copy.bind(storage)
  let isHeldBack = true
  storage.copy = () => {
    storage.guest = { ...CROWD, everyMs: isHeldBack ? 0.4 : 0.15 }
    copy()
    storage.guest = { ...CROWD, everyMs: isHeldBack ? 0.4 : 0.1 }
  }
  const courtesy = new Courtesy([storage], undefined, { crowdedLeast: COURTESY_BACKUP_LEAST })
  run(storage, courtesy, 1000)
  isHeldBack = false
  run(storage, courtesy, 2000)
  // Less than the 7 seconds until it would listen again by itself.
  const pieces = run(storage, courtesy, 5000)
  assert.ok(pieces < 1000 * 0.5, `${pieces} pieces`)
})

test('many requests are no crowd where the thread has rest, nor is a busy thread with few of them', () => {
  const rested = new Storage(CROWD)
  rested.activePart = 0.8
  const pieces = run(rested, new Courtesy([rested]), 60_000)
  assert.ok(pieces > 12_000 * 0.97, `${pieces} pieces`)
  const busy = new Storage({ ...CROWD, everyMs: 2 })
  busy.activePart = 1
  assert.equal(run(busy, new Courtesy([busy]), 60_000), 12_000)
})

test('the pace comes back when the guest goes', () => {
  const storage = new Storage(SUFFERING)
  const courtesy = new Courtesy([storage])
  run(storage, courtesy, 30_000)
  storage.guest = { everyMs: 1e9, baseMs: 0 }
  run(storage, courtesy, 10_000)
  const pieces = run(storage, courtesy, 10_000)
  assert.ok(pieces > 2000 * 0.97, `${pieces} pieces`)
})

test('a storage that became slower by itself is learned, and the job is not slowed for it', () => {
  const storage = new Storage({ ...SUFFERING, suffers: 0 })
  const courtesy = new Courtesy([storage])
  run(storage, courtesy, 20_000)
  storage.guest = { everyMs: 2, baseMs: 4 }
  run(storage, courtesy, 5 * COURTESY_LISTEN_EVERY_MS)
  const pieces = run(storage, courtesy, 10_000)
  assert.ok(pieces > 2000 * 0.97, `${pieces} pieces`)
})

test('a request that is stuck slows the job before it is answered', () => {
  const storage = new Storage({ ...SUFFERING, everyMs: Infinity })
  let waited = 0
  const stuck = { answered: 0, waitedMs: () => waited, activeMs: () => 0 }
  const courtesy = new Courtesy([stuck], 10)
  run(storage, courtesy, 1000)
  let slowed = 0
  for (let piece = 0; piece < 1000; piece++) {
    storage.copy()
    waited += 5
    const wait = courtesy.waitMs(storage.now, MIB)
    slowed += wait
    waited += wait
    storage.rest(wait)
  }
  assert.ok(slowed > 10_000, `it waited ${slowed} ms for 5 s of work`)
})

test('a job that began with holes, which are copied in no time, makes way when it comes to data', () => {
  const storage = new Storage({ ...SUFFERING, pieceMs: 0.05, suffers: 0 })
  const courtesy = new Courtesy([storage])
  run(storage, courtesy, 5000)
  storage.work = SUFFERING
  run(storage, courtesy, 8000)
  const began = storage.now
  const pieces = run(storage, courtesy, 30_000)
  assert.ok(storage.meanSince(began) < 1 * COURTESY_RATIO * 1.1, `a request takes ${storage.meanSince(began)} ms`)
  assert.ok(pieces > 6000 * 0.05, `${pieces} pieces`)
})

test('a job that has nothing to copy while its guests wait does not wait when there is something', () => {
  const storage = new Storage(SUFFERING)
  const courtesy = new Courtesy([storage], 0.5)
  for (let asked = 0; asked < 100; asked++) {
    storage.rest(100)
    assert.equal(courtesy.waitMs(storage.now, 0), 0)
  }
  assert.ok(run(storage, courtesy, 10_000) > 100)
})

test('guests of another thread slow the job as those of its own do, and so does a crowd in either', () => {
  const near = new Storage({ ...SUFFERING, everyMs: Infinity, pieceMs: 1 })
  const far = { answered: 0, waited: 0, active: 0 }
  const guests = { waitedMs: () => far.waited, activeMs: () => far.active }
  const heard = Object.defineProperty(guests, 'answered', { get: () => far.answered }) as typeof guests & {
    answered: number
  }
  const pieces = (perPiece: Partial<typeof far>): number => {
    const courtesy = new Courtesy([near, heard], 1)
    const began = near.now
    let count = 0
    for (; near.now < began + 20_000; count++) {
      near.copy()
      far.answered += perPiece.answered ?? 0
      far.waited += perPiece.waited ?? 0
      far.active += perPiece.active ?? 0
      near.rest(courtesy.waitMs(near.now, MIB))
    }
    return count
  }
  const free = pieces({ answered: 1, waited: 0.2, active: 0.2 })
  assert.ok(pieces({ answered: 1, waited: 10, active: 0.2 }) < free * 0.3)
  assert.ok(pieces({ answered: 4, active: 1 }) < free * 0.8)
})
