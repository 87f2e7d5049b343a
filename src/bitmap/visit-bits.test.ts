import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Bitmap } from './bitmap.ts'
import { visitBits } from './visit-bits.ts'

test('a visitor sees the range in order, and nothing more once it said stop', () => {
  const bitmap = new Bitmap(65_536)
  bitmap.set(8192, 4096)
  bitmap.set(16_384, 8192)
  const whole = [
    [8192, 0],
    [4096, 1],
    [4096, 0],
    [8192, 1],
    [40_960, 0],
  ]
  for (let count = 1; count <= whole.length; count++) {
    const seen: number[][] = []
    visitBits(bitmap, 0, bitmap.size, (length, status) => seen.push([length, status]) < count)
    assert.deepEqual(seen, whole.slice(0, count))
  }
})
