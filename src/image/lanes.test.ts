// Pieces are made ready side by side and finished in order; what fails ends the sequence.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { Lanes, type LaneWork } from './lanes.ts'

/** Work that takes `ms` to be ready, or none when it is 0, and that notes what happens. */
function work(name: string, ms: number, log: string[]): LaneWork {
  return {
    ready: () => (ms === 0 ? undefined : sleep(ms).then(() => void log.push(`${name} ready`))),
    finish: () => void log.push(name),
  }
}

test('pieces are finished in their order, whichever is ready first', async () => {
  const log: string[] = []
  const lanes = new Lanes(4, 512)
  for (const [name, ms] of [
    ['a', 30],
    ['b', 1],
    ['c', 0],
    ['d', 5],
  ] as const)
    await lanes.start(work(name, ms, log))
  await lanes.drain()
  assert.deepEqual(log, ['b ready', 'd ready', 'a ready', 'a', 'b', 'c', 'd'])
})

test('out of order, a piece is finished as soon as it is ready', async () => {
  const log: string[] = []
  const lanes = new Lanes(4, 512, false)
  for (const [name, ms] of [
    ['a', 30],
    ['b', 1],
    ['c', 0],
  ] as const)
    await lanes.start(work(name, ms, log))
  await lanes.drain()
  assert.deepEqual(log, ['c', 'b ready', 'b', 'a ready', 'a'])
})

test('work that is done within the call uses one buffer and no promise', () => {
  const lanes = new Lanes(3, 512)
  const buffers = new Set<Uint8Array>()
  const finish = (): undefined => undefined
  for (let i = 0; i < 10; i++) {
    const ready = ({ buffer }: { buffer: Uint8Array }): undefined => void buffers.add(buffer)
    assert.equal(lanes.start({ ready, finish }), undefined)
  }
  assert.equal(buffers.size, 1)
})

test('no more pieces are at work than there are lanes', async () => {
  const lanes = new Lanes(3, 512)
  let running = 0
  let most = 0
  const ready = async (): Promise<void> => {
    most = Math.max(most, ++running)
    await sleep(1)
  }
  const finish = (): undefined => void running--
  for (let i = 0; i < 12; i++) await lanes.start({ ready, finish })
  await lanes.drain()
  assert.equal(most, 3)
  assert.equal(running, 0)
})

for (const where of ['ready', 'finish'] as const) {
  for (const how of ['within the call', 'later'] as const) {
    test(`a piece that fails when it is to ${where}, ${how}, ends the sequence and leaves no lane taken`, async () => {
      const log: string[] = []
      const lanes = new Lanes(3, 512)
      const fail = (): Promise<void> => {
        if (how === 'later') return Promise.reject(new Error('no'))
        throw new Error('no')
      }
      await lanes.start(work('a', 5, log))
      await lanes.start({ ...work('b', 1, log), [where]: fail })
      await assert.rejects(async () => {
        for (let i = 0; i < 8; i++) await lanes.start(work('c', 1, log))
        await lanes.drain()
      }, /no/)
      await assert.rejects(() => lanes.drain(), /no/)
      // What began to finish before the failure was known goes on to its end.
      if (where === 'ready' || how === 'within the call') assert.ok(!log.includes('c'))
    })
  }
}
