// The suite that every BlockDevice runs: it is the specification of src/block/device.ts. `deviceContract` takes a name and
// a maker of fresh devices of a given size that read as zeros; what a device may lack is chosen by its capabilities.

import assert from 'node:assert/strict'
import { type TestContext, suite, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { roundDown } from '../../src/base/round.ts'
import { type BlockDevice, FUA, MAY_UNMAP, ZERO } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import { guard } from '../../src/block/guard.ts'

export type MakeDevice = (t: TestContext, size: number) => Promise<BlockDevice>

const MIB = 1024 * 1024

async function make(t: TestContext, maker: MakeDevice, size: number): Promise<BlockDevice> {
  const device = guard(await maker(t, size))
  t.after(() => device.close())
  return device
}

async function readAll(device: BlockDevice, offset = 0, length = device.size): Promise<Buffer> {
  const into = Buffer.alloc(length, 0xee)
  await device.read(offset, length, into, 0)
  return into
}

/** Fails unless `work`, which may throw or reject, fails with the kind. */
async function failsWith(kind: string, work: () => Promise<void> | undefined): Promise<void> {
  await assert.rejects(
    async () => {
      await work()
    },
    (error) => isBlockError(error) && error.kind === kind,
  )
}

export function deviceContract(name: string, maker: MakeDevice): void {
  suite(`${name} keeps the contract of a block device`, () => {
    test(`${name}: a new device has the size asked for and reads as zeros`, async (t) => {
      const device = await make(t, maker, 3 * MIB)
      assert.equal(device.size, 3 * MIB)
      assert.ok((await readAll(device)).every((byte) => byte === 0))
    })

    test(`${name}: a read returns what was written, at any alignment, and nothing around it changes`, async (t) => {
      const device = await make(t, maker, MIB)
      const unit = device.can.minimumBlock
      const from = new Random(1).fill(Buffer.alloc(200_000))
      const offset = roundDown(70_003, unit)
      const length = roundDown(150_001, unit)
      await device.write(offset, length, from, 17, 0)
      const all = await readAll(device)
      assert.ok(all.subarray(0, offset).every((byte) => byte === 0))
      assert.deepEqual(all.subarray(offset, offset + length), Buffer.from(from.subarray(17, 17 + length)))
      assert.ok(all.subarray(offset + length).every((byte) => byte === 0))
    })

    test(`${name}: a read fills only its part of the buffer`, async (t) => {
      const device = await make(t, maker, MIB)
      const into = Buffer.alloc(8192, 7)
      await device.read(4096, 4096, into, 1024)
      assert.ok(into.subarray(0, 1024).every((byte) => byte === 7))
      assert.ok(into.subarray(1024, 5120).every((byte) => byte === 0))
      assert.ok(into.subarray(5120).every((byte) => byte === 7))
    })

    test(`${name}: the last byte can be written and read`, async (t) => {
      const device = await make(t, maker, MIB)
      const unit = device.can.minimumBlock
      await device.write(MIB - unit, unit, Buffer.alloc(unit, 9), 0, FUA)
      assert.ok((await readAll(device, MIB - unit, unit)).every((byte) => byte === 9))
    })

    test(`${name}: a request outside the device, misplaced or too long for its buffer fails and changes nothing`, async (t) => {
      const device = await make(t, maker, MIB)
      const buffer = Buffer.alloc(8192, 1)
      await failsWith('out-of-range', () => device.write(MIB - 4096, 8192, buffer, 0, 0))
      await failsWith('out-of-range', () => device.read(MIB, 4096, buffer, 0))
      await failsWith('out-of-range', () => device.zero(-4096, 4096, 0))
      await failsWith('out-of-range', () => device.read(0.5, 1, buffer, 0))
      await failsWith('out-of-range', () => device.trim(0, Number.NaN, 0))
      await failsWith('out-of-range', () => device.extents(0, 2 * MIB, () => true))
      await failsWith('invalid-argument', () => device.write(0, 8192, buffer, 4096, 0))
      assert.ok((await readAll(device)).every((byte) => byte === 0))
    })

    test(`${name}: a request of no bytes succeeds`, async (t) => {
      const device = await make(t, maker, MIB)
      await device.read(0, 0, Buffer.alloc(0), 0)
      await device.write(MIB, 0, Buffer.alloc(0), 0, 0)
      await device.extents(0, 0, () => assert.fail('no extent was asked for'))
    })

    test(`${name}: zero makes a range read as zeros and leaves its neighbours`, async (t) => {
      const device = await make(t, maker, MIB)
      if (device.can.zero === 'none') return
      const unit = device.can.minimumBlock
      for (const flags of [0, MAY_UNMAP, FUA | MAY_UNMAP]) {
        await device.write(0, MIB, Buffer.alloc(MIB, 5), 0, 0)
        const offset = roundDown(100_001, unit)
        const length = roundDown(300_005, unit)
        await device.zero(offset, length, flags)
        const all = await readAll(device)
        assert.ok(all.subarray(0, offset).every((byte) => byte === 5))
        assert.ok(all.subarray(offset, offset + length).every((byte) => byte === 0))
        assert.ok(all.subarray(offset + length).every((byte) => byte === 5))
      }
    })

    test(`${name}: trimmed bytes read as before or as zeros, and their neighbours as before`, async (t) => {
      const device = await make(t, maker, MIB)
      if (device.can.trim === 'none') return
      const unit = device.can.minimumBlock
      await device.write(0, MIB, Buffer.alloc(MIB, 5), 0, 0)
      const offset = roundDown(65_537, unit)
      const length = roundDown(400_000, unit)
      await device.trim(offset, length, 0)
      const all = await readAll(device)
      assert.ok(all.subarray(0, offset).every((byte) => byte === 5))
      assert.ok(all.subarray(offset, offset + length).every((byte) => byte === 0 || byte === 5))
      assert.ok(all.subarray(offset + length).every((byte) => byte === 5))
    })

    test(`${name}: extents cover the range exactly, and what they call zero reads as zeros`, async (t) => {
      const device = await make(t, maker, 4 * MIB)
      await device.write(MIB, 128 * 1024, new Random(2).fill(Buffer.alloc(128 * 1024)), 0, 0)
      await device.write(3 * MIB + 4096, 4096, Buffer.alloc(4096, 1), 0, 0)
      const start = 512 * 1024
      let position = start
      const zeros: [number, number][] = []
      await device.extents(start, 3 * MIB, (length, extent) => {
        assert.ok(length > 0)
        if ((extent & ZERO) !== 0) zeros.push([position, length])
        position += length
        return true
      })
      assert.equal(position, start + 3 * MIB)
      for (const [offset, length] of zeros) {
        assert.ok((await readAll(device, offset, length)).every((byte) => byte === 0))
      }
      if (device.can.extents === 'native')
        assert.ok(zeros.length > 0, 'a device that knows its extents finds the holes')
    })

    test(`${name}: an extents visitor that returns false is not called again`, async (t) => {
      const device = await make(t, maker, 4 * MIB)
      await device.write(MIB, 65_536, Buffer.alloc(65_536, 1), 0, 0)
      let calls = 0
      await device.extents(0, 4 * MIB, () => {
        calls++
        return false
      })
      assert.equal(calls, 1)
    })

    test(`${name}: many requests in flight at once all complete with their own data`, async (t) => {
      const device = await make(t, maker, 4 * MIB)
      const piece = 65_536
      const buffers = Array.from({ length: 64 }, (_, i) => Buffer.alloc(piece, i + 1))
      await Promise.all(buffers.map((buffer, i) => device.write(i * piece, piece, buffer, 0, 0)))
      await device.flush()
      const read = await Promise.all(buffers.map((_, i) => readAll(device, i * piece, piece)))
      read.forEach((bytes, i) => assert.deepEqual(bytes, buffers[i]))
    })

    test(`${name}: after close every request fails as closed, and closing again is harmless`, async (t) => {
      const device = await make(t, maker, MIB)
      await device.close()
      await device.close()
      await failsWith('closed', () => device.read(0, 4096, Buffer.alloc(4096), 0))
      await failsWith('closed', () => device.write(0, 4096, Buffer.alloc(4096), 0, 0))
      await failsWith('closed', () => device.flush())
    })

    test(`${name}: random operations leave the same bytes as in a plain array`, async (t) => {
      const random = new Random(seedOfRun())
      t.diagnostic(`VARVE_SEED=${random.seed}`)
      const device = await make(t, maker, 2 * MIB + 4096)
      await againstModel(device, random, 300)
    })
  })
}

/** Runs `count` random operations on the device and on an array; fails at the first difference. */
export async function againstModel(device: BlockDevice, random: Random, count: number): Promise<void> {
  const model = await readAll(device)
  const unit = device.can.minimumBlock
  const note = (step: number, what: string): string => `VARVE_SEED=${random.seed}, step ${step}: ${what}`
  for (let step = 0; step < count; step++) {
    const aligned = random.chance(0.5) ? 4096 : unit
    const longest = random.chance(0.2) ? 400_000 : 20_000
    const offset = roundDown(random.below(device.size), aligned)
    const length = Math.min(device.size - offset, Math.max(aligned, roundDown(random.below(longest), aligned)))
    const kind = random.below(10)
    if (kind < 4) {
      const from = random.fill(Buffer.alloc(length))
      await device.write(offset, length, from, 0, random.chance(0.1) ? FUA : 0)
      model.set(from, offset)
    } else if (kind < 6 && device.can.zero !== 'none') {
      await device.zero(offset, length, random.chance(0.5) ? MAY_UNMAP : 0)
      model.fill(0, offset, offset + length)
    } else if (kind < 7 && device.can.trim !== 'none') {
      await device.trim(offset, length, 0)
      const after = await readAll(device, offset, length)
      const before = model.subarray(offset, offset + length)
      assert.ok(
        after.every((byte, i) => byte === 0 || byte === before[i]),
        note(step, 'trim changed data'),
      )
      model.set(after, offset)
    } else if (kind < 8) await device.flush()
    else {
      const same = (await readAll(device, offset, length)).equals(model.subarray(offset, offset + length))
      assert.ok(same, note(step, `${length} bytes at ${offset} differ`))
    }
  }
  assert.ok((await readAll(device)).equals(model), note(count, 'the whole differs'))
}
