import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { backUp, beginFull, changeSome, failsWith, initInline, noise } from '../../test/support/backups.ts'
import { Random, seedOfRun } from '../base/random.ts'
import { HOLE, ZERO } from '../block/device.ts'
import { listExtents } from '../block/extents.ts'
import { MemoryStore } from './stores/memory.ts'

const KIB = 1024
const MIB = 1024 * KIB

suite('a backup as a device', () => {
  test('reads of any alignment and length agree with the content, in flight together', async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const repository = await initInline(new MemoryStore())
    const content = noise(random, 5 * MIB + 321)
    const first = await backUp(repository, content)
    const changes = changeSome(content, random, 200, 9000)
    const { id } = await backUp(repository, content, { id: first.id, changes })
    const device = (await repository.openBackup(id)).disks[0]?.device
    assert.ok(device !== undefined)
    const readOne = async (): Promise<void> => {
      const offset = random.below(content.length)
      const length = random.below(Math.min(content.length - offset, random.pick([100, 10_000, 3 * MIB])) + 1)
      const into = Buffer.alloc(length + 9, 1)
      await device.read(offset, length, into, 5)
      assert.ok(
        into.subarray(5, 5 + length).equals(content.subarray(offset, offset + length)),
        `${length} at ${offset}`,
      )
      assert.ok(
        into.subarray(0, 5).every((byte) => byte === 1) && into.subarray(5 + length).every((byte) => byte === 1),
      )
    }
    for (let round = 0; round < 20; round++) await Promise.all(Array.from({ length: 12 }, readOne))
  })

  test('it refuses writes, requests outside it, and everything after close', async () => {
    const repository = await initInline(new MemoryStore())
    const { id } = await backUp(repository, Buffer.alloc(8192, 1))
    const reader = await repository.openBackup(id)
    const device = reader.disks[0]?.device
    assert.ok(device !== undefined && !device.can.write)
    const buffer = Buffer.alloc(8192)
    await failsWith('read-only', () => device.write(0, 4096, buffer, 0, 0), /read-only/)
    await failsWith('read-only', () => device.zero(0, 4096, 0), /read-only/)
    await failsWith('read-only', () => device.trim(0, 4096, 0), /read-only/)
    await failsWith('out-of-range', () => device.read(4096, 8192, buffer, 0), /outside/)
    await reader.close()
    await failsWith('closed', () => device.read(0, 1, buffer, 0), /close/)
  })

  test('what was read a moment ago is answered within the call', async () => {
    const repository = await initInline(new MemoryStore())
    const content = noise(new Random(1), MIB)
    const device = (await repository.openBackup((await backUp(repository, content)).id)).disks[0]?.device
    const into = Buffer.alloc(10_000)
    await device?.read(100_000, 10_000, into, 0)
    into.fill(0)
    assert.equal(device?.read(100_000, 10_000, into, 0), undefined)
    assert.ok(into.equals(content.subarray(100_000, 110_000)))
  })

  test('its extents are exactly what was stored, whatever the size of the holes', async () => {
    const repository = await initInline(new MemoryStore())
    const size = 3 * 1024 * 1024 * MIB
    const writer = await beginFull(repository, [{ name: 'sda', size }])
    const data = Buffer.alloc(8192, 1)
    const places = [0, 70 * MIB, 2 * 1024 * 1024 * MIB + 4096, size - 8192]
    for (const place of places) await writer.disk(0).write(place, 8192, data, 0)
    const { id } = await writer.finish()
    const device = (await repository.openBackup(id)).disks[0]?.device
    assert.ok(device !== undefined)
    const found = (await listExtents(device, 0, size)).filter(({ extent }) => extent === 0)
    assert.deepEqual(
      found,
      places.map((offset) => ({ offset, length: 8192, extent: 0 })),
    )
    assert.deepEqual(await listExtents(device, 4096, 8192), [
      { offset: 4096, length: 4096, extent: 0 },
      { offset: 8192, length: 4096, extent: HOLE | ZERO },
    ])
  })
})
