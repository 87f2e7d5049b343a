import assert from 'node:assert/strict'
import { test } from 'node:test'
import { LINGER_GAP_MS, LINGER_MS, LINGER_ROW } from '../base/limits.ts'
import { Linger } from './linger.ts'

const SOON = LINGER_GAP_MS / 2
const LATE = LINGER_GAP_MS * 2

/** A connection, a clock that the test moves, and until when the loop was asked to stay awake. */
function connection(): { exchange: (count: number, gapMs: number) => void; stays: number[]; now: () => number } {
  let now = 1
  const stays: number[] = []
  const linger = new Linger(
    () => now,
    (untilMs) => stays.push(untilMs),
  )
  const exchange = (count: number, gapMs: number): void => {
    for (let i = 0; i < count; i++) {
      linger.answered()
      now += gapMs
      linger.arrived()
    }
  }
  return { exchange, stays, now: () => now }
}

test('the loop stays awake after an answer once a row of requests came soon after the answers before', () => {
  const { exchange, stays, now } = connection()
  exchange(LINGER_ROW, SOON)
  assert.deepEqual(stays, [])
  const answered = now()
  exchange(1, SOON)
  assert.deepEqual(stays, [answered + LINGER_MS])
})

test('a request that comes late has the row begin anew', () => {
  const { exchange, stays } = connection()
  exchange(LINGER_ROW, SOON)
  exchange(1, LATE)
  const before = stays.length
  exchange(LINGER_ROW, SOON)
  assert.equal(stays.length, before)
  exchange(1, SOON)
  assert.equal(stays.length, before + 1)
})

test('what arrives without an answer before it says nothing', () => {
  const stays: number[] = []
  const linger = new Linger(
    () => 1,
    (untilMs) => stays.push(untilMs),
  )
  for (let i = 0; i < 2 * LINGER_ROW; i++) linger.arrived()
  linger.answered()
  assert.deepEqual(stays, [])
})
