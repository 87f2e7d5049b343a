// Ranges that are locked, and those who wait for them.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { RangeLocks } from './mutex.ts'

test('of several who wait for a range to be idle one goes on, and the others wait for that one', async () => {
  const locks = new RangeLocks()
  const order: string[] = []
  const change = async (name: string, start: number, length: number): Promise<void> => {
    // Bounded, so that waiting for each other in turns fails instead of hanging.
    for (let looks = 0; locks.isBusy(start, length); looks++) {
      assert.ok(looks < 10, `${name} looked again and again`)
      await locks.whenIdle(start, length)
    }
    const token = locks.tryAcquire(start, length, true)
    assert.ok(token !== undefined)
    order.push(`${name} begins`)
    await new Promise((resolve) => setImmediate(resolve))
    order.push(`${name} ends`)
    locks.release(token)
  }
  await Promise.all([change('a', 0, 8), change('b', 4, 8), change('c', 4, 2), change('d', 20, 1)])
  assert.deepEqual(order, ['a begins', 'd begins', 'a ends', 'b begins', 'd ends', 'b ends', 'c begins', 'c ends'])
  assert.ok(locks.idle)
})

test('a shared holder goes with others, an exclusive one alone', async () => {
  const locks = new RangeLocks()
  const first = locks.tryAcquire(0, 10, false)
  const second = locks.tryAcquire(5, 10, false)
  assert.ok(first !== undefined && second !== undefined)
  assert.equal(locks.tryAcquire(9, 1, true), undefined)
  const waiting = locks.acquire(9, 1, true)
  locks.release(first)
  locks.release(second)
  locks.release(await waiting)
  assert.ok(locks.idle)
})
