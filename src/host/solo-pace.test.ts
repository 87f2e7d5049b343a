import assert from 'node:assert/strict'
import { test } from 'node:test'
import { RING_SOLO_PROBE, RING_SOLO_ROW } from '../base/limits.ts'
import { SoloPace } from './solo-pace.ts'

/** Tells of answers that took so many milliseconds, one after the other. */
function answer(pace: SoloPace, count: number, { tookMs = 0.1, from = 1, alone = true } = {}): void {
  for (let i = 0; i < count; i++) pace.answered(from + i, from + i + tookMs, alone)
}

test('a request is waited for after a row of quick ones that had the ring to themselves', () => {
  const pace = new SoloPace()
  answer(pace, RING_SOLO_ROW - 1)
  assert.equal(pace.mayWait(), false)
  answer(pace, 1, { from: 100 })
  assert.equal(pace.mayWait(), true)
})

test('one that shared the ring with another has the row begin anew', () => {
  const pace = new SoloPace()
  answer(pace, RING_SOLO_ROW)
  assert.equal(pace.mayWait(), true)
  answer(pace, 1, { from: 200, alone: false })
  assert.equal(pace.mayWait(), false)
  answer(pace, RING_SOLO_ROW, { from: 300 })
  assert.equal(pace.mayWait(), true)
})

test('now and then a request is not waited for', () => {
  const pace = new SoloPace()
  answer(pace, RING_SOLO_ROW)
  const waits = Array.from({ length: RING_SOLO_PROBE * 4 }, () => pace.mayWait())
  assert.equal(waits.filter((waits) => !waits).length, 4)
})

test('a disk that takes long is not waited for', () => {
  const pace = new SoloPace()
  answer(pace, RING_SOLO_ROW * 4, { tookMs: 10 })
  assert.equal(pace.mayWait(), false)
})

test('a disk that was quick and begins to stall is no longer waited for', () => {
  const pace = new SoloPace()
  answer(pace, RING_SOLO_ROW)
  pace.waited(1000, 1100)
  assert.deepEqual(
    Array.from({ length: RING_SOLO_PROBE }, () => pace.mayWait()),
    Array.from({ length: RING_SOLO_PROBE }, () => false),
  )
})
