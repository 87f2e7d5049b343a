import assert from 'node:assert/strict'
import { test } from 'node:test'
import { MemoryDevice } from '../block/memory.ts'
import { DifferingFilter } from './differing.ts'

const GRANULE = 4096

/** Remembers the writes that reach it. */
class Watched extends MemoryDevice {
  readonly writes: [kind: string, offset: number, length: number][] = []

  override write(...args: Parameters<MemoryDevice['write']>): ReturnType<MemoryDevice['write']> {
    this.writes.push(['write', args[0], args[1]])
    return super.write(...args)
  }

  override zero(...args: Parameters<MemoryDevice['zero']>): ReturnType<MemoryDevice['zero']> {
    this.writes.push(['zero', args[0], args[1]])
    return super.zero(...args)
  }
}

test('only the granules that differ are written, neighbours in one write', async () => {
  const device = new Watched(8 * GRANULE)
  device.bytes.fill(7)
  const differing = new DifferingFilter(device)
  const wanted = Buffer.alloc(8 * GRANULE, 7)
  for (const at of [GRANULE + 5, 2 * GRANULE, 5 * GRANULE, 8 * GRANULE - 1]) wanted[at] = 1
  await differing.write(0, wanted.length, wanted, 0, 0)
  assert.deepEqual(device.writes, [
    ['write', GRANULE, 2 * GRANULE],
    ['write', 5 * GRANULE, GRANULE],
    ['write', 7 * GRANULE, GRANULE],
  ])
  assert.ok(wanted.equals(device.bytes))
  assert.equal(differing.changedBytes, 4 * GRANULE)
  assert.equal(differing.comparedBytes, 8 * GRANULE)
})

test('zeros are written over data alone, at any alignment', async () => {
  const device = new Watched(4 * GRANULE)
  device.bytes.fill(1, 3 * GRANULE, 3 * GRANULE + 100)
  await new DifferingFilter(device).zero(100, 4 * GRANULE - 100, 0)
  assert.deepEqual(device.writes, [['zero', 3 * GRANULE, GRANULE]])
  assert.ok(device.bytes.every((byte) => byte === 0))
})
