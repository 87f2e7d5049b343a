import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { Clock } from '../base/clock.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { Job, type JobState, type JobVerb, mayMove, MOVES, VERBS, verbsIn } from './job.ts'
import type { JobTerms } from './terms.ts'

const STATES = Object.keys(MOVES) as JobState[]
const ALL_VERBS = Object.keys(VERBS) as JobVerb[]

/** How a new job gets into each state, by the moves of its work. */
const WAY_TO: Record<JobState, readonly JobState[]> = {
  created: [],
  running: ['running'],
  paused: ['running', 'paused'],
  pending: ['running', 'pending'],
  ready: ['running', 'ready'],
  standby: ['running', 'ready', 'standby'],
  finalizing: ['running', 'finalizing'],
  aborting: ['running', 'aborting'],
  concluded: ['running', 'finalizing', 'concluded'],
}

/** What a verb makes of each state; a state that is not here refuses it. */
const AFTER: Record<JobVerb, Partial<Record<JobState, JobState>>> = {
  pause: { running: 'paused', ready: 'standby' },
  resume: { paused: 'running', standby: 'ready' },
  cancel: {
    created: 'aborting',
    running: 'aborting',
    paused: 'aborting',
    pending: 'aborting',
    ready: 'aborting',
    standby: 'aborting',
  },
  finalize: { pending: 'running' },
  complete: { ready: 'ready' },
  'set-speed': {
    created: 'created',
    running: 'running',
    paused: 'paused',
    pending: 'pending',
    ready: 'ready',
    standby: 'standby',
  },
}

/** A clock that stands still until it is moved; sleepers wake when their time has come. */
class ManualClock implements Clock {
  #now = 0
  readonly #sleepers: { readonly at: number; readonly wake: () => void }[] = []

  now(): number {
    return this.#now
  }

  wall(): number {
    return 1_000_000 + this.#now
  }

  sleep(delayMs: number): Promise<void> {
    return new Promise((wake) => this.#sleepers.push({ at: this.#now + delayMs, wake }))
  }

  async advance(byMs: number): Promise<void> {
    this.#now += byMs
    for (const sleeper of this.#sleepers) if (sleeper.at <= this.#now) sleeper.wake()
    await settle()
  }
}

/** Lets all that can go on without the clock go on. */
async function settle(): Promise<void> {
  for (let i = 0; i < 10; i++) await Promise.resolve()
}

function jobIn(state: JobState, speed = 0, clock: Clock = new ManualClock()): Job {
  const terms = { speed, ...(state === 'pending' ? { finalize: 'manual' as const } : {}) }
  const job = new Job({ id: 'commit-1', kind: 'commit', subject: 'vm1', terms, clock })
  for (const next of WAY_TO[state]) {
    // A pause is the user's: it is said, not moved to.
    if (next === 'paused' || next === 'standby') job.pause()
    else if (next === 'pending') job.mayTakeEffect().catch(() => undefined)
    else job.move(next)
  }
  assert.equal(job.state, state)
  return job
}

function say(job: Job, verb: JobVerb): void {
  if (verb === 'set-speed') job.setSpeed(5)
  else job[verb]()
}

/** Whether a promise is still pending when all that can happen at this time has happened. */
async function isWaiting(promise: Promise<unknown>): Promise<boolean> {
  let isOver = false
  promise.then(
    () => (isOver = true),
    () => (isOver = true),
  )
  await settle()
  return !isOver
}

for (const state of STATES) {
  test(`a job that is ${state} names the verbs that may be said, and moves only where its table says`, () => {
    const { status } = jobIn(state)
    assert.equal(status.state, state)
    assert.deepEqual(
      status.verbs,
      ALL_VERBS.filter((verb) => AFTER[verb][state] !== undefined),
    )
    for (const to of STATES) {
      const job = jobIn(state)
      const isLegal = (MOVES[state] as readonly JobState[]).includes(to)
      assert.equal(mayMove(state, to), isLegal)
      if (isLegal) job.move(to)
      else assert.throws(() => job.move(to), { name: 'AssertionError' })
      assert.equal(job.state, isLegal ? to : state)
    }
  })

  for (const verb of ALL_VERBS) {
    const after = AFTER[verb][state]
    const outcome = after === undefined ? 'is refused with what can be said' : `makes it ${after}`
    test(`${verb} of a job that is ${state} ${outcome}`, () => {
      const job = jobIn(state)
      const before = job.status
      if (after !== undefined) {
        say(job, verb)
        assert.equal(job.state, after)
        return
      }
      assert.throws(
        () => say(job, verb),
        (error) => isBlockError(error, 'busy') && error.message.includes(`is ${state}: ${verb} cannot be said now`),
      )
      assert.deepEqual(job.status, before)
    })
  }
}

test('every state is reached from created, ends in concluded, and no verb is legal at the end', () => {
  const reached = new Set<JobState>(['created'])
  for (const state of reached) for (const next of MOVES[state]) reached.add(next)
  assert.deepEqual([...reached].sort(), [...STATES].sort())
  for (const state of STATES) if (state !== 'concluded') assert.ok(MOVES[state].length > 0)
  assert.deepEqual(verbsIn('concluded'), [])
})

test('a pause holds the work at its next pause point until it is resumed', async () => {
  const job = jobIn('running')
  await job.pausePoint(1000)
  job.pause()
  const held = job.pausePoint(1000)
  assert.ok(await isWaiting(held))
  job.resume()
  await held
  assert.equal(job.state, 'running')
})

test('a job that was paused and resumed before its pause point is not held', async () => {
  const job = jobIn('running')
  job.pause()
  job.resume()
  await job.pausePoint(0)
})

test('a job paused again right after its resume is held again', async () => {
  const job = jobIn('paused')
  const held = job.pausePoint(0)
  await settle()
  job.resume()
  job.pause()
  assert.ok(await isWaiting(held))
  job.resume()
  await held
})

test('a cancel ends the work at its pause point, also one that holds, with kind cancelled', async () => {
  for (const state of ['running', 'paused', 'standby'] as const) {
    const job = jobIn(state)
    const held = state === 'running' ? undefined : job.pausePoint(0)
    await settle()
    job.cancel()
    await assert.rejects(held ?? job.pausePoint(0), (error) => isBlockError(error, 'cancelled'))
    assert.equal(job.status.error?.kind, 'cancelled')
  }
})

test('an error that can be mended pauses the job with its reason, and a resume forgets it', async () => {
  const job = jobIn('running')
  job.pauseOnError(new BlockError('no-space', 'the disk is full'))
  assert.equal(job.state, 'paused')
  assert.deepEqual(job.status.error, { kind: 'no-space', message: 'the disk is full' })
  const held = job.pausePoint(0)
  assert.ok(await isWaiting(held))
  job.resume()
  await held
  assert.equal(job.status.error, undefined)
})

test('an error that can be mended finds a job that its user paused, or cancelled, meanwhile', async () => {
  const full = new BlockError('no-space', 'the disk is full')
  const paused = jobIn('paused')
  paused.pauseOnError(full)
  assert.equal(paused.status.error?.kind, 'no-space')
  const held = paused.pausePoint(0)
  assert.ok(await isWaiting(held))
  paused.resume()
  await held

  const cancelled = jobIn('running')
  cancelled.cancel()
  cancelled.pauseOnError(full)
  await assert.rejects(cancelled.pausePoint(0), (error) => isBlockError(error, 'cancelled'))
})

test('a cancelled job says that it was cancelled, whatever it waited for', () => {
  const job = jobIn('running')
  job.pauseOnError(new BlockError('no-space', 'the disk is full'))
  job.cancel()
  assert.equal(job.status.error?.kind, 'cancelled')
})

test('a suspended job ends at its pause point with kind closed, whether it ran, was paused or waited for its speed', async () => {
  const running = jobIn('running')
  running.suspend()
  await assert.rejects(running.pausePoint(1000), (error) => isBlockError(error, 'closed'))
  for (const job of [jobIn('paused'), jobIn('running', 10)]) {
    const held = job.pausePoint(1000)
    assert.ok(await isWaiting(held))
    job.suspend()
    await assert.rejects(held, (error) => isBlockError(error, 'closed'))
    assert.ok(job.suspended)
    assert.equal(job.status.error, undefined)
  }
})

test('a speed limit holds each piece until the bytes before it have had their time, beyond a small burst', async () => {
  const clock = new ManualClock()
  const job = jobIn('running', 1000, clock)
  await clock.advance(10_000)
  const first = job.pausePoint(1000)
  assert.ok(await isWaiting(first), 'a second’s worth of bytes takes a second, less the burst')
  await clock.advance(899)
  assert.ok(await isWaiting(first))
  await clock.advance(1)
  await first
  const second = job.pausePoint(500)
  await clock.advance(499)
  assert.ok(await isWaiting(second))
  await clock.advance(1)
  await second
})

test('without a limit nothing waits', async () => {
  const job = jobIn('running', 0)
  for (let i = 0; i < 10; i++) await job.pausePoint(2 ** 40)
})

test('a new speed counts at once, also for a piece that waits', async () => {
  const clock = new ManualClock()
  const job = jobIn('running', 1, clock)
  const slow = job.pausePoint(1_000_000)
  assert.ok(await isWaiting(slow))
  job.setSpeed(0)
  await slow
  assert.equal(job.status.speed, 0)
  job.setSpeed(1000)
  const limited = job.pausePoint(1000)
  assert.ok(await isWaiting(limited))
  await clock.advance(1000)
  await limited
})

test('a cancel does not wait for the speed limit', async () => {
  const job = jobIn('running', 1)
  const slow = job.pausePoint(1_000_000)
  assert.ok(await isWaiting(slow))
  job.cancel()
  await assert.rejects(slow, (error) => isBlockError(error, 'cancelled'))
})

test('a failure is the job’s error, and any error of the system has a kind', () => {
  const job = jobIn('running')
  job.fail(Object.assign(new Error('EIO: i/o error, write'), { code: 'EIO' }))
  assert.equal(job.state, 'aborting')
  assert.deepEqual(job.status.error, { kind: 'io', message: 'job commit-1: i/o error' })
})

test('watchers hear of every change until they stop, and the end has a time', async () => {
  const clock = new ManualClock()
  const job = new Job({ id: 'backup-1', kind: 'backup', subject: 'vm1', clock, details: { a: 1 } })
  const seen: string[] = []
  const stop = job.watch(({ status }) => seen.push(`${status.state} ${status.done}/${status.total}`))
  job.move('running')
  job.resumeFrom(10, 100)
  job.advance(40, 50)
  job.describe({ b: 2 })
  await clock.advance(500)
  job.move('finalizing')
  stop()
  job.move('concluded')
  assert.deepEqual(seen, ['running 0/0', 'running 10/100', 'running 50/100', 'running 50/100', 'finalizing 50/100'])
  const { resumedAt, details, startedMs, endedMs } = job.status
  assert.deepEqual(
    { resumedAt, details, startedMs, endedMs },
    {
      resumedAt: 10,
      details: { a: 1, b: 2 },
      startedMs: 1_000_000,
      endedMs: 1_000_500,
    },
  )
})

test('a job that is idle goes on when it is nudged, cancelled or suspended, or when its time is over', async () => {
  const clock = new ManualClock()
  const wakers: Record<string, (job: Job) => unknown> = {
    nudge: (job) => job.nudge(),
    complete: (job) => job.complete(),
    cancel: (job) => job.cancel(),
    suspend: (job) => job.suspend(),
    time: () => clock.advance(100),
  }
  for (const [name, wake] of Object.entries(wakers)) {
    const job = jobIn('ready', 0, clock)
    const idle = job.idle(100)
    assert.equal(await isWaiting(idle), true, name)
    await wake(job)
    assert.equal(await isWaiting(idle), false, name)
  }
})

test('an error that can be mended puts a job that is ready on standby, and a resume has it ready again', async () => {
  const job = jobIn('ready')
  job.pauseOnError(new BlockError('timeout', 'the target is away'))
  assert.equal(job.state, 'standby')
  const waiting = job.pausePoint(0)
  assert.equal(await isWaiting(waiting), true)
  job.resume()
  await waiting
  assert.equal(job.state, 'ready')
  assert.equal(job.error, undefined)
})

test('a result that is finalized by hand waits in pending, and what came up meanwhile is looked at before it takes effect', async () => {
  const terms = { finalize: 'manual' } as const
  const job = new Job({ id: 'commit-1', kind: 'commit', subject: 'vm1', terms, clock: new ManualClock() })
  job.move('running')
  const waiting = job.mayTakeEffect()
  assert.equal(await isWaiting(waiting), true)
  assert.equal(job.state, 'pending')
  job.finalize()
  assert.equal(await waiting, false)
  assert.equal(job.state, 'running')
  assert.equal(await job.mayTakeEffect(), true)
})

test('a result takes effect by itself unless told, and after a restart when that was said before', async () => {
  const told = { finalize: 'manual' } as const
  for (const options of [{}, { terms: told, finalized: true }]) {
    const job = new Job({ id: 'commit-1', kind: 'commit', subject: 'vm1', clock: new ManualClock(), ...options })
    job.move('running')
    assert.equal(await job.mayTakeEffect(), true)
  }
})

test('a job that is pending is cancelled and suspended like one that is paused', async () => {
  for (const [end, kind] of [
    ['cancel', 'cancelled'],
    ['suspend', 'closed'],
  ] as const) {
    const terms = { finalize: 'manual' } as const
    const job = new Job({ id: 'commit-1', kind: 'commit', subject: 'vm1', terms, clock: new ManualClock() })
    job.move('running')
    const waiting = job.mayTakeEffect()
    await settle()
    job[end]()
    await assert.rejects(waiting, (error) => isBlockError(error, kind))
  }
})

test('what is done never goes back, whatever the guests make to do again, and the rest time counts that', async () => {
  const clock = new ManualClock()
  const job = jobIn('running', 0, clock)
  job.expect(10_000)
  let left = 10_000
  let before = 0
  for (let second = 0; second < 22; second++) {
    await clock.advance(1000)
    // 500 are copied and 300 made to do again, and at last nothing is gained any more.
    left += second < 10 ? -200 : 0
    job.advance(500, left)
    const { done, total } = job.status
    assert.ok(done > before)
    assert.equal(total - done, left)
    before = done
    if (second === 9) assert.equal(Math.round((job.status.restMs ?? 0) / 1000), 40)
  }
  assert.equal(job.status.restMs, undefined)
})

test('a job that is paused says no rest time, and afterwards only what it saw since', async () => {
  const clock = new ManualClock()
  const job = jobIn('running', 0, clock)
  job.expect(1000)
  for (let left = 900; left >= 500; left -= 100) {
    await clock.advance(1000)
    job.advance(100, left)
  }
  assert.equal(job.status.restMs, 5000)
  job.pause()
  assert.equal(job.status.restMs, undefined)
  await clock.advance(100_000)
  job.resume()
  assert.equal(job.status.restMs, undefined)
  for (let left = 450; left >= 300; left -= 50) {
    job.advance(50, left)
    await clock.advance(1000)
  }
  assert.equal(Math.round((job.status.restMs ?? 0) / 1000), 8)
})

test('an ended job leaves the list by itself unless it failed, or was to be dismissed by hand', () => {
  const ended = (terms: JobTerms, end: (job: Job) => void): boolean => {
    const job = new Job({ id: 'commit-1', kind: 'commit', subject: 'vm1', terms, clock: new ManualClock() })
    job.move('running')
    end(job)
    assert.equal(job.status.dismissed, false)
    if (job.state === 'running') job.move('finalizing')
    job.move('concluded')
    return job.status.dismissed
  }
  const succeeds = (): void => undefined
  const fails = (job: Job): void => job.fail(new BlockError('io', 'the storage says so'))
  const isCancelled = (job: Job): void => job.cancel()
  assert.deepEqual(
    [succeeds, isCancelled, fails].map((end) => ended({}, end)),
    [true, true, false],
  )
  assert.deepEqual(
    [succeeds, isCancelled, fails].map((end) => ended({ dismiss: 'manual' }, end)),
    [false, false, false],
  )
})
