// Persistent bitmaps between QEMU and Varve, both ways: QEMU makes bitmaps, Varve writes to the image and saves them, and QEMU
// sees exactly the granules that Varve wrote; QEMU writes, and Varve reads exactly the granules that QEMU wrote.

import assert from 'node:assert/strict'
import path from 'node:path'
import { suite, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { roundDown } from '../../src/base/round.ts'
import { Bitmap } from '../../src/bitmap/bitmap.ts'
import { MAY_UNMAP } from '../../src/block/device.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { realHost } from '../../src/host/real.ts'
import { missing, peer, runPeer } from '../support/peer.ts'
import { dirtyRangesOfQemu, joined, type Range, StorageDaemon } from '../support/storage-daemon.ts'
import { tempFolder } from '../support/temp.ts'

const KIB = 1024
const MIB = 1024 * KIB

async function open(file: string, access: 'read' | 'write'): Promise<Qcow2Image> {
  const image = await openQcow2(realHost, file, { name: path.basename(file) })
  await image.setAccess(access)
  return image
}

function assertClean(file: string): void {
  const outcome = runPeer('qemu-img', ['check', '-f', 'qcow2', file])
  assert.equal(outcome.status, 0, outcome.stdout + outcome.stderr)
}

/** The bitmaps as `qemu-img info` lists them. */
function bitmapsOfQemu(file: string): { name: string; granularity: number; flags: string[] }[] {
  const info = JSON.parse(peer('qemu-img', 'info', '-U', '--output=json', file)) as {
    'format-specific': { data: { bitmaps?: { name: string; granularity: number; flags: string[] }[] } }
  }
  return info['format-specific'].data.bitmaps ?? []
}

/** The ranges, grown to whole granules of a disk of `size` bytes. */
function granulesOf(ranges: readonly Range[], granularity: number, size: number): Range[] {
  const bitmap = new Bitmap(size, granularity)
  for (const [start, end] of ranges) bitmap.set(start, end - start)
  return rangesOf(bitmap)
}

function rangesOf(bitmap: Bitmap): Range[] {
  const ranges: Range[] = []
  bitmap.runs(0, bitmap.size, bitmap.size, (offset, length) => ranges.push([offset, offset + length]) > 0)
  return joined(ranges)
}

/** Random writes, zeros and trims of whole sectors; gives where. */
async function change(image: Qcow2Image, random: Random, count: number): Promise<Range[]> {
  const ranges: Range[] = []
  for (let i = 0; i < count; i++) {
    const offset = roundDown(random.below(image.size), 512)
    const length = Math.min(image.size - offset, 512 * random.between(1, 40))
    const kind = random.below(4)
    if (kind === 0) await image.zero(offset, length, random.chance(0.5) ? MAY_UNMAP : 0)
    else if (kind === 1) await image.trim(offset, length, 0)
    else await image.write(offset, length, random.fill(new Uint8Array(length)), 0, 0)
    ranges.push([offset, offset + length])
  }
  return ranges
}

const GRANULARITIES = [512, 4 * KIB, 64 * KIB, 2 * MIB, 32 * MIB]

suite('persistent bitmaps between QEMU and Varve', {
  skip: missing('qemu-img', 'qemu-io', 'qemu-storage-daemon', 'nbdinfo'),
}, () => {
  const seed = seedOfRun()

  for (const clusterSize of [512, 4 * KIB, 64 * KIB, 2 * MIB]) {
    test(`QEMU sees exactly the granules that Varve wrote: clusters of ${clusterSize}`, async (t) => {
      t.diagnostic(`VARVE_SEED=${seed}`)
      const random = new Random(seed + clusterSize)
      const file = path.join(tempFolder(t), 'image.qcow2')
      const size = clusterSize === 512 ? 7 * MIB + 512 : 73 * MIB + 1536
      peer('qemu-img', 'create', '-f', 'qcow2', '-o', `cluster_size=${clusterSize}`, file, String(size))
      for (const granularity of GRANULARITIES)
        peer('qemu-img', 'bitmap', '--add', '-g', String(granularity), file, `every-${granularity}`)
      peer('qemu-img', 'bitmap', '--add', '--disable', '-g', '64k', file, 'still')
      const written: Range[] = []
      for (let session = 0; session < 3; session++) {
        const image = await open(file, 'write')
        written.push(...(await change(image, random, 12)))
        await image.close()
        assertClean(file)
      }
      for (const granularity of GRANULARITIES) {
        const found = await dirtyRangesOfQemu(t, file, `every-${granularity}`)
        assert.deepEqual(found, granulesOf(written, granularity, size), `seed ${seed}, granularity ${granularity}`)
      }
      assert.deepEqual(await dirtyRangesOfQemu(t, file, 'still'), [])
      const listed = bitmapsOfQemu(file)
      assert.deepEqual(
        listed.map(({ granularity, flags }) => [granularity, flags]),
        [...GRANULARITIES.map((granularity) => [granularity, ['auto']]), [64 * KIB, []]],
      )
      // QEMU can go on with them: it merges one into another and reads the same.
      peer('qemu-img', 'bitmap', '--merge', `every-${64 * KIB}`, file, 'still')
      assert.deepEqual(await dirtyRangesOfQemu(t, file, 'still'), granulesOf(written, 64 * KIB, size))
      assertClean(file)
    })

    test(`Varve reads exactly the granules that QEMU wrote: clusters of ${clusterSize}`, async (t) => {
      t.diagnostic(`VARVE_SEED=${seed}`)
      const random = new Random(seed + clusterSize + 1)
      const file = path.join(tempFolder(t), 'image.qcow2')
      const size = clusterSize === 512 ? 7 * MIB + 512 : 73 * MIB + 1536
      await createQcow2(realHost, file, { size, clusterSize })
      const image = await open(file, 'write')
      for (const granularity of GRANULARITIES) await image.bitmapEdits.add(`every-${granularity}`, granularity, true)
      await image.bitmapEdits.add('still', undefined, false)
      await image.close()
      assertClean(file)
      const written: Range[] = []
      const some = (): { offset: number; length: number } => {
        const offset = roundDown(random.below(size), 512)
        const length = Math.min(size - offset, 512 * random.between(1, 40))
        written.push([offset, offset + length])
        return { offset, length }
      }
      const commands = Array.from({ length: 8 }, () => {
        const { offset, length } = some()
        return ['-c', `${random.chance(0.3) ? 'write -z' : 'write'} ${offset} ${length}`]
      })
      peer('qemu-io', '-f', 'qcow2', ...commands.flat(), file)
      const daemon = await StorageDaemon.start(t, file)
      for (let i = 0; i < 8; i++) {
        const { offset, length } = some()
        peer('qemu-io', '-f', 'raw', '-c', `write ${offset} ${length}`, daemon.uri)
      }
      await daemon.stop()
      const after = await open(file, 'read')
      for (const granularity of GRANULARITIES) {
        const found = rangesOf(await after.readBitmap(`every-${granularity}`))
        assert.deepEqual(found, granulesOf(written, granularity, size), `seed ${seed}, granularity ${granularity}`)
      }
      assert.equal((await after.readBitmap('still')).count, 0)
      const { corruptions, leaks, problems } = await after.check()
      assert.deepEqual([corruptions, leaks], [0, 0], problems.join('\n'))
      await after.close()
    })
  }
})
