// qcow2 images between Varve and QEMU, both ways: what qemu-img and qemu-io write, Varve reads, whatever the version, cluster
// size, compression, refcount width or internal snapshots; what Varve writes, `qemu-img check` finds clean and
// `qemu-img compare` finds equal.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, suite, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { roundDown } from '../../src/base/round.ts'
import { MAY_UNMAP, type Layer } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2, type Qcow2Image, readQcow2Info } from '../../src/format/qcow2/image.ts'
import { openRaw } from '../../src/format/raw/raw.ts'
import { realHost } from '../../src/host/real.ts'
import { missing, peer, runPeer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'

const KIB = 1024
const MIB = 1024 * KIB

async function readAll(image: Layer): Promise<Buffer> {
  const bytes = Buffer.alloc(image.size)
  await image.read(0, bytes.length, bytes, 0)
  return bytes
}

async function open(file: string): Promise<Qcow2Image> {
  return openQcow2(realHost, file, { name: path.basename(file) })
}

async function contentOf(file: string): Promise<Buffer> {
  const image = await open(file)
  try {
    return await readAll(image)
  } finally {
    await image.close()
  }
}

/** A raw file with random runs of noise, text and holes. */
function rawSource(t: TestContext, size: number, seed: number): { file: string; bytes: Buffer } {
  const random = new Random(seed)
  const bytes = Buffer.alloc(size)
  for (let offset = 0; offset < size; offset += 37 * KIB) {
    const piece = bytes.subarray(offset, Math.min(size, offset + random.below(60 * KIB)))
    if (random.chance(0.3)) random.fill(piece)
    else if (random.chance(0.5)) piece.fill(`varve ${offset} `)
  }
  const file = path.join(tempFolder(t), 'source.raw')
  fs.writeFileSync(file, bytes)
  return { file, bytes }
}

function assertClean(file: string): void {
  const outcome = runPeer('qemu-img', ['check', '-f', 'qcow2', file])
  assert.equal(outcome.status, 0, outcome.stdout + outcome.stderr)
}

/** Random writes, zeros and trims on the image and on `model`. */
async function churn(image: Layer, model: Buffer, random: Random, count: number): Promise<void> {
  for (let step = 0; step < count; step++) {
    const offset = roundDown(random.below(image.size), 512)
    const length = Math.min(image.size - offset, 512 * random.between(1, random.chance(0.2) ? 600 : 20))
    const kind = random.below(10)
    if (kind < 6) {
      const bytes = random.fill(Buffer.alloc(length))
      await image.write(offset, length, bytes, 0, 0)
      model.set(bytes, offset)
    } else if (kind < 8) {
      await image.zero(offset, length, random.chance(0.5) ? MAY_UNMAP : 0)
      model.fill(0, offset, offset + length)
    } else if (kind < 9) {
      await image.trim(offset, length, 0)
      await image.read(offset, length, model, offset)
    } else await image.flush()
  }
}

const CREATED_BY_QEMU: readonly (readonly [name: string, options: string, compressed: boolean])[] = [
  ['version 3', 'compat=1.1', false],
  ['version 2', 'compat=0.10', false],
  ['clusters of 512', 'cluster_size=512', false],
  ['clusters of 2 MiB', 'cluster_size=2M', false],
  ['lazy refcounts', 'lazy_refcounts=on', false],
  ['preallocated metadata', 'preallocation=metadata', false],
  ['extended L2 entries', 'extended_l2=on', false],
  ['extended L2 entries, clusters of 16 KiB', 'extended_l2=on,cluster_size=16k', false],
  ['extended L2 entries, clusters of 2 MiB', 'extended_l2=on,cluster_size=2M', false],
  ['extended L2 entries, preallocated', 'extended_l2=on,preallocation=metadata', false],
  ['extended L2 entries, zlib', 'extended_l2=on', true],
  ['zlib', 'compat=1.1', true],
  ['zlib, clusters of 4 KiB', 'cluster_size=4k', true],
  ['zlib, version 2', 'compat=0.10', true],
  ['zstd', 'compression_type=zstd', true],
  ['zstd, clusters of 2 MiB', 'compression_type=zstd,cluster_size=2M', true],
  ...[1, 2, 4, 8, 32, 64].map((bits) => [`refcounts of ${bits} bits`, `refcount_bits=${bits}`, false] as const),
]

suite('qcow2 between QEMU and Varve', { skip: missing('qemu-img', 'qemu-io') }, () => {
  for (const [name, options, compressed] of CREATED_BY_QEMU) {
    test(`what qemu-img wrote reads the same, and can be written: ${name}`, async (t) => {
      const { file, bytes } = rawSource(t, 3 * MIB + 5 * 512, 3)
      const target = path.join(path.dirname(file), 'image.qcow2')
      const flags = compressed ? ['-c'] : []
      peer('qemu-img', 'convert', ...flags, '-f', 'raw', '-O', 'qcow2', '-o', options, file, target)
      const image = await open(target)
      assert.ok((await readAll(image)).equals(bytes))
      const { corruptions, leaks, problems } = await image.check()
      assert.deepEqual([corruptions, leaks], [0, 0], problems.join('\n'))
      await image.setAccess('write')
      await churn(image, bytes, new Random(4), 150)
      assert.ok((await readAll(image)).equals(bytes))
      await image.close()
      assertClean(target)
      fs.writeFileSync(file, bytes)
      peer('qemu-img', 'compare', '-f', 'raw', '-F', 'qcow2', file, target)
    })
  }

  for (const clusterSize of [512, 4 * KIB, 64 * KIB, 2 * MIB]) {
    test(`what Varve writes, QEMU finds clean and equal: clusters of ${clusterSize}`, async (t) => {
      const { file } = rawSource(t, 0, 1)
      const target = path.join(path.dirname(file), 'image.qcow2')
      const size = 6 * MIB + 512
      await createQcow2(realHost, target, { size, clusterSize })
      assertClean(target)
      const model = Buffer.alloc(size)
      const random = new Random(clusterSize)
      for (let session = 0; session < 3; session++) {
        const image = await open(target)
        await image.setAccess('write')
        await churn(image, model, random, 150)
        if (session === 1) {
          await image.setAccess('read')
          assertClean(target)
          await image.setAccess('write')
        }
        await image.close()
        assertClean(target)
      }
      fs.writeFileSync(file, model)
      peer('qemu-img', 'compare', '-f', 'raw', '-F', 'qcow2', file, target)
      assert.ok((await contentOf(target)).equals(model))
    })
  }

  test('an overlay that Varve makes shows its backing file to QEMU, and QEMU’s writes to it show in Varve', async (t) => {
    const { file: base, bytes } = rawSource(t, 2 * MIB, 5)
    const target = path.join(path.dirname(base), 'overlay.qcow2')
    await createQcow2(realHost, target, { size: 2 * MIB, backing: { name: 'source.raw', format: 'raw' } })
    const overlay = await open(target)
    assert.deepEqual(overlay.backingReference, { name: 'source.raw', format: 'raw' })
    overlay.backing = await openRaw(realHost, base, { name: 'base' })
    await overlay.setAccess('write')
    await churn(overlay, bytes, new Random(6), 100)
    await overlay.backing.close()
    await overlay.close()
    assertClean(target)
    peer('qemu-io', '-f', 'qcow2', '-c', 'write -P 0x5a 100k 70k', '-c', 'write -z 1M 128k', target)
    bytes.fill(0x5a, 100 * KIB, 170 * KIB)
    bytes.fill(0, MIB, MIB + 128 * KIB)
    const again = await open(target)
    again.backing = await openRaw(realHost, base, { name: 'base' })
    assert.ok((await readAll(again)).equals(bytes))
    await again.backing.close()
    await again.close()
    const flat = path.join(path.dirname(base), 'flat.raw')
    peer('qemu-img', 'convert', '-f', 'qcow2', '-O', 'raw', target, flat)
    assert.ok(fs.readFileSync(flat).equals(bytes))
  })

  test('QEMU opens an image whose process was killed, and loses nothing that was acknowledged', async (t) => {
    const { file } = rawSource(t, 0, 1)
    const target = path.join(path.dirname(file), 'image.qcow2')
    const size = 4 * MIB
    await createQcow2(realHost, target, { size, clusterSize: 4 * KIB })
    const model = Buffer.alloc(size)
    const image = await open(target)
    await image.setAccess('write')
    await churn(image, model, new Random(7), 300)
    // The file as it is now is what a kill would leave.
    const left = path.join(path.dirname(file), 'left.qcow2')
    const forQemu = path.join(path.dirname(file), 'for-qemu.qcow2')
    fs.copyFileSync(target, left)
    fs.copyFileSync(target, forQemu)
    await image.close()
    fs.writeFileSync(file, model)
    peer('qemu-img', 'compare', '-f', 'raw', '-F', 'qcow2', file, forQemu)
    // Refcounts may be behind, which the dirty bit says and a repair puts right; the map of the guest's data is sound.
    peer('qemu-img', 'check', '-r', 'all', '-f', 'qcow2', forQemu)
    peer('qemu-img', 'compare', '-f', 'raw', '-F', 'qcow2', file, forQemu)
    const again = await open(left)
    assert.ok((await readAll(again)).equals(model))
    await again.setAccess('write')
    assert.ok((await readAll(again)).equals(model))
    await churn(again, model, new Random(8), 50)
    await again.close()
    assertClean(left)
    assert.ok((await contentOf(left)).equals(model))
  })

  test('QEMU finds leaks and nothing else in an image of version 2 whose process was killed, and none after a close', async (t) => {
    const { file } = rawSource(t, 0, 1)
    const target = path.join(path.dirname(file), 'image.qcow2')
    const left = path.join(path.dirname(file), 'left.qcow2')
    const size = 4 * MIB
    const model = Buffer.alloc(size)
    const random = new Random(21)
    await createQcow2(realHost, target, { size, clusterSize: 512, version: 2 })
    const image = await open(target)
    await image.setAccess('write')
    for (let kill = 0; kill < 8; kill++) {
      await churn(image, model, random, 60)
      // The file as it is now is what a kill would leave.
      fs.copyFileSync(target, left)
      const outcome = runPeer('qemu-img', ['check', '-f', 'qcow2', '--output=json', left])
      const found = JSON.parse(outcome.stdout) as { corruptions?: number; leaks?: number; 'check-errors': number }
      assert.deepEqual([found.corruptions ?? 0, found['check-errors']], [0, 0], outcome.stdout)
      assert.ok((found.leaks ?? 0) > 0, 'clusters are counted ahead of use')
      assert.ok((await contentOf(left)).equals(model))
      fs.writeFileSync(file, model)
      peer('qemu-img', 'compare', '-f', 'raw', '-F', 'qcow2', file, left)
      const again = await open(left)
      await again.setAccess('write')
      const after = Buffer.from(model)
      await churn(again, after, new Random(kill), 30)
      await again.close()
      peer('qemu-img', 'check', '-r', 'leaks', '-f', 'qcow2', left)
      assert.ok((await contentOf(left)).equals(after))
    }
    await image.close()
    assertClean(target)
  })

  test('internal snapshots keep their content while the image is written', async (t) => {
    const { file, bytes } = rawSource(t, 2 * MIB, 9)
    const target = path.join(path.dirname(file), 'image.qcow2')
    peer('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', file, target)
    peer('qemu-img', 'snapshot', '-c', 'before', target)
    const model = Buffer.from(bytes)
    const image = await open(target)
    await image.setAccess('write')
    await churn(image, model, new Random(10), 200)
    await image.close()
    assertClean(target)
    assert.ok((await contentOf(target)).equals(model))
    const past = path.join(path.dirname(file), 'past.raw')
    peer('qemu-img', 'convert', '-l', 'snapshot.name=before', '-f', 'qcow2', '-O', 'raw', target, past)
    assert.ok(fs.readFileSync(past).equals(bytes))
    const snapshotLeft = path.join(path.dirname(file), 'dirty.qcow2')
    const dirty = await open(target)
    await dirty.setAccess('write')
    await churn(dirty, model, new Random(11), 50)
    fs.copyFileSync(target, snapshotLeft)
    await dirty.close()
    const repaired = await open(snapshotLeft)
    await repaired.setAccess('write')
    await repaired.close()
    assertClean(snapshotLeft)
    assert.ok((await contentOf(snapshotLeft)).equals(model))
  })

  test('a grown image shows zeros in what was added, to both, even over a longer backing file', async (t) => {
    const { file: base, bytes } = rawSource(t, 3 * MIB, 12)
    const target = path.join(path.dirname(base), 'overlay.qcow2')
    const before = MIB + 700 * 512
    await createQcow2(realHost, target, { size: before, clusterSize: 4 * KIB, backing: { name: base, format: 'raw' } })
    const overlay = await open(target)
    overlay.backing = await openRaw(realHost, base, { name: 'base' })
    await overlay.setAccess('write')
    await overlay.grow(40 * MIB)
    await overlay.write(39 * MIB, 512, Buffer.alloc(512, 1), 0, 0)
    const expected = Buffer.alloc(40 * MIB)
    bytes.copy(expected, 0, 0, before)
    expected.fill(1, 39 * MIB, 39 * MIB + 512)
    assert.ok((await readAll(overlay)).equals(expected))
    await overlay.backing.close()
    await overlay.close()
    assertClean(target)
    fs.writeFileSync(path.join(path.dirname(base), 'expected.raw'), expected)
    peer('qemu-img', 'compare', '-f', 'raw', '-F', 'qcow2', path.join(path.dirname(base), 'expected.raw'), target)
  })

  test('what a disk held past its new end is gone when Varve shrinks it and QEMU makes it larger again', async (t) => {
    const target = path.join(tempFolder(t), 'image.qcow2')
    const model = Buffer.alloc(MIB)
    model.fill('old ', 0, MIB - 100 * KIB)
    await createQcow2(realHost, target, { size: MIB })
    const image = await open(target)
    await image.setAccess('write')
    await image.write(0, MIB, Buffer.alloc(MIB, 'old '), 0, 0)
    await image.resize(MIB - 100 * KIB, { shrink: true })
    await image.close()
    assertClean(target)
    peer('qemu-img', 'resize', '-q', '-f', 'qcow2', target, String(MIB))
    assert.ok((await contentOf(target)).equals(model))
  })

  test('the backing reference can be rewritten to a shorter, a longer and another format’s name', async (t) => {
    const { file } = rawSource(t, 0, 1)
    const target = path.join(path.dirname(file), 'image.qcow2')
    await createQcow2(realHost, target, { size: MIB, backing: { name: 'first.qcow2', format: 'qcow2' } })
    const image = await open(target)
    await image.setAccess('write')
    for (const [name, format] of [
      ['x', 'raw'],
      ['a-much-longer-name-than-the-first-one.qcow2', 'qcow2'],
      ['y.raw', 'raw'],
    ] as const) {
      await image.setBackingReference({ name, format })
      const info = await readQcow2Info(realHost, target)
      assert.deepEqual(info.backing, { name, format })
    }
    await image.close()
    const info = JSON.parse(peer('qemu-img', 'info', '-U', '--output=json', target)) as Record<string, unknown>
    assert.deepEqual([info['backing-filename'], info['backing-filename-format']], ['y.raw', 'raw'])
  })

  test('an encrypted image is refused by name', async (t) => {
    const target = path.join(tempFolder(t), 'image.qcow2')
    // LUKS would first measure how fast the machine is, which a busy one refuses.
    const options = ['--object', 'secret,id=s,data=x', '-o', 'encrypt.format=aes,encrypt.key-secret=s']
    peer('qemu-img', 'create', '-f', 'qcow2', ...options, target, '1M')
    await assert.rejects(open(target), (error) => isBlockError(error, 'unsupported') && /encrypted/.test(error.message))
  })

  test('an image that QEMU is writing cannot be opened, and one that is written here is locked for QEMU', async (t) => {
    const target = path.join(tempFolder(t), 'image.qcow2')
    await createQcow2(realHost, target, { size: MIB })
    const image = await open(target)
    await image.setAccess('write')
    const refused = runPeer('qemu-io', ['-f', 'qcow2', '-c', 'write 0 4k', target])
    assert.notEqual(refused.status, 0)
    await image.setAccess('read')
    peer('qemu-img', 'info', target)
    await image.close()
    peer('qemu-io', '-f', 'qcow2', '-c', 'write 0 4k', target)
  })
})
