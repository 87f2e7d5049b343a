// The contract of the filters that let everything pass, and what each of them does beyond it.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { guard } from '../../src/block/guard.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { DelayFilter } from '../../src/filter/delay.ts'
import { DifferingFilter } from '../../src/filter/differing.ts'
import { FaultFilter } from '../../src/filter/fault.ts'
import { ReadonlyFilter } from '../../src/filter/readonly.ts'
import { SalvageFilter } from '../../src/filter/salvage.ts'
import { SliceFilter } from '../../src/filter/slice.ts'
import { StallFilter } from '../../src/filter/stall.ts'
import { deviceContract } from './device.ts'

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))

deviceContract('slice filter', async (_t, size) => new SliceFilter(new MemoryDevice(size + 12_288), 8192, size))
deviceContract('salvage filter', async (_t, size) => new SalvageFilter(new MemoryDevice(size), () => {}))
deviceContract('differing filter', async (_t, size) => new DifferingFilter(new MemoryDevice(size)))
deviceContract('stall filter', async (_t, size) => new StallFilter(new MemoryDevice(size), 60_000, () => {}))
deviceContract('fault filter without rules', async (_t, size) => new FaultFilter(new MemoryDevice(size)))
deviceContract('delay filter', async (_t, size) => {
  const random = new Random(1)
  return new DelayFilter(new MemoryDevice(size), () => random.below(2), { sleep: turn })
})

test('a slice changes only its part of the device and cannot be made outside it', async () => {
  const memory = new MemoryDevice(16_384)
  const slice = guard(new SliceFilter(memory, 4096, 8192))
  await slice.write(0, 8192, Buffer.alloc(8192, 7), 0, 0)
  assert.ok(memory.bytes.every((byte, at) => (byte === 7) === (at >= 4096 && at < 12_288)))
  assert.throws(() => slice.read(8000, 500, Buffer.alloc(500), 0), { kind: 'out-of-range' })
  for (const [start, size] of [
    [12_288, 8192],
    [-4096, 4096],
    [0, Number.NaN],
  ] as const) {
    assert.throws(() => new SliceFilter(memory, start, size), { kind: 'out-of-range' })
  }
})

test('a read-only view reads, and refuses every change', async () => {
  const memory = new MemoryDevice(8192)
  memory.bytes.fill(3)
  for (const device of [new ReadonlyFilter(memory), guard(new ReadonlyFilter(memory))]) {
    const into = Buffer.alloc(8192)
    await device.read(0, 8192, into, 0)
    assert.ok(into.every((byte) => byte === 3))
    assert.throws(() => device.write(0, 512, Buffer.alloc(512), 0, 0), { kind: 'read-only' })
    assert.throws(() => device.zero(0, 512, 0), { kind: 'read-only' })
    assert.throws(() => device.trim(0, 512, 0), { kind: 'read-only' })
    assert.equal(device.can.write, false)
    assert.equal(device.flush(), undefined)
  }
  assert.ok(memory.bytes.every((byte) => byte === 3))
})

test('a fault rule fails the requests that it counts, and no others', () => {
  const fault = new FaultFilter(new MemoryDevice(8192), { kinds: ['write'], from: 2, times: 2, error: 'no-space' })
  const write = (): unknown => fault.write(0, 1, Buffer.alloc(1), 0, 0)
  write()
  assert.equal(fault.read(0, 1, Buffer.alloc(1), 0), undefined)
  assert.throws(write, { kind: 'no-space' })
  assert.throws(write, { kind: 'no-space' })
  write()
  fault.add({ offset: 4096, length: 512 })
  assert.equal(fault.read(0, 4096, Buffer.alloc(4096), 0), undefined)
  assert.throws(() => fault.read(4000, 200, Buffer.alloc(200), 0), { kind: 'io' })
  assert.equal(fault.flush(), undefined)
  fault.heal()
  assert.equal(fault.read(4000, 200, Buffer.alloc(200), 0), undefined)
  assert.equal(fault.requests, 9)
})

test('a delayed request waits as long as it is told before it reaches the device', async () => {
  const memory = new MemoryDevice(512)
  const waits: number[] = []
  const delay = new DelayFilter(memory, ({ kind }) => (kind === 'write' ? 5 : 0), {
    sleep: async (ms) => void waits.push(ms),
  })
  const pending = delay.write(0, 1, Buffer.of(9), 0, 0)
  assert.equal(memory.bytes[0], 0)
  await pending
  assert.equal(memory.bytes[0], 9)
  assert.equal(delay.read(0, 1, Buffer.alloc(1), 0), undefined)
  assert.deepEqual(waits, [5])
})
