import assert from 'node:assert/strict'
import { test } from 'node:test'
import { HOST_BANDWIDTH_MIN, SPEED_BURST_MS } from '../base/limits.ts'
import { Bandwidth } from './bandwidth.ts'

const MIB = 1024 * 1024

/** Copies of pieces of 1 MiB that take no time but what they are told to wait. */
class Line {
  now: number
  readonly bandwidth: Bandwidth
  readonly copied: number[] = []

  constructor(limit: number, startMs = 0) {
    this.now = startMs
    this.bandwidth = new Bandwidth(undefined, () => this.now)
    this.bandwidth.limit = limit
  }

  /** Lets so many jobs copy for so long; the first `idle` of them copy nothing. Returns the bytes of each. */
  run(jobs: number, forMs: number, idle = 0): number[] {
    const copiers = Array.from({ length: jobs }, () => ({
      share: this.bandwidth.share(),
      copied: 0,
      owed: 0,
      freeAt: this.now,
    }))
    for (const end = this.now + forMs; this.now < end; this.now++) {
      for (const copier of copiers.slice(idle)) {
        while (copier.freeAt <= this.now) {
          const waitMs = copier.share.waitMs(copier.owed)
          copier.owed = 0
          if (waitMs > 0) copier.freeAt = this.now + waitMs
          else copier.copied += copier.owed = MIB
        }
      }
    }
    return copiers.map(({ copied }) => copied)
  }
}

test('jobs share the limit evenly, and one that copies nothing leaves its part to the others', () => {
  const limit = 100 * MIB
  const burst = (limit * SPEED_BURST_MS) / 1000
  for (const [jobs, idle] of [
    [1, 0],
    [4, 0],
    [4, 2],
  ] as const) {
    const copied = new Line(limit).run(jobs, 10_000, idle)
    const sum = copied.reduce((all, one) => all + one, 0)
    assert.ok(Math.abs(sum - 10 * limit) <= burst + jobs * MIB, `${jobs} jobs copied ${sum / MIB} MiB`)
    const active = copied.slice(idle)
    assert.ok(Math.max(...active) - Math.min(...active) <= sum * 0.1, copied.join(' '))
  }
})

test('the clock may wrap', () => {
  const line = new Line(100 * MIB, 2 ** 31 * 0.01 - 1000)
  const [copied] = line.run(1, 5000)
  assert.ok(Math.abs((copied as number) - 500 * MIB) <= 12 * MIB, `${copied}`)
})

test('a new limit holds at once, also for a job that waits by the old one; none is no wait', () => {
  const line = new Line(HOST_BANDWIDTH_MIN)
  const share = line.bandwidth.share()
  assert.ok(share.waitMs(64 * MIB) > 0)
  assert.equal(share.waitMs(0), 250)
  line.bandwidth.limit = 0
  assert.equal(share.waitMs(0), 0)
  assert.equal(share.waitMs(64 * MIB), 0)
  line.bandwidth.limit = 100 * MIB
  assert.equal(line.bandwidth.limit, 100 * MIB)
  assert.equal(share.waitMs(0), 0)
})
