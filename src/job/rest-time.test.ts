import assert from 'node:assert/strict'
import { test } from 'node:test'
import { REST_LEAST_MS, REST_WINDOW_MS } from '../base/limits.ts'
import { RestTime } from './rest-time.ts'

/** A rest time that was told, every 100 ms for so long, what `left` says. */
function after(forMs: number, left: (nowMs: number) => number): RestTime {
  const rest = new RestTime()
  for (let now = 0; now <= forMs; now += 100) rest.note(now, left(now))
  return rest
}

test('what is left divided by the pace at which it shrinks is the time to go', () => {
  const rest = after(5000, (now) => 1000 - now / 10)
  assert.equal(Math.round(rest.restMs(5000, 500) ?? 0), 5000)
})

test('what a guest makes to do again counts against what is copied', () => {
  // 100 bytes a second are copied, and 60 made to do again.
  const rest = after(4000, (now) => 1000 - (40 * now) / 1000)
  assert.equal(Math.round(rest.restMs(4000, 840) ?? 0), 21_000)
})

test('a copy that does not gain on its guests has no end', () => {
  assert.equal(after(5000, () => 1000).restMs(5000, 1000), undefined)
  assert.equal(after(5000, (now) => 1000 + now).restMs(5000, 6000), undefined)
})

test('nothing is said before it was watched long enough, nor after a reset', () => {
  const rest = after(REST_LEAST_MS - 100, (now) => 10_000 - now)
  assert.equal(rest.restMs(REST_LEAST_MS - 100, 9000), undefined)
  const watched = after(5000, (now) => 10_000 - now)
  assert.notEqual(watched.restMs(5000, 5000), undefined)
  watched.reset()
  assert.equal(watched.restMs(5000, 5000), undefined)
})

test('a copy that stands still has longer and longer to go, and after a window no end', () => {
  const rest = after(5000, (now) => 10_000 - now)
  rest.note(5500, 5000)
  const [early = 0, late = 0, never] = [5500, 9000, 5500 + REST_WINDOW_MS].map((now) => rest.restMs(now, 5000))
  assert.ok(early < late, `${early} and ${late} ms`)
  assert.equal(never, undefined)
})

test('only the last window counts: a pace of long ago is forgotten', () => {
  const slow = (now: number): number => 1_000_000 - now
  const fast = (now: number): number => slow(REST_WINDOW_MS) - 10 * (now - REST_WINDOW_MS)
  const end = 3 * REST_WINDOW_MS
  const rest = after(end, (now) => (now < REST_WINDOW_MS ? slow(now) : fast(now)))
  const left = fast(end)
  assert.ok(Math.abs((rest.restMs(end, left) ?? 0) - left / 10) < left / 1000)
})

test('when nothing is left there is nothing to wait for', () => {
  assert.equal(after(5000, (now) => 5000 - now).restMs(5000, 0), 0)
})
