// Partition tables that sfdisk made, and what damage makes of them: a table of the other copy, a partition that cannot be opened, or an error;
// never a place outside the disk, and never a search without an end.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import zlib from 'node:zlib'
import { test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import { guard } from '../../src/block/guard.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import type { Partition, PartitionTable } from '../../src/format/partitions/partition.ts'
import { readPartitions } from '../../src/format/partitions/partitions.ts'

const SECTOR = 512
const FOLDER = path.join(import.meta.dirname, '..', 'golden')
const DISKS = {
  gpt: zlib.zstdDecompressSync(fs.readFileSync(path.join(FOLDER, 'sfdisk-gpt.raw.zst'))),
  mbr: zlib.zstdDecompressSync(fs.readFileSync(path.join(FOLDER, 'sfdisk-mbr.raw.zst'))),
}

function memory(bytes: Uint8Array): MemoryDevice {
  const device = new MemoryDevice(bytes.length)
  device.bytes.set(bytes)
  return device
}

function read(disk: Uint8Array | MemoryDevice): Promise<PartitionTable | undefined> {
  const device = disk instanceof MemoryDevice ? disk : memory(disk)
  // The door refuses what is outside; nothing of that may come as far.
  return readPartitions(guard(device)).catch((error: unknown) => {
    assert.ok(!isBlockError(error, 'out-of-range'), String(error))
    throw error
  })
}

function places(table: PartitionTable | undefined): unknown[] {
  return (table?.partitions ?? []).map(({ number, start, size, type, label }) => [
    number,
    start / SECTOR,
    size / SECTOR,
    type,
    label,
  ])
}

const GPT_PLACES = [
  [1, 2048, 8192, 'c12a7328-f81f-11d2-ba4b-00a0c93ec93b', 'EFI System'],
  [2, 10_240, 16_384, '0fc63daf-8483-4772-8e79-3d69d8477de4', 'racine é'],
  [3, 30_720, 2048, '0657fd6d-a4ab-43c4-84e5-0933c84b4f4f', ''],
]

test('the partitions of a GPT are those that sfdisk was told', async () => {
  const table = await read(DISKS.gpt)
  assert.equal(table?.kind, 'gpt')
  assert.deepEqual(places(table), GPT_PLACES)
})

test('the partitions of an MBR are those that sfdisk was told, the logical ones from 5', async () => {
  const table = await read(DISKS.mbr)
  assert.equal(table?.kind, 'mbr')
  assert.deepEqual(places(table), [
    [1, 2048, 4096, '83', ''],
    [2, 8192, 32_768, '05', ''],
    [5, 10_240, 4096, '83', ''],
    [6, 18_432, 8192, '82', ''],
  ])
})

test('a GPT whose first copy is damaged is read from the last sector, and one without a copy is refused', async () => {
  const disk = Buffer.from(DISKS.gpt)
  disk[SECTOR + 20] = 1
  assert.deepEqual(places(await read(disk)), GPT_PLACES)
  disk.fill(0, SECTOR, 2 * SECTOR)
  assert.deepEqual(places(await read(disk)), GPT_PLACES)
  disk[disk.length - SECTOR + 30] = 1
  await assert.rejects(read(disk), (error) => isBlockError(error, 'corrupt'))
})

test('a partition that does not lie on the disk is listed with that, and the others can be opened', async () => {
  const table = await read(DISKS.mbr.subarray(0, 10 * 1024 * 1024))
  const problems = table?.partitions.map(({ number, problem }) => [number, problem !== undefined])
  assert.deepEqual(problems, [
    [1, false],
    [2, true],
    [5, false],
    [6, true],
  ])
})

test('logical partitions that lead to each other in a circle come to an end', async () => {
  const disk = Buffer.from(DISKS.mbr)
  // The second one's table: its entry 2 leads back to the first.
  const second = disk.readUInt32LE(8192 * SECTOR + 446 + 16 + 8) + 8192
  disk.writeUInt8(5, second * SECTOR + 446 + 16 + 4)
  disk.writeUInt32LE(0, second * SECTOR + 446 + 16 + 8)
  assert.equal((await read(disk))?.partitions.length, 4)
})

test('a disk without a table, and one that is too small for any, has none', async () => {
  for (const size of [0, 512, 1024, 4096, 1024 * 1024]) assert.equal(await read(Buffer.alloc(size)), undefined)
})

test('damage anywhere in a table is an error or a table all of whose partitions lie on the disk', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  let changed = 0
  const disks = { gpt: memory(DISKS.gpt), mbr: memory(DISKS.mbr) }
  for (let round = 0; round < 400; round++) {
    const kind = random.pick(['gpt', 'mbr'] as const)
    const disk = disks[kind].bytes
    const starts = kind === 'gpt' ? [0, SECTOR, 2 * SECTOR, disk.length - SECTOR] : [440, 8192 * SECTOR + 440]
    const flips = Array.from({ length: 1 + random.below(4) }, () => random.pick(starts) + random.below(72))
    for (const at of flips) disk[at] = random.below(256)
    let partitions: readonly Partition[] = []
    try {
      partitions = (await read(disks[kind]))?.partitions ?? []
    } catch (error) {
      assert.ok(isBlockError(error, 'corrupt'), String(error))
    }
    for (const at of flips) disk[at] = DISKS[kind][at] as number
    if (partitions.length !== 4 && partitions.length !== 3) changed++
    for (const { start, size, problem } of partitions) {
      if (problem === undefined) assert.ok(start >= 0 && size > 0 && start + size <= disk.length)
    }
  }
  assert.ok(changed > 0)
})
