// Compressed clusters that Varve writes: QEMU reads the same, finds no fault and no leak, whatever the cluster size, refcount width
// and compression; and a power loss never leaves one that cannot be read.

import assert from 'node:assert/strict'
import path from 'node:path'
import { suite, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { MAY_UNMAP } from '../../src/block/device.ts'
import { ClusterCompressor } from '../../src/format/qcow2/cluster-compressor.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { realHost } from '../../src/host/real.ts'
import { contentByQemu } from '../support/images.ts'
import { missing, peer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'

const KIB = 1024
const MIB = 1024 * KIB
const SKIP = { skip: missing('qemu-img') }

const SETTINGS = [
  'cluster_size=64k',
  'cluster_size=64k,compression_type=zstd',
  'cluster_size=512',
  'cluster_size=4k,refcount_bits=1',
  'cluster_size=4k,refcount_bits=2',
  'cluster_size=16k,refcount_bits=64,compression_type=zstd',
  'cluster_size=2M',
  'cluster_size=64k,extended_l2=on',
] as const

/** Writes clusters of text, noise and zeros to the image and to `model`: compressed, plain, and punched out again. */
async function churn(image: Qcow2Image, model: Buffer, random: Random, count: number): Promise<void> {
  const size = image.header.clusterSize
  const compressor = new ClusterCompressor(image.header.compression, size)
  for (let step = 0; step < count; step++) {
    const offset = random.below(Math.ceil(image.size / size)) * size
    const length = Math.min(size, image.size - offset)
    const kind = random.below(10)
    if (kind < 7) {
      const cluster = Buffer.alloc(size)
      if (random.chance(0.8)) cluster.fill(`cluster ${step} `, 0, length)
      if (random.chance(0.6)) random.fill(cluster.subarray(0, random.below(length)))
      await image.writeCompressed(offset, await compressor.compress(cluster), cluster, 0, length)
      cluster.copy(model, offset, 0, length)
    } else if (kind < 9) {
      const part = Math.min(length, 512 * random.between(1, size / 512))
      await image.write(offset, part, random.fill(Buffer.alloc(part)), 0, 0)
      await image.read(offset, part, model, offset)
    } else {
      await image.zero(offset, length, MAY_UNMAP)
      model.fill(0, offset, offset + length)
    }
    if (random.chance(0.05)) await image.flush()
  }
  compressor.close()
}

suite('Compressed clusters, between Varve and QEMU', SKIP, () => {
  for (const settings of SETTINGS) {
    test(`${settings}: QEMU reads what Varve compressed, and finds no fault`, async (t) => {
      const folder = tempFolder(t)
      const file = path.join(folder, 'image.qcow2')
      const size = settings.includes('2M') ? 20 * MIB + 512 : settings.includes('512') ? MIB + 512 : 4 * MIB + 512
      peer('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', settings, file, String(size))
      const model = Buffer.alloc(size)
      const random = new Random(71)
      for (let round = 0; round < 2; round++) {
        const image = await openQcow2(realHost, file, { name: 'image' })
        await image.setAccess('write')
        await churn(image, model, random, 120)
        const seen = Buffer.alloc(size)
        await image.read(0, size, seen, 0)
        assert.ok(seen.equals(model), 'Varve reads what it wrote')
        const { corruptions, leaks } = await image.check()
        assert.deepEqual([corruptions, leaks], [0, 0])
        await image.close()
        peer('qemu-img', 'check', '-f', 'qcow2', file)
        assert.ok(contentByQemu(file, 'qcow2', folder).equals(model), 'QEMU reads what Varve wrote')
      }
    })
  }

  test('several clusters at once are packed and none is lost', async (t) => {
    const folder = tempFolder(t)
    const file = path.join(folder, 'image.qcow2')
    peer('qemu-img', 'create', '-q', '-f', 'qcow2', file, '8M')
    const image = await openQcow2(realHost, file, { name: 'image' })
    await image.setAccess('write')
    const model = Buffer.alloc(8 * MIB)
    const lanes = Array.from({ length: 4 }, () => new ClusterCompressor('zlib', 64 * KIB))
    let next = 0
    const run = async (compressor: ClusterCompressor): Promise<void> => {
      for (let offset = next; offset < model.length; offset = next) {
        next += 64 * KIB
        const cluster = model.subarray(offset, offset + 64 * KIB).fill(`at ${offset} `)
        await image.writeCompressed(offset, await compressor.compress(cluster), cluster, 0, cluster.length)
      }
      compressor.close()
    }
    await Promise.all(lanes.map(run))
    await image.close()
    peer('qemu-img', 'check', '-f', 'qcow2', file)
    assert.ok(contentByQemu(file, 'qcow2', folder).equals(model))
  })

  test('a compressed cluster that is written right after a snapshot was made leaves the snapshot as it was', async (t) => {
    const folder = tempFolder(t)
    const file = path.join(folder, 'image.qcow2')
    peer('qemu-img', 'create', '-q', '-f', 'qcow2', file, '1M')
    const image = await openQcow2(realHost, file, { name: 'image' })
    await image.setAccess('write')
    const before = Buffer.alloc(64 * KIB, 'before ')
    await image.write(0, before.length, before, 0, 0)
    await image.createSnapshot('before')
    const compressor = new ClusterCompressor('zlib', 64 * KIB)
    const after = Buffer.alloc(64 * KIB, 'after ')
    await image.writeCompressed(0, await compressor.compress(after), after, 0, after.length)
    compressor.close()
    const seen = Buffer.alloc(64 * KIB)
    const snapshot = await image.openSnapshot('before')
    await snapshot.read(0, seen.length, seen, 0)
    await snapshot.close()
    assert.ok(seen.equals(before))
    await image.close()
    peer('qemu-img', 'check', '-f', 'qcow2', file)
  })
})
