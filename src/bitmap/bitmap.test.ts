import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../base/random.ts'
import { Bitmap } from './bitmap.ts'

test('a bitmap agrees with a plain set through random sets, clears and searches', (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const size = 4096 * 300 + 100
  const bitmap = new Bitmap(size)
  const model = new Set<number>()
  for (let step = 0; step < 3000; step++) {
    const first = random.below(bitmap.length)
    const end = Math.min(bitmap.length, first + random.below(70))
    if (random.chance(0.5)) {
      let fresh = 0
      for (let g = first; g < end; g++)
        if (!model.has(g)) {
          model.add(g)
          fresh++
        }
      assert.equal(bitmap.setGranules(first, end), fresh)
    } else {
      let gone = 0
      for (let g = first; g < end; g++) if (model.delete(g)) gone++
      assert.equal(bitmap.clearGranules(first, end), gone)
    }
    assert.equal(bitmap.count, model.size)
    let next = first
    while (next < bitmap.length && !model.has(next)) next++
    assert.equal(bitmap.nextSet(first), next)
    next = first
    while (next < bitmap.length && model.has(next)) next++
    assert.equal(bitmap.nextClear(first), next)
    next = first
    while (next < end && !model.has(next)) next++
    assert.equal(bitmap.nextSet(first, end), next)
    const any = next < end
    next = first
    while (next < end && model.has(next)) next++
    assert.equal(bitmap.nextClear(first, end), next)
    const bytes = Math.min(end * 4096, size) - first * 4096
    assert.equal(bytes > 0 && bitmap.hasAny(first * 4096, bytes), any)
    assert.equal(bitmap.hasAll(first * 4096, bytes), next >= end)
  }
  assert.ok(Bitmap.fromBytes(size, 4096, bitmap.toBytes()).equals(bitmap))
})

test('set rounds outward and clear rounds inward, and the short tail counts as whole', () => {
  const bitmap = new Bitmap(10_000)
  assert.equal(bitmap.length, 3)
  assert.equal(bitmap.set(4095, 2), 2)
  assert.equal(bitmap.clear(1, 8191), 1)
  assert.ok(bitmap.has(0) && !bitmap.has(1))
  assert.equal(bitmap.set(9_999, 1), 1)
  assert.equal(bitmap.bytes, 4096 + 10_000 - 8192)
  assert.equal(bitmap.clear(8192, 10_000 - 8192), 1)
})

test('runs visits the set ranges in order, cut at the ends and at the longest piece', () => {
  const bitmap = new Bitmap(100 * 4096)
  bitmap.setGranules(1, 4)
  bitmap.setGranules(50, 51)
  const seen: string[] = []
  bitmap.runs(0, 100 * 4096, 8192, (offset, length) => seen.push(`${offset / 4096}+${length / 4096}`) > 0)
  assert.deepEqual(seen, ['1+2', '3+1', '50+1'])
  seen.length = 0
  bitmap.runs(2 * 4096 + 10, 50 * 4096, 1 << 20, (offset, length) => seen.push(`${offset}+${length}`) > 0)
  assert.deepEqual(seen, [`${2 * 4096 + 10}+${2 * 4096 - 10}`])
})

test('or, andNot and resized keep the count right', () => {
  const a = new Bitmap(64 * 4096)
  const b = new Bitmap(64 * 4096)
  a.setGranules(0, 10)
  b.setGranules(5, 20)
  a.or(b)
  assert.equal(a.count, 20)
  a.andNot(b)
  assert.equal(a.count, 5)
  const grown = a.resized(70 * 4096)
  assert.equal(grown.count, 11)
  assert.ok(grown.has(64) && grown.has(69) && !grown.has(63))
  const shrunk = grown.resized(3 * 4096)
  assert.equal(shrunk.count, 3)
})

test('in granules of another size the set has every granule that a set one touches, and only those', () => {
  const size = 10 * 4096 + 512
  const fine = new Bitmap(size, 4096)
  fine.set(3 * 4096, 1)
  fine.set(size - 1, 1)
  const coarse = fine.inGranules(4 * 4096)
  assert.deepEqual(
    [0, 1, 2].map((index) => coarse.has(index)),
    [true, false, true],
  )
  const again = coarse.inGranules(4096)
  assert.equal(again.bytes, 4 * 4096 + size - 8 * 4096)
  const same = fine.inGranules(4096)
  assert.ok(same.equals(fine))
  same.clearAll()
  assert.equal(fine.count, 2)
})
