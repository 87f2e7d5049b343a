import assert from 'node:assert/strict'
import { test } from 'node:test'
import { MIRROR_LOST_WINDOWS, MIRROR_WINDOW_MS } from '../base/limits.ts'
import { Convergence } from './convergence.ts'

const MIB = 1024 * 1024

/** Feeds windows of [copied, dirtied] in MiB while so much is left. */
function after(windows: readonly (readonly [copied: number, dirtied: number])[], left = 100): Convergence {
  const convergence = new Convergence()
  let [copied, dirtied, now] = [0, 0, 5000]
  convergence.note(now, 0, 0, left * MIB)
  for (const window of windows) {
    copied += window[0] * MIB
    dirtied += window[1] * MIB
    now += MIRROR_WINDOW_MS
    assert.equal(convergence.note(now, copied, dirtied, left * MIB), true)
  }
  return convergence
}

test('a copy that is faster than its guest is not lost, and both rates are known', () => {
  const { estimate, isLost } = after([[30, 10]])
  assert.deepEqual(estimate, { copyRate: 30 * MIB, dirtyRate: 10 * MIB })
  assert.equal(isLost, false)
})

test('a copy is lost after windows in a row in which the guest dirtied nearly as much as was copied', () => {
  const losing = Array.from({ length: MIRROR_LOST_WINDOWS }, () => [16, 14] as const)
  assert.equal(after(losing).isLost, true)
  assert.equal(after(losing.slice(1)).isLost, false)
})

test('one window with a gain begins the count anew, and with nothing left there is nothing to lose', () => {
  const losing = Array.from({ length: MIRROR_LOST_WINDOWS - 1 }, () => [1, 2] as const)
  assert.equal(after([...losing, [2, 1], ...losing]).isLost, false)
  assert.equal(after([...losing, [0, 0], [0, 0]], 0).isLost, false)
})

test('less than a window is no window, and a pause is none either', () => {
  const convergence = after([[10, 20]])
  const before = convergence.estimate
  assert.equal(convergence.note(5000 + MIRROR_WINDOW_MS * 1.5, 11 * MIB, 90 * MIB, MIB), false)
  assert.equal(convergence.note(5000 + MIRROR_WINDOW_MS * 60, 11 * MIB, 900 * MIB, MIB), false)
  assert.deepEqual(convergence.estimate, before)
})
