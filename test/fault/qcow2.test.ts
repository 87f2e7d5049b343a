// A qcow2 image on a host that fails: full, or with writes and syncs that fail. A request that fails leaves the image usable
// and consistent; a sync that failed is never taken for one that succeeded.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { BlockError, isBlockError } from '../../src/block/error.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { type HostOperation, SimulatedHost } from '../../src/host/simulated.ts'

const PIECE = 4096
const SIZE = 512 * PIECE

async function open(host: SimulatedHost, backing?: MemoryDevice): Promise<Qcow2Image> {
  const image = await openQcow2(host, '/disk', { name: 'disk' })
  image.backing = backing
  await image.setAccess('write')
  return image
}

async function newImage(
  host: SimulatedHost,
  clusterSize: number,
  backing?: MemoryDevice,
  extendedL2 = false,
): Promise<Qcow2Image> {
  await createQcow2(host, '/disk', { size: SIZE, clusterSize, extendedL2 })
  return open(host, backing)
}

async function contentOf(image: Qcow2Image): Promise<Buffer> {
  const bytes = Buffer.alloc(image.size)
  await image.read(0, bytes.length, bytes, 0)
  return bytes
}

/** Writes pieces of its number, at random places; gives what the disk must hold and how many requests failed. */
async function writePieces(image: Qcow2Image, model: Buffer, random: Random, count: number): Promise<number> {
  let failed = 0
  for (let i = 0; i < count; i++) {
    const offset = random.below(SIZE / PIECE) * PIECE
    const bytes = Buffer.alloc(PIECE, 1 + (i % 250))
    try {
      await image.write(offset, PIECE, bytes, 0, 0)
      model.set(bytes, offset)
    } catch (error) {
      assert.ok(error instanceof BlockError, String(error))
      failed++
      // What a failed write left in its own range is not said; all else must be as before.
      await image.read(offset, PIECE, model, offset)
    }
  }
  return failed
}

for (const [clusterSize, extendedL2] of [
  [512, false],
  [4096, false],
  [65_536, false],
  [65_536, true],
] as const) {
  const how = extendedL2 ? ', extended L2 entries' : ''
  test(`a full host fails writes and loses nothing else: clusters of ${clusterSize}${how}`, async () => {
    const host = new SimulatedHost({ capacity: 700_000 })
    const backing = new MemoryDevice(SIZE)
    await backing.write(0, SIZE, Buffer.alloc(SIZE, 0xbb), 0, 0)
    const image = await newImage(host, clusterSize, backing, extendedL2)
    const model = Buffer.from(backing.bytes)
    const failed = await writePieces(image, model, new Random(clusterSize), 600)
    assert.ok(failed > 0, 'the host was full')
    assert.ok((await contentOf(image)).equals(model))
    await image.trim(0, SIZE / 2, 0)
    await image.read(0, SIZE / 2, model, 0)
    await image.flush()
    await image.write(0, PIECE, Buffer.alloc(PIECE, 9), 0, 0)
    model.fill(9, 0, PIECE)
    await image.close()
    const again = await open(host, backing)
    assert.ok((await contentOf(again)).equals(model))
    const { corruptions, leaks, problems } = await again.check()
    assert.deepEqual([corruptions, leaks], [0, 0], problems.join('\n'))
    await again.close()
  })

  test(`host writes that fail at random leave a consistent image: clusters of ${clusterSize}${how}`, async () => {
    for (let seed = 1; seed <= 15; seed++) {
      const random = new Random(seed)
      const host = new SimulatedHost(seed % 2 === 0 ? {} : { scheduler: new Random(seed) })
      const backing = seed % 3 === 0 ? undefined : new MemoryDevice(SIZE)
      await backing?.write(0, SIZE, Buffer.alloc(SIZE, 0xbb), 0, 0)
      const image = await newImage(host, clusterSize, backing, extendedL2)
      const model = Buffer.alloc(SIZE, backing === undefined ? 0 : 0xbb)
      const failures = new Random(seed + 100)
      host.beforeOperation = ({ kind, path }: HostOperation) => {
        if (kind === 'write' && failures.chance(0.1)) throw new BlockError('io', `${path}: made to fail`, { path })
      }
      const failed = await writePieces(image, model, random, 150)
      host.beforeOperation = undefined
      assert.ok(failed > 0)
      assert.ok((await contentOf(image)).equals(model), `seed ${seed}`)
      await image.close()
      const again = await open(host, backing)
      assert.ok((await contentOf(again)).equals(model), `seed ${seed}, opened again`)
      const { corruptions, problems } = await again.check()
      assert.equal(corruptions, 0, `seed ${seed}: ${problems.join('\n')}`)
      await again.close()
    }
  })
}

test('after a failed sync no flush succeeds until the image is opened again, and the dirty bit stays', async () => {
  const host = new SimulatedHost()
  const image = await newImage(host, 65_536)
  await image.write(0, PIECE, Buffer.alloc(PIECE, 1), 0, 0)
  host.beforeOperation = ({ kind, path }: HostOperation) => {
    if (kind === 'sync') throw new BlockError('io', `${path}: made to fail`, { path })
  }
  await assert.rejects(
    async () => image.flush(),
    (error) => isBlockError(error, 'io'),
  )
  host.beforeOperation = undefined
  await image.write(PIECE, PIECE, Buffer.alloc(PIECE, 2), 0, 0)
  await assert.rejects(
    async () => image.flush(),
    (error) => isBlockError(error, 'io'),
  )
  await assert.rejects(image.close(), (error) => isBlockError(error, 'io'))
  const again = await openQcow2(host, '/disk', { name: 'disk' })
  assert.equal(again.header.incompatible & 1, 1)
  await again.setAccess('write')
  await again.close()
})

test('freed clusters are used again after two flushes, so that a disk that is trimmed and filled does not grow', async () => {
  const host = new SimulatedHost()
  const image = await newImage(host, 4096)
  const noise = new Random(3).fill(Buffer.alloc(SIZE))
  await image.write(0, SIZE, noise, 0, 0)
  const full = (await host.status('/disk'))?.size ?? 0
  for (let round = 0; round < 10; round++) {
    await image.trim(0, SIZE, 0)
    await image.flush()
    await image.write(0, PIECE, noise, 0, 0)
    await image.flush()
    await image.write(0, SIZE, noise, 0, 0)
  }
  assert.ok((await contentOf(image)).equals(noise))
  const after = (await host.status('/disk'))?.size ?? 0
  assert.ok(after <= full * 1.1, `${after} bytes after ${full}`)
  await image.close()
  const reopened = await open(host)
  await reopened.trim(0, SIZE, 0)
  await reopened.close()
  // What was free when the image was opened is found by the scan.
  const last = await open(host)
  for (let i = 0; i < 4; i++) {
    await last.write(0, PIECE, noise, i, 0)
    await last.flush()
  }
  await last.write(0, SIZE, noise, 0, 0)
  assert.ok(((await host.status('/disk'))?.size ?? 0) <= full * 1.1)
  const { corruptions, leaks } = await last.check()
  assert.deepEqual([corruptions, leaks], [0, 0])
  await last.close()
})

test('a bitmap whose saving failed, at any write or sync, is never trusted, or whole', async () => {
  let faults = 0
  for (const kind of ['write', 'sync'] as const) {
    for (let isFaulty = true, at = 0; isFaulty; at++, faults++) {
      const host = new SimulatedHost()
      const image = await newImage(host, 4096)
      await image.bitmapEdits.add('on', 512, true)
      await image.write(0, PIECE, Buffer.alloc(PIECE, 1), 0, 0)
      await image.setAccess('read')
      let left = at
      isFaulty = false
      host.beforeOperation = (operation: HostOperation) => {
        if (operation.kind !== kind || left-- !== 0) return
        isFaulty = true
        throw new BlockError('io', `${operation.path}: made to fail`, { path: operation.path })
      }
      // Whoever is refused tries again, and goes on with what there is.
      const tries = [
        () => image.setAccess('write'),
        () => image.setAccess('write'),
        async () => image.write(PIECE, PIECE, Buffer.alloc(PIECE, 2), 0, 0),
        () => image.bitmapEdits.add('off', 512, false),
        () => image.setAccess('read'),
        () => image.setAccess('read'),
        () => image.setAccess('write'),
        async () => image.write(2 * PIECE, PIECE, Buffer.alloc(PIECE, 3), 0, 0),
        () => image.setAccess('read'),
        () => image.setAccess('read'),
      ]
      for (const attempt of tries)
        await attempt().catch((error) => assert.ok(error instanceof BlockError, String(error)))
      host.beforeOperation = undefined
      // What a failed sync lost is lost: only what is on the disk counts.
      host.crash('none')
      const again = await openQcow2(host, '/disk', { name: 'disk' })
      const content = await contentOf(again)
      for (const { name, isConsistent } of again.bitmaps) {
        if (!isConsistent) continue
        const bits = await again.readBitmap(name)
        if (name !== 'on') assert.equal(bits.count, 0)
        else
          for (let i = 0; i < 3; i++)
            if (content[i * PIECE] !== 0) assert.ok(bits.hasAll(i * PIECE, PIECE), `${kind} ${at}, piece ${i}`)
      }
      await again.setAccess('write')
      const { corruptions, problems } = await again.check()
      assert.equal(corruptions, 0, `${kind} ${at}: ${problems.join('\n')}`)
      await again.close()
    }
  }
  assert.ok(faults > 40, `${faults} faults`)
})
