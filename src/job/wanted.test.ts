import assert from 'node:assert/strict'
import { test } from 'node:test'
import { WANTED_PLACES } from '../base/limits.ts'
import { Wanted } from './wanted.ts'

test('wanted places are taken in their order, each piece once', () => {
  const wanted = new Wanted(4096)
  wanted.add(10_000, 100)
  wanted.add(0, 1)
  wanted.add(8192, 4097)
  assert.deepEqual([wanted.take(), wanted.take(), wanted.take(), wanted.take()], [8192, 0, 12_288, undefined])
})

test('no more places are remembered than there is room for', () => {
  const wanted = new Wanted(4096)
  wanted.add(0, WANTED_PLACES * 4096 * 2)
  let count = 0
  while (wanted.take() !== undefined) count++
  assert.equal(count, WANTED_PLACES)
})
