import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { BlockError } from '../block/error.ts'
import { BackupQueue, type TurnWish } from './backup-queue.ts'
import type { HostLimits } from './host-limits.ts'

const MIB = 1024 * 1024

interface Asked {
  state: 'waiting' | 'running' | 'given up'
  reason: string | undefined
  over: BlockError | undefined
}

/** A host whose queue is asked by hand. */
class Desk {
  limits: HostLimits = {
    machines: 1,
    scratchBytes: 100 * MIB,
    scratchHostBytes: 100 * MIB,
    scratchMemoryBytes: 0,
    bandwidth: 0,
    windows: [],
    windowEnd: 'finish',
  }
  used = 0
  readonly expected: Record<string, number> = {}
  now = new Date(2026, 2, 10, 12).getTime()
  readonly asked: Record<string, Asked> = {}
  readonly queue = new BackupQueue({
    limits: () => this.limits,
    scratchUsed: () => this.used,
    expected: ({ machine }) => this.expected[machine] ?? 0,
    clock: { wall: () => this.now },
  })
  #place = 0

  async ask(machine: string, wish: Partial<TurnWish> = {}): Promise<void> {
    const asked: Asked = { state: 'waiting', reason: undefined, over: undefined }
    this.asked[machine] = asked
    const place = ++this.#place
    const whole = { id: machine, machine, disks: [machine], full: false, place, queued: false, ...wish }
    const events = {
      waits: (reason: string | undefined): void => void (asked.reason = reason),
      over: (error: BlockError): void => void (asked.over = error),
    }
    void this.queue.take(whole, events).then(() => (asked.state = 'running'))
    await settled()
  }

  async give(machine: string): Promise<void> {
    this.queue.give(machine)
    await settled()
  }

  async look(): Promise<void> {
    this.queue.look()
    await settled()
  }

  get running(): string[] {
    return this.queue.running.map(({ machine }) => machine)
  }

  why(machine: string): string {
    return this.asked[machine]?.reason ?? ''
  }
}

/** All that was resolved has been heard. */
function settled(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve))
}

test('machines go one at a time, in the order of their places, and each is told why it waits', async () => {
  const desk = new Desk()
  await desk.ask('a')
  await desk.ask('b')
  await desk.ask('c')
  await desk.ask('first', { place: 0 })
  assert.deepEqual(desk.running, ['a'])
  assert.equal(desk.why('first'), '1 at a time: its turn comes after a')
  assert.equal(desk.why('c'), 'its turn comes after first, which waits')
  for (const next of ['first', 'b', 'c']) {
    await desk.give(desk.running[0] as string)
    assert.deepEqual(desk.running, [next])
    assert.equal(desk.asked[next]?.state, 'running')
    assert.equal(desk.why(next), '')
  }
  await desk.give('c')
  assert.equal(desk.queue.waiting, 0)
})

test('one that stops waiting lets the others through, and a turn is given back once', async () => {
  const desk = new Desk()
  await desk.ask('a')
  await desk.ask('b')
  await desk.ask('c')
  await desk.give('b')
  await desk.give('a')
  await desk.give('a')
  assert.deepEqual(desk.running, ['c'])
})

test('more machines at a time begin as soon as the limit says so, but never twice with one disk', async () => {
  const desk = new Desk()
  await desk.ask('a')
  await desk.ask('a again', { disks: ['x', 'a'] })
  await desk.ask('b')
  assert.deepEqual(desk.running, ['a'])
  desk.limits = { ...desk.limits, machines: 3 }
  await desk.look()
  assert.deepEqual(desk.running, ['a', 'b'])
  assert.equal(desk.why('a again'), 'job a backs up the same disk')
  await desk.give('a')
  assert.deepEqual(desk.running, ['b', 'a again'])
})

test('a machine whose expected scratch does not fit waits until it does, and nobody passes it', async () => {
  const desk = new Desk()
  desk.limits = { ...desk.limits, machines: 3 }
  Object.assign(desk.expected, { big: 80 * MIB, bigger: 50 * MIB, small: MIB })
  await desk.ask('big')
  await desk.ask('bigger')
  await desk.ask('small')
  assert.deepEqual(desk.running, ['big'])
  assert.equal(desk.why('bigger'), 'it is expected to take 50.0 MiB of scratch, and 20.0 MiB of 100.0 MiB are free')
  assert.equal(desk.why('small'), 'its turn comes after bigger, which waits')
  await desk.give('big')
  assert.deepEqual(desk.running, ['bigger', 'small'])
})

test('scratch that others hold counts, and a machine that is alone begins whatever is expected', async () => {
  const desk = new Desk()
  desk.expected['huge'] = 500 * MIB
  desk.used = 10 * MIB
  await desk.ask('huge')
  assert.match(desk.why('huge'), /expected to take 500.0 MiB of scratch, and 90.0 MiB/)
  desk.used = 0
  await desk.look()
  assert.deepEqual(desk.running, ['huge'])
})

test('queued machines begin within a window only, and one that is asked for by hand passes them', async () => {
  const desk = new Desk()
  desk.limits = { ...desk.limits, windows: ['22:00-06:00'] }
  await desk.ask('a', { queued: true })
  await desk.ask('b', { queued: true })
  assert.equal(desk.why('a'), 'the window 22:00-06:00 opens at 2026-03-10 22:00:00')
  await desk.ask('by hand')
  assert.deepEqual(desk.running, ['by hand'])
  desk.now = new Date(2026, 2, 10, 22).getTime()
  await desk.look()
  assert.equal(desk.why('a'), '1 at a time: its turn comes after by hand')
  await desk.give('by hand')
  assert.deepEqual(desk.running, ['a'])
})

for (const windowEnd of ['finish', 'break'] as const)
  test(`when the window closes, what runs of the queue is to ${windowEnd}`, async () => {
    const desk = new Desk()
    desk.limits = { ...desk.limits, machines: 2, windows: ['11:00-13:00'], windowEnd }
    await desk.ask('queued', { queued: true })
    await desk.ask('by hand')
    desk.now = new Date(2026, 2, 10, 13).getTime()
    await desk.look()
    assert.equal(desk.asked['queued']?.over?.kind, windowEnd === 'break' ? 'timeout' : undefined)
    assert.equal(desk.asked['by hand']?.over, undefined)
  })
