import assert from 'node:assert/strict'
import { test } from 'node:test'
import { LatencyMeter } from './latency-meter.ts'

test('the time waited is that of all requests together, and their mean is that time divided by the answers', () => {
  let now = 100
  const meter = new LatencyMeter(() => now)
  meter.begin()
  now += 10
  meter.begin()
  now += 5
  meter.end()
  now += 20
  meter.end()
  assert.equal(meter.waitedMs(), 10 + 2 * 5 + 20)
  assert.equal(meter.answered, 2)
  now += 1000
  assert.equal(meter.waitedMs(), 40, 'nobody waits')
})

test('a request that is stuck counts before it is answered', () => {
  let now = 0
  const meter = new LatencyMeter(() => now)
  meter.begin()
  now = 500
  assert.equal(meter.waitedMs(), 500)
  now = 700
  assert.equal(meter.waitedMs(), 700)
  assert.equal(meter.answered, 0)
})
