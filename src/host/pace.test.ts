import assert from 'node:assert/strict'
import { test } from 'node:test'
import { PACE_PAUSE_MAX_MS, PACE_PAUSE_MIN_MS, PACE_QUICK_ROW } from '../base/limits.ts'
import { Pace } from './pace.ts'

const KIB = 1024

/** A file whose requests of 4 KiB take so many milliseconds each; `now` is the test's clock. */
class Requests {
  readonly pace: Pace
  now = 1000

  constructor(isTrusted = false) {
    this.pace = new Pace(isTrusted)
  }

  run(count: number, ms: number, length = 4 * KIB): void {
    for (let i = 0; i < count; i++) {
      const began = this.now
      this.now += ms
      if (this.pace.isQuick) this.pace.tookInCall(began, this.now, length)
      else this.pace.tookInPool(began, this.now, length)
    }
  }

  /** Quick requests until it may be called; returns how long that took, in milliseconds. */
  untilQuick(): number {
    const began = this.now
    while (!this.pace.isQuick) this.run(1, 0.5)
    return this.now - began
  }
}

test('a file begins in the pool, and a row of quick answers brings it into the call', () => {
  const file = new Requests()
  file.run(PACE_QUICK_ROW - 1, 0.1)
  assert.equal(file.pace.isQuick, false)
  file.run(1, 0.1)
  assert.equal(file.pace.isQuick, true)
})

test('a file that always takes its time is never called', () => {
  const file = new Requests()
  file.run(1000, 50)
  assert.equal(file.pace.isQuick, false)
})

test('a slow answer undoes half of the quick ones, so that most have to be quick', () => {
  const file = new Requests()
  file.run(PACE_QUICK_ROW - 1, 0.1)
  file.run(1, 50)
  file.run(PACE_QUICK_ROW / 2, 0.1)
  assert.equal(file.pace.isQuick, false)
  file.run(1, 0.1)
  assert.equal(file.pace.isQuick, true)
  const mixed = new Requests()
  for (let i = 0; i < 1000; i++) mixed.run(1, i % 4 === 0 ? 50 : 0.1)
  assert.equal(mixed.pace.isQuick, false)
})

test('one long call sends a file to the pool at once, many a little too long do so in time, and long ones now and then do not', () => {
  const stalled = new Requests()
  stalled.untilQuick()
  stalled.run(1, 50)
  assert.equal(stalled.pace.isQuick, false)
  const cold = new Requests()
  cold.untilQuick()
  cold.run(200, 0.2)
  assert.equal(cold.pace.isQuick, false)
  const busyMachine = new Requests()
  busyMachine.untilQuick()
  for (let i = 0; i < 100; i++) {
    busyMachine.run(1, 3)
    busyMachine.run(50_000, 0.002)
    assert.equal(busyMachine.pace.isQuick, true)
  }
})

test('a long request may take as long as its bytes need', () => {
  const file = new Requests()
  file.untilQuick()
  file.run(1000, 0.9, 1024 * KIB)
  assert.equal(file.pace.isQuick, true)
})

test('the pause before the next trial doubles to a minute, and is short again after a call that lasted', () => {
  const file = new Requests()
  file.untilQuick()
  file.run(1, 50)
  const pauses: number[] = []
  for (let i = 0; i < 14; i++) {
    pauses.push(file.untilQuick())
    file.run(1, 50)
  }
  assert.ok(Math.abs((pauses[0] as number) - PACE_PAUSE_MIN_MS) < 1, `${pauses[0]}`)
  for (let i = 1; i < 10; i++) {
    const [before, after] = [pauses[i - 1] as number, pauses[i] as number]
    assert.ok(Math.abs(after - before * 2) < 2, `${before} then ${after}`)
  }
  assert.ok(Math.abs((pauses.at(-1) as number) - PACE_PAUSE_MAX_MS) < 1, `${pauses.at(-1)}`)
  file.untilQuick()
  file.run(10_000, 0.07)
  file.now += PACE_PAUSE_MAX_MS * 20
  file.run(1, 50)
  assert.ok(Math.abs(file.untilQuick() - PACE_PAUSE_MIN_MS) < 1)
})

test('a trusted file begins in the call, leaves it when it stalls, and is back after the pause, however long the pool takes', () => {
  const file = new Requests(true)
  assert.equal(file.pace.isQuick, true)
  file.run(1, 200)
  assert.equal(file.pace.isQuick, false)
  file.run(1, PACE_PAUSE_MIN_MS - 1)
  assert.equal(file.pace.isQuick, false)
  file.run(1, 20)
  assert.equal(file.pace.isQuick, true)
})
