import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Tally } from './tally.ts'

const CLUSTER = 512

test('a tally counts the clusters that an area touches, within its window', () => {
  const tally = new Tally(10, 20, CLUSTER)
  tally.add(8 * CLUSTER, 4 * CLUSTER, 'data', 1)
  tally.add(11 * CLUSTER + 500, 20, 'compressed', 1)
  tally.add(19 * CLUSTER, 5 * CLUSTER, 'data', 2)
  assert.deepEqual(
    [10, 11, 12, 13, 19].map((cluster) => tally.count(cluster)),
    [1, 2, 1, 0, 2],
  )
  assert.equal(tally.lastUsed, 19)
  assert.ok(!tally.has(9) && tally.has(10) && tally.has(19) && !tally.has(20))
})

test('counts go past what a byte holds, and stay apart from their neighbours', () => {
  const tally = new Tally(0, 100_000, CLUSTER)
  for (const times of [14, 15, 16, 300, 70_000]) tally.add(times * CLUSTER, CLUSTER, 'L2 table', times)
  for (const times of [14, 15, 16, 300, 70_000]) assert.equal(tally.count(times), times)
  tally.add(14 * CLUSTER, CLUSTER, 'L2 table', 1)
  tally.add(15 * CLUSTER, CLUSTER, 'L2 table', 2 ** 33)
  assert.deepEqual([tally.count(13), tally.count(14), tally.count(15), tally.count(16)], [0, 15, 2 ** 32 - 1, 16])
})

test('two kinds of use are a clash, and so are two uses of what has one reference', () => {
  const tally = new Tally(0, 10, CLUSTER)
  const use = (cluster: number, ...kinds: Parameters<Tally['add']>[2][]): boolean => {
    for (const kind of kinds) tally.add(cluster * CLUSTER, CLUSTER, kind, 1)
    return tally.isClash(cluster)
  }
  assert.equal(use(1, 'data', 'data'), false)
  assert.equal(use(2, 'compressed', 'compressed'), false)
  assert.equal(use(3, 'unique'), false)
  assert.equal(use(4, 'unique', 'unique'), true)
  assert.equal(use(5, 'data', 'compressed'), true)
  assert.equal(use(6, 'L2 table', 'data', 'L2 table'), true)
  tally.markStoredOne(7)
  assert.equal(use(7, 'data', 'unique'), true)
  assert.ok(tally.isStoredOne(7) && !tally.isStoredOne(6))
  assert.equal(tally.count(7), 2)
})
