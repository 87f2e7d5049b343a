import assert from 'node:assert/strict'
import { test } from 'node:test'
import { HOLE, ZERO } from '../block/device.ts'
import { listExtents } from '../block/extents.ts'
import { guard } from '../block/guard.ts'
import { MemoryDevice } from '../block/memory.ts'
import { PaddedFilter } from './padded.ts'

test('a padded device reads as zeros past the end of what is inside it, and cannot be written', async () => {
  const inner = new MemoryDevice(8192)
  await inner.write(0, 8192, Buffer.alloc(8192, 7), 0, 0)
  const padded = guard(new PaddedFilter(inner, 20_000))
  assert.equal(padded.size, 20_000)
  for (const [offset, length] of [
    [0, 20_000],
    [8000, 400],
    [8192, 100],
    [19_000, 1000],
    [10, 20],
  ] as const) {
    const bytes = Buffer.alloc(length, 1)
    await padded.read(offset, length, bytes, 0)
    const whole = Buffer.concat([Buffer.alloc(8192, 7), Buffer.alloc(20_000 - 8192)])
    assert.deepEqual(bytes, whole.subarray(offset, offset + length))
  }
  assert.throws(() => padded.write(0, 512, Buffer.alloc(512), 0, 0), { kind: 'read-only' })
})

test('the padding of a device is a hole', async () => {
  const inner = new MemoryDevice(8192)
  await inner.write(0, 8192, Buffer.alloc(8192, 7), 0, 0)
  const padded = new PaddedFilter(inner, 20_000)
  assert.deepEqual(await listExtents(padded, 4096, 8192), [
    { offset: 4096, length: 4096, extent: 0 },
    { offset: 8192, length: 4096, extent: HOLE | ZERO },
  ])
  let pieces = 0
  await padded.extents(0, 20_000, () => ++pieces < 1)
  assert.equal(pieces, 1)
})
