import assert from 'node:assert/strict'
import { test } from 'node:test'
import { FileLanes, PoolLanes } from './pool-lanes.ts'

/** Asks for `count` lanes; returns how many were granted so far. */
function ask(lanes: FileLanes, count: number): () => number {
  let granted = 0
  for (let i = 0; i < count; i++) lanes.enter(() => granted++)
  return () => granted
}

test('one file takes half of the lanes, two take a third each, and one lane is always left for the next', () => {
  const thread = new PoolLanes(12)
  const [first, second, third] = [new FileLanes(thread), new FileLanes(thread), new FileLanes(thread)]
  assert.equal(ask(first, 100)(), 6)
  assert.equal(ask(second, 100)(), 3)
  for (let i = 0; i < 2; i++) first.leave()
  assert.ok(thread.free > 0)
  assert.ok(ask(third, 100)() > 0)
})

test('a file without a lane gets one at once, even when there is none', () => {
  const thread = new PoolLanes(1)
  const files = [new FileLanes(thread), new FileLanes(thread), new FileLanes(thread)]
  for (const file of files) assert.equal(ask(file, 5)(), 1)
})

test('requests that wait begin in order as those of their file end', () => {
  const lanes = new FileLanes(new PoolLanes(1))
  const begun: number[] = []
  for (let i = 0; i < 4; i++) lanes.enter(() => begun.push(i))
  assert.deepEqual(begun, [0])
  for (let i = 0; i < 3; i++) lanes.leave()
  assert.deepEqual(begun, [0, 1, 2, 3])
})

test('a file is idle when nothing of it is in the pool or waits', async () => {
  const lanes = new FileLanes(new PoolLanes(1))
  assert.equal(lanes.idle(), undefined)
  ask(lanes, 2)
  let isIdle = false
  const idle = lanes.idle()?.then(() => (isIdle = true))
  lanes.leave()
  await Promise.resolve()
  assert.equal(isIdle, false)
  lanes.leave()
  await idle
  assert.equal(isIdle, true)
})

test('syncs take a part of the lanes, and the others begin as they end, also as they fail', async () => {
  const thread = new PoolLanes(8)
  const ends: ((isDone: boolean) => void)[] = []
  const work = (): Promise<void> =>
    new Promise((resolve, reject) => ends.push((isDone) => (isDone ? resolve() : reject(new Error('sync failed')))))
  const all = Array.from({ length: 4 }, () => thread.sync(work))
  const outcomes = Promise.allSettled(all)
  assert.equal(ends.length, 2)
  assert.equal(thread.free, 6)
  ends[0]?.(false)
  await assert.rejects(all[0] as Promise<void>, /sync failed/)
  await Promise.resolve()
  assert.equal(ends.length, 3)
  for (const end of ends) end(true)
  await all[2]
  await Promise.resolve()
  for (const end of ends) end(true)
  assert.deepEqual(
    (await outcomes).map(({ status }) => status),
    ['rejected', 'fulfilled', 'fulfilled', 'fulfilled'],
  )
  assert.equal(thread.free, 8)
})
