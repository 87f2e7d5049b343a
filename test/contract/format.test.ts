// The contract of everything that makes a host file a device: FileDevice, raw and qcow2 with several cluster sizes, with and
// without a backing file, on the real host (with and without its system calls) and on a simulated one whose operations
// complete late and out of order.

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import type { BlockDevice, Capabilities } from '../../src/block/device.ts'
import { Filter } from '../../src/block/filter.ts'
import { guard } from '../../src/block/guard.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { FileDevice } from '../../src/file/file-device.ts'
import { type CreateOptions, createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { createRaw, openRaw } from '../../src/format/raw/raw.ts'
import { withCacheMode } from '../../src/host/cache-mode.ts'
import type { Host } from '../../src/host/host.ts'
import { realHost } from '../../src/host/real.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'
import { tempFolder } from '../support/temp.ts'
import { againstModel, deviceContract } from './device.ts'

const KIB = 1024
const MIB = 1024 * KIB

interface Place {
  readonly host: Host
  readonly path: string
}

const real = (t: TestContext): Place => ({ host: realHost, path: path.join(tempFolder(t), 'image') })
const direct = (t: TestContext): Place => ({ ...real(t), host: withCacheMode(realHost, 'none') })
const late = (): Place => ({ host: new SimulatedHost({ scheduler: new Random(7) }), path: '/image' })

async function rawImage({ host, path: at }: Place, size: number): Promise<BlockDevice> {
  await createRaw(host, at, size)
  const image = await openRaw(host, at, { name: 'raw' })
  await image.setAccess('write')
  return image
}

async function qcow2Image(
  { host, path: at }: Place,
  size: number,
  clusterSize: number,
  more: Partial<CreateOptions> = {},
): Promise<Qcow2Image> {
  await createQcow2(host, at, { size, clusterSize, ...more })
  const image = await openQcow2(host, at, { name: 'qcow2' })
  await image.setAccess('write')
  return image
}

async function fileDevice({ host, path: at }: Place, size: number): Promise<BlockDevice> {
  await createRaw(host, at, size)
  return new FileDevice(await host.open(at, { write: true }))
}

/** A device of zeros below, so that the image has to hide and copy what it would otherwise skip. */
async function overlay(
  place: Place,
  size: number,
  clusterSize: number,
  backingSize: number,
  more: Partial<CreateOptions> = {},
): Promise<Qcow2Image> {
  const image = await qcow2Image(place, size, clusterSize, more)
  image.backing = new MemoryDevice(backingSize)
  return image
}

/** With clusters of 2 MiB, the few MiB of the contract's device have no holes that an image knows of. */
class Coarse extends Filter {
  override get can(): Capabilities {
    return { ...super.can, extents: 'emulated' }
  }
}

deviceContract('file device', (t, size) => fileDevice(real(t), size))
deviceContract('file device, late host', (_t, size) => fileDevice(late(), size))
deviceContract('raw', (t, size) => rawImage(real(t), size))
deviceContract('raw, late host', (_t, size) => rawImage(late(), size))
for (const clusterSize of [512, 4 * KIB, 64 * KIB]) {
  deviceContract(`qcow2, clusters of ${clusterSize}`, (t, size) => qcow2Image(real(t), size, clusterSize))
}
deviceContract('qcow2, clusters of 2097152', async (t, size) => new Coarse(await qcow2Image(real(t), size, 2 * MIB)))
deviceContract('qcow2, late host', (_t, size) => qcow2Image(late(), size, 4 * KIB))
deviceContract('qcow2 over a backing device', (t, size) => overlay(real(t), size, 64 * KIB, size))
deviceContract('qcow2 over a shorter backing device', (t, size) => overlay(real(t), size, 16 * KIB, size / 2 + 513))
deviceContract('qcow2 over a backing device, late host', (_t, size) => overlay(late(), size, 8 * KIB, size))

deviceContract('file device, past the page cache', (t, size) => fileDevice(direct(t), size))
deviceContract('raw, past the page cache', (t, size) => rawImage(direct(t), size))
deviceContract('qcow2, past the page cache', (t, size) => qcow2Image(direct(t), size, 64 * KIB))
deviceContract('qcow2, clusters of 512, past the page cache', (t, size) => qcow2Image(direct(t), size, 512))
deviceContract('qcow2 over a backing device, past the page cache', (t, size) =>
  overlay(direct(t), size, 16 * KIB, size / 2 + 513),
)

const extendedL2 = true
const dataFile = 'data.raw'
const raw = { dataFile, dataFileRaw: true }
deviceContract('qcow2, extended L2 entries', (t, size) => qcow2Image(real(t), size, 64 * KIB, { extendedL2 }))
deviceContract('qcow2, extended L2 entries, late host', (_t, size) =>
  qcow2Image(late(), size, 16 * KIB, { extendedL2 }),
)
deviceContract('qcow2, extended L2 entries, over a backing device', (t, size) =>
  overlay(real(t), size, 64 * KIB, size / 2 + 513, { extendedL2 }),
)
deviceContract('qcow2, extended L2 entries, over a backing device, late host', (_t, size) =>
  overlay(late(), size, 16 * KIB, size, { extendedL2 }),
)
deviceContract('qcow2, data file', (t, size) => qcow2Image(real(t), size, 64 * KIB, { dataFile }))
deviceContract('qcow2, data file, late host', (_t, size) => qcow2Image(late(), size, 4 * KIB, { dataFile }))
deviceContract('qcow2, data file, over a backing device', (t, size) =>
  overlay(real(t), size, 16 * KIB, size / 2 + 513, { dataFile }),
)
deviceContract('qcow2, data file and extended L2 entries, late host', (_t, size) =>
  qcow2Image(late(), size, 64 * KIB, { dataFile, extendedL2 }),
)
deviceContract('qcow2, raw data file', (t, size) => qcow2Image(real(t), size, 64 * KIB, raw))
deviceContract('qcow2, raw data file, late host', (_t, size) => qcow2Image(late(), size, 4 * KIB, raw))

const OVER_DATA: readonly (readonly [name: string, clusterSize: number, more: Partial<CreateOptions>])[] = [
  ['clusters of 512', 512, {}],
  ['clusters of 65536', 64 * KIB, {}],
  ['extended L2 entries', 64 * KIB, { extendedL2 }],
  ['a data file', 4 * KIB, { dataFile }],
  ['a data file and extended L2 entries', 16 * KIB, { dataFile, extendedL2 }],
]
for (const [name, clusterSize, more] of OVER_DATA) {
  test(`random operations on a qcow2 image with ${name} over data leave what an array has`, async (t) => {
    const random = new Random(11)
    const image = await qcow2Image(real(t), 2 * MIB + 4 * KIB, clusterSize, more)
    const below = new MemoryDevice(MIB + 1000)
    await below.write(0, below.size, random.fill(Buffer.alloc(below.size)), 0, 0)
    image.backing = below
    const before = Buffer.from(below.bytes)
    await againstModel(guard(image), random, 300)
    const { corruptions, leaks, problems } = await image.check()
    assert.deepEqual([corruptions, leaks], [0, 0], problems.join('\n'))
    assert.ok(before.equals(below.bytes), 'the backing device is only read')
    await image.close()
  })
}

test('a raw data file holds at any time what the disk reads as', async (t) => {
  for (const options of [raw, { ...raw, extendedL2 }]) {
    const place = real(t)
    const image = await qcow2Image(place, 2 * MIB + 4 * KIB, 64 * KIB, options)
    for (let seed = 0; seed < 4; seed++) {
      await againstModel(guard(image), new Random(seed), 60)
      const disk = Buffer.alloc(image.size)
      await image.read(0, disk.length, disk, 0)
      assert.ok(fs.readFileSync(path.join(path.dirname(place.path), dataFile)).equals(disk), `seed ${seed}`)
    }
    await image.close()
  }
})

test('writers of one new cluster at the same time keep each other’s data', async () => {
  for (let seed = 0; seed < 40; seed++) {
    const host = new SimulatedHost({ scheduler: new Random(seed) })
    const image = await qcow2Image({ host, path: '/image' }, MIB, 64 * KIB)
    image.backing = seed % 2 === 0 ? undefined : new MemoryDevice(MIB)
    const piece = 4 * KIB
    const pieces = Array.from({ length: 64 }, (_, i) => i)
    await Promise.all(pieces.map((i) => image.write(i * piece, piece, Buffer.alloc(piece, i + 1), 0, 0)))
    const all = Buffer.alloc(64 * piece)
    await image.read(0, all.length, all, 0)
    for (const i of pieces) {
      const isOwn = all.subarray(i * piece, (i + 1) * piece).every((byte) => byte === i + 1)
      assert.ok(isOwn, `seed ${seed}: piece ${i} is lost`)
    }
    await image.close()
  }
})

const HAS_SYSCALLS = process.env['VARVE_NO_SYSCALLS'] !== '1'

test('without system calls, the contract holds just as well', { skip: !HAS_SYSCALLS && 'this is that run' }, () => {
  const env = { ...process.env, VARVE_NO_SYSCALLS: '1', NODE_TEST_CONTEXT: undefined }
  const run = spawnSync(process.execPath, [import.meta.filename], { env, encoding: 'utf8' })
  assert.equal(run.status, 0, run.stdout.slice(run.stdout.indexOf('failing tests:')) + run.stderr)
})
