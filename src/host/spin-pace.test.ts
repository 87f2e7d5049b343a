import assert from 'node:assert/strict'
import { test } from 'node:test'
import { RING_SPIN_MS, RING_SPIN_ROW } from '../base/limits.ts'
import { SpinPace } from './spin-pace.ts'

const QUICK = RING_SPIN_MS / 2
const SLOW = RING_SPIN_MS * 2

/** Requests one at a time, each answered after so long; returns the time. */
function answer(pace: SpinPace, count: number, tookMs: number, fromMs: number): number {
  let now = fromMs
  for (let i = 0; i < count; i++) {
    pace.began(now)
    now += tookMs
    pace.answered(now, 1)
    now += 10
  }
  return now
}

test('the loop turns after a row of quick answers, and for as long as one may take', () => {
  const pace = new SpinPace()
  let now = answer(pace, RING_SPIN_ROW - 1, QUICK, 0)
  pace.began(now)
  assert.equal(pace.maySpin(now), false)
  pace.answered((now += QUICK), 1)
  pace.began((now += 10))
  assert.equal(pace.maySpin(now), true)
  assert.equal(pace.maySpin(now + QUICK), true)
  assert.equal(pace.maySpin(now + RING_SPIN_MS), false)
})

test('one slow answer has the row begin anew', () => {
  const pace = new SpinPace()
  let now = answer(pace, RING_SPIN_ROW, QUICK, 0)
  now = answer(pace, 1, SLOW, now)
  pace.began(now)
  assert.equal(pace.maySpin(now), false)
  now = answer(pace, RING_SPIN_ROW, QUICK, now)
  pace.began(now)
  assert.equal(pace.maySpin(now), true)
})

test('of many under way each answer gives the next one its time', () => {
  const pace = new SpinPace()
  pace.began(0)
  let now = 0
  for (let i = 0; i < RING_SPIN_ROW; i++) pace.answered((now += QUICK), 1)
  assert.equal(pace.maySpin(now + QUICK), true)
  assert.equal(pace.maySpin(now + SLOW), false)
})

test('answers of which one is told late, together, are as quick as each of them', () => {
  const pace = new SpinPace()
  pace.began(0)
  pace.answered(RING_SPIN_ROW * QUICK, RING_SPIN_ROW)
  assert.equal(pace.maySpin(RING_SPIN_ROW * QUICK), true)
  pace.answered(RING_SPIN_ROW * QUICK + SLOW, 1)
  assert.equal(pace.maySpin(RING_SPIN_ROW * QUICK + SLOW), false)
})
