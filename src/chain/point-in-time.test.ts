import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../base/random.ts'
import { SCRATCH_SLAB } from '../base/limits.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import { isBlockError } from '../block/error.ts'
import { guard } from '../block/guard.ts'
import { makeDisk } from '../../test/support/chains.ts'
import type { Disk } from './disk.ts'
import { PointInTime } from './point-in-time.ts'
import { ScratchBudget } from './scratch-budget.ts'
import { ScratchMemory } from './scratch-memory.ts'
import { Scratch } from './scratch.ts'

const GRANULE = 4096
const SIZE = 512 * 1024 + 1000

async function freeze(disk: Disk, budget: ScratchBudget, needed?: Bitmap, memoryBytes = 0): Promise<PointInTime> {
  const { host } = frozen.get(disk) as { host: Awaited<ReturnType<typeof makeDisk>>['host'] }
  const file = await host.open(`/scratch-${host.operations}`, { write: true, create: 'exclusive' })
  const wanted = needed ?? new Bitmap(disk.size)
  if (needed === undefined) wanted.setAll()
  await disk.drain()
  const memory = new ScratchMemory(GRANULE, ScratchBudget.of(memoryBytes, 1))
  const view = new PointInTime(disk, new Scratch({ memory, file }, GRANULE, [budget]), wanted)
  disk.undrain()
  return view
}

const frozen = new WeakMap<Disk, Awaited<ReturnType<typeof makeDisk>>>()

async function newDisk(scheduler?: Random): Promise<Disk> {
  const made = await makeDisk({
    base: 'raw',
    overlays: 1,
    size: SIZE,
    ...(scheduler === undefined ? {} : { scheduler }),
  })
  frozen.set(made.disk, made)
  return made.disk
}

async function readAll(device: { size: number; read: PointInTime['read'] | Disk['read'] }): Promise<Buffer> {
  const bytes = Buffer.alloc(device.size)
  await device.read(0, device.size, bytes, 0)
  return bytes
}

for (const [speed, memory] of [
  ['at once', 0],
  ['late', 0],
  ['late', SCRATCH_SLAB],
  ['late', 16 * SCRATCH_SLAB],
] as const) {
  const where = `on a host that answers ${speed}, with ${memory} bytes of scratch in memory`
  test(`a view shows its moment through writes, zeroes and trims, ${where}`, async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const disk = await newDisk(speed === 'late' ? new Random(random.seed) : undefined)
    const guest = guard(disk)
    await guest.write(0, SIZE, random.fill(Buffer.alloc(SIZE)), 0, 0)
    const moment = await readAll(disk)
    const budget = ScratchBudget.of(64 * 1024 * 1024, 1)
    const view = await freeze(disk, budget, undefined, memory)
    const inFlight: (Promise<void> | undefined)[] = []
    for (let step = 0; step < 400; step++) {
      const offset = random.below(SIZE)
      const length = Math.min(SIZE - offset, 1 + random.below(12_000))
      const kind = random.below(6)
      if (kind < 3) inFlight.push(guest.write(offset, length, random.fill(Buffer.alloc(length)), 0, 0))
      else if (kind === 3) inFlight.push(guest.zero(offset, length, 0))
      else if (kind === 4) inFlight.push(guest.trim(offset, length, 0))
      else {
        const bytes = Buffer.alloc(length)
        await view.read(offset, length, bytes, 0)
        assert.ok(
          bytes.equals(moment.subarray(offset, offset + length)),
          `VARVE_SEED=${random.seed}: ${length} at ${offset}`,
        )
      }
      if (inFlight.length > 8) await inFlight.shift()
    }
    await Promise.all(inFlight)
    assert.ok((await readAll(view)).equals(moment), `VARVE_SEED=${random.seed}: the whole view`)
    assert.ok(!(await readAll(disk)).equals(moment), 'the guest did write')
    await view.close()
    assert.equal(budget.used, 0)
  })
}

test('a second write to a saved granule leaves the saved bytes alone, and the short tail is saved too', async () => {
  const disk = await newDisk()
  await disk.write(SIZE - 1000, 1000, Buffer.alloc(1000, 1), 0, 0)
  const view = await freeze(disk, ScratchBudget.of(1024 * 1024, 1))
  await disk.write(SIZE - 500, 500, Buffer.alloc(500, 2), 0, 0)
  await disk.write(SIZE - 600, 600, Buffer.alloc(600, 3), 0, 0)
  const bytes = Buffer.alloc(1000)
  await view.read(SIZE - 1000, 1000, bytes, 0)
  assert.ok(bytes.every((byte) => byte === 1))
  await view.close()
})

test('only what the backup still needs is saved, and released granules give their scratch back', async () => {
  const disk = await newDisk()
  await disk.write(0, 64 * GRANULE, Buffer.alloc(64 * GRANULE, 1), 0, 0)
  const needed = new Bitmap(SIZE)
  needed.setGranules(0, 8)
  const budget = ScratchBudget.of(1024 * 1024, 1)
  const view = await freeze(disk, budget, needed)
  await disk.write(0, 64 * GRANULE, Buffer.alloc(64 * GRANULE, 2), 0, 0)
  assert.equal(budget.used, 8 * GRANULE)
  view.release(0, 4 * GRANULE)
  assert.equal(budget.used, 4 * GRANULE)
  const read = async (): Promise<void> => view.read(0, GRANULE, Buffer.alloc(GRANULE), 0)
  await assert.rejects(read, (error) => isBlockError(error, 'invalid-argument'))
  await view.close()
  assert.equal(budget.used, 0)
})

test('a scratch that is full breaks the view and not the guest', async () => {
  const disk = await newDisk()
  await disk.write(0, 64 * GRANULE, Buffer.alloc(64 * GRANULE, 1), 0, 0)
  const view = await freeze(disk, ScratchBudget.of(4 * GRANULE, 1))
  await disk.write(0, 64 * GRANULE, Buffer.alloc(64 * GRANULE, 2), 0, 0)
  assert.equal(view.broken?.kind, 'no-space')
  await assert.rejects(view.read(0, GRANULE, Buffer.alloc(GRANULE), 0), (error) => isBlockError(error, 'no-space'))
  const bytes = Buffer.alloc(GRANULE)
  await disk.read(0, GRANULE, bytes, 0)
  assert.ok(bytes.every((byte) => byte === 2))
  await view.close()
})

test('granules of zeros take no scratch, and what was trimmed since still counts as data', async () => {
  const disk = await newDisk()
  await disk.write(0, 16 * GRANULE, Buffer.alloc(16 * GRANULE, 1), 0, 0)
  const budget = ScratchBudget.of(1024 * 1024, 1)
  const view = await freeze(disk, budget)
  await disk.write(32 * GRANULE, 16 * GRANULE, Buffer.alloc(16 * GRANULE, 2), 0, 0)
  assert.equal(budget.used, 0)
  await disk.zero(0, 16 * GRANULE, 0)
  const data: number[] = []
  let position = 0
  await view.extents(0, SIZE, (length, extent) => {
    if (extent === 0) data.push(position, length)
    position += length
    return true
  })
  assert.equal(position, SIZE)
  assert.equal(data[0], 0)
  const bytes = Buffer.alloc(16 * GRANULE)
  await view.read(0, bytes.length, bytes, 0)
  assert.ok(bytes.every((byte) => byte === 1))
  await view.close()
})
