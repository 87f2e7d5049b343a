// Old images go on reading as they did, and can be written: those in test/golden, made by QEMU and by earlier builds
// of Varve (make-golden.ts says how). And images whose bytes are damaged at random
// give their data or one clear error, in bounded time, whatever is damaged.

import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { suite, test } from 'node:test'
import zlib from 'node:zlib'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { BlockError, type ErrorKind, isBlockError } from '../../src/block/error.ts'
import { guard } from '../../src/block/guard.ts'
import { openChain } from '../../src/chain/open.ts'
import { openQcow2, Qcow2Image } from '../../src/format/qcow2/image.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'

const FOLDER = path.join(import.meta.dirname, '..', 'golden')
const NAMES = ['qcow2-v2.qcow2', 'qcow2-zlib.qcow2', 'qcow2-zstd.qcow2', 'qcow2-snapshot.qcow2']

/** What all of them held at first: 1 KiB pieces of text, every third 8 KiB empty. */
function content(): Buffer {
  const bytes = Buffer.alloc(256 * 1024)
  for (let offset = 0; offset < bytes.length; offset += 1024)
    if ((offset / 8192) % 3 < 2) bytes.fill(`varve ${offset};`, offset, offset + 1024)
  return bytes
}

async function hostWith(bytes: Uint8Array): Promise<SimulatedHost> {
  const host = new SimulatedHost()
  const file = await host.open('/image', { write: true, create: 'exclusive' })
  await file.write(0, bytes.length, bytes, 0)
  await file.sync()
  await file.close()
  return host
}

for (const name of NAMES) {
  test(`${name} reads as when it was made`, async () => {
    const image = await openQcow2(await hostWith(fs.readFileSync(path.join(FOLDER, name))), '/image', { name })
    const expected = content()
    if (name.includes('snapshot')) {
      expected.fill(0x5a, 20 * 1024, 26 * 1024)
      expected.fill(0, 64 * 1024, 72 * 1024)
    }
    const bytes = Buffer.alloc(image.size)
    await image.read(0, bytes.length, bytes, 0)
    assert.ok(bytes.equals(expected))
    const { corruptions, leaks, problems } = await image.check()
    assert.deepEqual([corruptions, leaks], [0, 0], problems.join('\n'))
    await image.close()
  })
}

interface GoldenImage {
  readonly files: readonly string[]
  readonly size: number
  readonly sha256: string
  /** SHA-256 of what each internal snapshot holds, cut or filled up with zeros to the size of the disk. */
  readonly snapshots?: Readonly<Record<string, string>>
}

const IMAGES = JSON.parse(fs.readFileSync(path.join(FOLDER, 'images.json'), 'utf8')) as Record<string, GoldenImage>

/** A host with the files of an image, and what opens it with all that is below it. */
async function unpack(
  files: readonly string[],
): Promise<(work: (image: Qcow2Image) => Promise<void>) => Promise<void>> {
  const host = new SimulatedHost()
  await host.makeFolder('/golden')
  for (const name of files) {
    const bytes = zlib.zstdDecompressSync(fs.readFileSync(path.join(FOLDER, `${name}.zst`)))
    const file = await host.open(`/golden/${name}`, { write: true, create: 'exclusive' })
    await file.write(0, bytes.length, bytes, 0)
    await file.close()
  }
  return async (work) => {
    const layers = await openChain({ host, path: `/golden/${files[0]}`, format: 'qcow2' })
    try {
      const image = layers.at(-1)
      assert.ok(image instanceof Qcow2Image)
      await work(image)
    } finally {
      for (const layer of layers.toReversed()) await layer.close()
    }
  }
}

async function readAll(image: Qcow2Image): Promise<Buffer> {
  const bytes = Buffer.alloc(image.size)
  await image.read(0, bytes.length, bytes, 0)
  return bytes
}

async function assertSound(image: Qcow2Image): Promise<void> {
  const { corruptions, leaks, problems } = await image.check()
  assert.deepEqual([corruptions, leaks], [0, 0], problems.join('\n'))
}

function hashOf(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex')
}

async function assertSnapshots(image: Qcow2Image, { size, snapshots = {} }: GoldenImage): Promise<void> {
  assert.deepEqual(
    image.snapshots.map(({ name }) => name),
    Object.keys(snapshots),
  )
  for (const [name, sha256] of Object.entries(snapshots)) {
    const snapshot = await image.openSnapshot(name)
    const bytes = Buffer.alloc(Math.max(size, snapshot.size))
    await snapshot.read(0, snapshot.size, bytes, 0)
    await snapshot.close()
    assert.equal(hashOf(bytes.subarray(0, size)), sha256, name)
  }
}

/** By image, the bitmaps that recorded the changes of make-golden.ts, which touch this many granules. */
const MARKED: Readonly<Record<string, readonly (readonly [name: string, granularity: number, granules: number])[]>> = {
  'qemu-bitmaps': [
    ['coarse', 65_536, 4],
    ['fine', 4096, 65],
  ],
  'varve-bitmaps': [['fine', 4096, 65]],
}

async function assertBitmaps(image: Qcow2Image, name: string): Promise<void> {
  const found = image.bitmaps.map((bitmap) => [bitmap.name, bitmap.granularity, bitmap.isConsistent] as const)
  const marked = MARKED[name] ?? []
  assert.deepEqual(new Set(found), new Set(marked.map(([bitmap, granularity]) => [bitmap, granularity, true])))
  for (const [bitmap, , granules] of marked) assert.equal((await image.readBitmap(bitmap)).count, granules, bitmap)
}

for (const [name, golden] of Object.entries(IMAGES)) {
  const { files, size, sha256 } = golden
  test(`${name} reads as when it was made, and can be written`, async () => {
    const withImage = await unpack(files)
    let expected: Buffer = Buffer.alloc(0)
    await withImage(async (image) => {
      expected = await readAll(image)
      assert.deepEqual([image.size, hashOf(expected)], [size, sha256])
      await assertSnapshots(image, golden)
      await assertBitmaps(image, name)
      if (!name.includes('killed')) await assertSound(image)
      if (name.includes('corrupt')) {
        await assert.rejects(image.setAccess('write'), (error) => isBlockError(error, 'corrupt'))
        return
      }
      await image.setAccess('write')
      const bytes = Buffer.alloc(70 * 1024, 0xab)
      for (const offset of [0, 100 * 1024 + 1, size - bytes.length]) {
        await image.write(offset, bytes.length, bytes, 0, 0)
        expected.set(bytes, offset)
      }
      await image.zero(300 * 1024, 50 * 1024, 0)
      expected.fill(0, 300 * 1024, 350 * 1024)
    })
    await withImage(async (image) => {
      assert.ok((await readAll(image)).equals(expected))
      await assertSnapshots(image, golden)
      await assertSound(image)
    })
  })
}

const ALLOWED: readonly ErrorKind[] = ['invalid-format', 'corrupt', 'unsupported', 'no-space', 'invalid-argument']
const MUTATIONS = 700

/** Damages a few bytes: anywhere, or where the structures are, or by setting a field to an extreme. */
function mutate(original: Uint8Array, random: Random): Uint8Array {
  const bytes = Uint8Array.from(random.chance(0.1) ? original.subarray(0, random.below(original.length)) : original)
  for (let i = random.between(1, 4); i > 0; i--) {
    const reach = random.pick([112, 112, 512, 65_536, bytes.length])
    const at = random.below(Math.max(1, Math.min(reach, bytes.length)))
    const field = bytes.subarray(at - (at % 8))
    if (random.chance(0.3)) field.subarray(0, random.pick([4, 8])).fill(random.pick([0, 0x7f, 0xff]))
    else bytes[at] = random.pick([random.below(256), 0, 1, 0x80, 0xff])
  }
  return bytes
}

/** Does with a damaged image what a disk would do. */
async function exercise(bytes: Uint8Array, random: Random): Promise<void> {
  const host = await hostWith(bytes)
  const image = await openQcow2(host, '/image', { name: 'damaged' })
  try {
    const device = guard(image)
    const length = Math.min(device.size, 512 * 1024)
    const buffer = Buffer.alloc(length)
    await device.read(0, length, buffer, 0)
    await image.allocation(0, image.size, () => random.chance(0.999))
    await device.extents(0, device.size, () => random.chance(0.999))
    await image.check()
    await image.setAccess('write')
    for (let i = 0; i < 5; i++) {
      const at = random.below(Math.max(1, length - 8192))
      await device.write(at, Math.min(8192, length - at), buffer, 0, 0)
      await device.zero(at, Math.min(100_000, length - at), 0)
      await device.flush()
    }
  } finally {
    await image.close()
  }
}

suite('a damaged image gives its data or one clear error', () => {
  for (const name of NAMES) {
    test(`a damaged ${name}`, async (t) => {
      const random = new Random(seedOfRun())
      t.diagnostic(`VARVE_SEED=${random.seed}`)
      const original = fs.readFileSync(path.join(FOLDER, name))
      let refused = 0
      for (let i = 0; i < MUTATIONS; i++) {
        const bytes = mutate(original, random)
        const start = performance.now()
        try {
          await exercise(bytes, random)
        } catch (error) {
          const isExpected = error instanceof BlockError && ALLOWED.includes(error.kind)
          if (!isExpected)
            throw new Error(`VARVE_SEED=${random.seed}, mutation ${i}: ${String(error)}`, { cause: error })
          refused++
        }
        const took = performance.now() - start
        assert.ok(took < 2000, `VARVE_SEED=${random.seed}, mutation ${i} took ${took} ms`)
      }
      assert.ok(refused > MUTATIONS / 20, 'damage is noticed')
    })
  }
})
