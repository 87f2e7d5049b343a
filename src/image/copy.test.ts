// A copy shows what its source shows, writes nothing that need not be written, and loses nothing that can be read.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random } from '../base/random.ts'
import type { BlockDevice, Pending } from '../block/device.ts'
import { listExtents } from '../block/extents.ts'
import { MemoryDevice } from '../block/memory.ts'
import { DelayFilter } from '../filter/delay.ts'
import { FaultFilter } from '../filter/fault.ts'
import { type CopyOptions, copyImage } from './copy.ts'

const KIB = 1024
const MIB = 1024 * KIB

/** Runs of noise, zeros that were written, and holes. */
async function randomSource(random: Random, size: number): Promise<MemoryDevice> {
  const device = new MemoryDevice(size, 'source')
  for (let at = 0; at < size; ) {
    const length = Math.min(size - at, 512 * random.between(1, random.chance(0.2) ? 2000 : 40))
    if (random.chance(0.6)) {
      const bytes = Buffer.alloc(length)
      if (random.chance(0.7)) random.fill(bytes)
      await device.write(at, length, bytes, 0, 0)
    }
    at += length
  }
  return device
}

function copyOptions(source: BlockDevice, target: BlockDevice, more: Partial<CopyOptions> = {}): CopyOptions {
  return { source, target, unit: 64 * KIB, sparse: 4096, targetIsZero: true, lanes: 4, ...more }
}

suite('A copy of an image', () => {
  for (const sparse of [0, 512, 4096, 64 * KIB, MIB]) {
    for (const isSlow of [false, true]) {
      test(`shows what the source shows: zeros from ${sparse} bytes, ${isSlow ? 'slow' : 'fast'} devices`, async () => {
        const random = new Random(1)
        const source = await randomSource(random, 5 * MIB + 1536)
        const target = new MemoryDevice(source.size)
        const slow = (device: BlockDevice): BlockDevice =>
          isSlow ? new DelayFilter(device, () => (random.chance(0.3) ? random.below(3) : 0)) : device
        await copyImage(copyOptions(slow(source), slow(target), { sparse }))
        assert.ok(Buffer.from(target.bytes).equals(source.bytes))
      })
    }
  }

  test('onto a device that holds something writes zeros too', async () => {
    const source = await randomSource(new Random(2), 3 * MIB)
    const target = new MemoryDevice(source.size)
    await target.write(0, target.size, Buffer.alloc(target.size, 'old'), 0, 0)
    await copyImage(copyOptions(source, target, { targetIsZero: false }))
    assert.ok(Buffer.from(target.bytes).equals(source.bytes))
  })

  test('leaves holes where the source has zeros, at the unit that was asked for', async () => {
    const source = new MemoryDevice(MIB)
    const bytes = Buffer.alloc(MIB)
    bytes.fill('x', 8 * KIB, 12 * KIB)
    await source.write(0, MIB, bytes, 0, 0)
    const dataOf = async (sparse: number): Promise<number[]> => {
      const target = new MemoryDevice(MIB)
      await copyImage(copyOptions(source, target, { sparse }))
      const data = (await listExtents(target, 0, MIB)).filter(({ extent }) => extent === 0)
      return data.flatMap(({ offset, length }) => [offset, length])
    }
    assert.deepEqual(await dataOf(4096), [8 * KIB, 4 * KIB])
    assert.deepEqual(await dataOf(16 * KIB), [0, 16 * KIB])
    assert.deepEqual(await dataOf(0), [0, MIB])
  })

  test('reads nothing of a hole', async () => {
    const source = new FaultFilter(new MemoryDevice(64 * MIB), { kinds: ['read'] })
    await copyImage(copyOptions(source, new MemoryDevice(64 * MIB)))
  })

  test('writes in order, however long the reads take', async () => {
    const random = new Random(3)
    const source = await randomSource(random, 4 * MIB)
    const offsets: number[] = []
    const target = new MemoryDevice(source.size)
    const write = target.write.bind(target)
    target.write = (offset, ...rest): Pending => {
      offsets.push(offset)
      return write(offset, ...rest)
    }
    await copyImage(copyOptions(new DelayFilter(source, () => random.below(4)), target))
    assert.deepEqual(
      offsets,
      offsets.toSorted((a, b) => a - b),
    )
  })

  test('fails with what the source or the target failed with', async () => {
    const source = await randomSource(new Random(4), 2 * MIB)
    for (const kinds of [['read'], ['write']] as const) {
      const broken = (device: BlockDevice): BlockDevice => new FaultFilter(device, { kinds, from: 3 })
      const target = new MemoryDevice(source.size)
      const options = kinds[0] === 'read' ? copyOptions(broken(source), target) : copyOptions(source, broken(target))
      await assert.rejects(() => copyImage(options), /injected failure/)
    }
  })

  test('that salvages loses only the sectors that cannot be read', async () => {
    const source = new MemoryDevice(MIB)
    await source.write(0, MIB, Buffer.alloc(MIB, 'x'), 0, 0)
    const broken = new FaultFilter(source, { kinds: ['read'], offset: 300 * KIB + 512, length: 1024 })
    const target = new MemoryDevice(MIB)
    const lost: number[] = []
    await copyImage(copyOptions(broken, target, { lost: (offset, length) => lost.push(offset, length) }))
    assert.deepEqual(lost, [300 * KIB + 512, 512, 300 * KIB + 1024, 512])
    const expected = Buffer.alloc(MIB, 'x').fill(0, 300 * KIB + 512, 300 * KIB + 1536)
    assert.ok(Buffer.from(target.bytes).equals(expected))
  })

  test('that salvages reads what nobody can say the extents of', async () => {
    const source = await randomSource(new Random(5), 3 * MIB)
    const broken = new FaultFilter(source, { kinds: ['extents'], offset: MIB, length: 4096, times: 3 })
    const target = new MemoryDevice(source.size)
    await assert.rejects(() => copyImage(copyOptions(broken, target)), /injected failure of extents/)
    await copyImage(copyOptions(broken, target, { lost: () => assert.fail('all can be read') }))
    assert.ok(Buffer.from(target.bytes).equals(source.bytes))
  })

  test('ends early when it is told to', async () => {
    const stop = new AbortController()
    const source = new DelayFilter(await randomSource(new Random(6), 4 * MIB), () => 1)
    const progress = (): void => stop.abort()
    const options = copyOptions(source, new MemoryDevice(source.size), { signal: stop.signal, progress })
    await assert.rejects(() => copyImage(options), { kind: 'cancelled' })
  })
})
