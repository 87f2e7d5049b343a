import assert from 'node:assert/strict'
import { test } from 'node:test'
import { SliceCache } from './slices.ts'

test('a slice cache keeps its budget, drops what was used longest ago, and never what is pinned', () => {
  const dropped: number[] = []
  const owner = { dropped: (number: number) => void dropped.push(number) }
  const cache = new SliceCache(4 * 100)
  const made = [0, 1, 2, 3].map((number) => cache.add(owner, number, new Uint8Array(100)))
  cache.touch(made[0] as (typeof made)[0])
  ;(made[1] as (typeof made)[0]).pins++
  cache.add(owner, 4, new Uint8Array(100))
  cache.add(owner, 5, new Uint8Array(100))
  assert.deepEqual(dropped, [2, 3])
  assert.equal(cache.bytes, 400)
})
