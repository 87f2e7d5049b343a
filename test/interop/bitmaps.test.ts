// Persistent bitmaps between QEMU and Varve, both ways: QEMU makes bitmaps, Varve writes to the image and saves them, and QEMU
// sees exactly the granules that Varve wrote; QEMU writes, and Varve reads exactly the granules that QEMU wrote.

import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import fs from 'node:fs'
import path from 'node:path'
import { suite, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { roundDown } from '../../src/base/round.ts'
import { Bitmap } from '../../src/bitmap/bitmap.ts'
import { MAY_UNMAP } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
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

  test('bitmaps are added, enabled, disabled, merged, cleared, saved and removed, and QEMU sees it', async (t) => {
    const file = path.join(tempFolder(t), 'image.qcow2')
    const size = 40 * MIB
    await createQcow2(realHost, file, { size })
    const image = await open(file, 'write')
    const { bitmapEdits: edits } = image
    const zero = (at: number): Promise<void> | undefined => image.zero(at, 4 * KIB, 0)
    await edits.add('coarse', MIB, true)
    await edits.add('fine', 4 * KIB, false)
    await zero(0)
    await edits.setRecording('fine', true)
    await zero(3 * MIB)
    await edits.setRecording('coarse', false)
    await zero(5 * MIB)
    await edits.add('both', 512, false)
    await edits.merge('both', await image.readBitmap('coarse'))
    await edits.merge('both', await image.readBitmap('fine'))
    await edits.add('gone', undefined, true)
    await edits.remove('gone')
    await edits.add('cleared', undefined, true)
    await zero(7 * MIB)
    await edits.clear('cleared')
    await zero(9 * MIB)
    const bits = new Bitmap(size, 64 * KIB)
    bits.set(MIB, 10 * MIB)
    bits.set(size - 1, 1)
    await edits.save([
      { name: 'saved', bits, isRecording: false },
      { name: 'fine', bits, isRecording: true },
    ])
    await zero(20 * MIB)
    await image.close()
    assertClean(file)
    const expected: Readonly<Record<string, readonly Range[]>> = {
      coarse: [
        [0, MIB],
        [3 * MIB, 4 * MIB],
      ],
      both: [
        [0, MIB],
        [3 * MIB, 4 * MIB],
        [5 * MIB, 5 * MIB + 4 * KIB],
      ],
      cleared: [9, 20].map((at) => [at * MIB, at * MIB + 64 * KIB]),
      saved: [
        [MIB, 11 * MIB],
        [size - 64 * KIB, size],
      ],
      fine: [
        [MIB, 11 * MIB],
        [20 * MIB, 20 * MIB + 64 * KIB],
        [size - 64 * KIB, size],
      ],
    }
    for (const [name, ranges] of Object.entries(expected))
      assert.deepEqual(await dirtyRangesOfQemu(t, file, name), ranges, name)
    const flags = Object.fromEntries(bitmapsOfQemu(file).map((bitmap) => [bitmap.name, bitmap.flags]))
    assert.deepEqual(flags, { coarse: [], both: [], cleared: ['auto'], saved: [], fine: ['auto'] })
  })

  test('through a resize by either, bitmaps keep what they have, and what is new is clear', async (t) => {
    const file = path.join(tempFolder(t), 'image.qcow2')
    await createQcow2(realHost, file, { size: 3 * MIB + 512, clusterSize: 4 * KIB })
    const image = await open(file, 'write')
    for (const granularity of [512, 2 * MIB]) {
      await image.bitmapEdits.add(`on-${granularity}`, granularity, true)
      await image.bitmapEdits.add(`off-${granularity}`, granularity, false)
    }
    await image.write(3 * MIB, 512, Buffer.alloc(512, 1), 0, 0)
    // So large that the tables of the fine ones do not stay in their places.
    await image.grow(300 * MIB)
    await image.write(299 * MIB, 512, Buffer.alloc(512, 1), 0, 0)
    await image.close()
    assertClean(file)
    const last: Range = [299 * MIB, 299 * MIB + 512]
    assert.deepEqual(await dirtyRangesOfQemu(t, file, 'on-512'), [[3 * MIB, 3 * MIB + 512], last])
    assert.deepEqual(await dirtyRangesOfQemu(t, file, `on-${2 * MIB}`), [
      [2 * MIB, 4 * MIB],
      [298 * MIB, 300 * MIB],
    ])
    assert.deepEqual(await dirtyRangesOfQemu(t, file, 'off-512'), [])
    peer('qemu-img', 'resize', '-f', 'qcow2', '--shrink', file, '4M')
    const after = await open(file, 'write')
    assert.deepEqual(rangesOf(await after.readBitmap('on-512')), [[3 * MIB, 3 * MIB + 512]])
    await after.write(0, 512, Buffer.alloc(512, 1), 0, 0)
    await after.resize(3 * MIB, { shrink: true })
    await after.close()
    assertClean(file)
    assert.deepEqual(await dirtyRangesOfQemu(t, file, 'on-512'), [[0, 512]])
    assert.deepEqual(await dirtyRangesOfQemu(t, file, `on-${2 * MIB}`), [[0, 3 * MIB]])
  })

  test('applying an internal snapshot sets all of what records, and nothing else', async (t) => {
    const file = path.join(tempFolder(t), 'image.qcow2')
    await createQcow2(realHost, file, { size: MIB })
    const image = await open(file, 'write')
    await image.createSnapshot('before')
    await image.bitmapEdits.add('on', 64 * KIB, true)
    await image.bitmapEdits.add('off', 64 * KIB, false)
    await image.grow(2 * MIB)
    await image.applySnapshot('before')
    await image.close()
    assertClean(file)
    assert.deepEqual(await dirtyRangesOfQemu(t, file, 'on'), [[0, MIB]])
    assert.deepEqual(await dirtyRangesOfQemu(t, file, 'off'), [])
  })

  test('what a killed QEMU leaves is inconsistent for Varve, and can be removed', async (t) => {
    const file = path.join(tempFolder(t), 'image.qcow2')
    peer('qemu-img', 'create', '-f', 'qcow2', file, '8M')
    peer('qemu-img', 'bitmap', '--add', file, 'lost')
    peer('qemu-img', 'bitmap', '--add', '--disable', file, 'lost-too')
    const daemon = await StorageDaemon.start(t, file)
    peer('qemu-io', '-f', 'raw', '-c', 'write 0 64k', daemon.uri)
    await daemon.stop('SIGKILL')
    const image = await open(file, 'read')
    assert.deepEqual(
      image.bitmaps.map(({ name, isConsistent, flags }) => [name, isConsistent, flags]),
      [
        ['lost', false, ['in-use', 'auto']],
        ['lost-too', false, ['in-use']],
      ],
    )
    await image.setAccess('write')
    await image.write(0, 512, Buffer.alloc(512, 1), 0, 0)
    const { bitmapEdits: edits } = image
    const refused = (error: unknown): boolean => isBlockError(error, 'corrupt')
    await assert.rejects(image.readBitmap('lost'), refused)
    await assert.rejects(edits.clear('lost'), refused)
    await assert.rejects(edits.setRecording('lost', false), refused)
    await assert.rejects(edits.merge('lost', new Bitmap(image.size, 64 * KIB)), refused)
    await edits.remove('lost')
    await image.close()
    assertClean(file)
    assert.deepEqual(bitmapsOfQemu(file), [{ name: 'lost-too', granularity: 64 * KIB, flags: ['in-use'] }])
  })

  test('what a killed Varve leaves is inconsistent for QEMU, but for what does not record', async (t) => {
    const folder = tempFolder(t)
    const file = path.join(folder, 'image.qcow2')
    peer('qemu-img', 'create', '-f', 'qcow2', file, '8M')
    peer('qemu-img', 'bitmap', '--add', file, 'lost')
    peer('qemu-img', 'bitmap', '--add', '--disable', file, 'kept')
    const server = spawn(process.execPath, ['src/cli/main.ts', 'nbd', '-f', 'qcow2', '--socket', `${folder}/s`, file], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    t.after(() => server.kill('SIGKILL'))
    const [line] = (await once(server.stdout, 'data')) as [Buffer]
    peer('qemu-io', '-f', 'raw', '-c', 'write -P 5 0 64k', line.toString().trim())
    const ended = once(server, 'exit')
    server.kill('SIGKILL')
    await ended
    const image = await open(file, 'read')
    assert.deepEqual(
      image.bitmaps.map(({ name, isConsistent }) => [name, isConsistent]),
      [
        ['lost', false],
        ['kept', true],
      ],
    )
    await image.close()
    assert.deepEqual(
      bitmapsOfQemu(file).map(({ name, flags }) => [name, flags]),
      [
        ['lost', ['in-use', 'auto']],
        ['kept', []],
      ],
    )
    peer('qemu-img', 'bitmap', '--remove', file, 'lost')
    peer('qemu-io', '-f', 'qcow2', '-c', 'read -P 5 0 64k', file)
    assertClean(file)
  })

  test('after a program that does not know bitmaps they are inconsistent, said aloud, and can be removed', async (t) => {
    const file = path.join(tempFolder(t), 'image.qcow2')
    peer('qemu-img', 'create', '-f', 'qcow2', file, '8M')
    for (const name of ['one', 'two']) peer('qemu-img', 'bitmap', '--add', file, name)
    peer('qemu-io', '-f', 'qcow2', '-c', 'write -P 7 0 1M', file)
    // Such a program clears the autoclear bits and writes; here the guest's data alone.
    const descriptor = fs.openSync(file, 'r+')
    fs.writeSync(descriptor, Buffer.alloc(8), 0, 8, 88)
    fs.closeSync(descriptor)
    const said: string[] = []
    const image = await openQcow2(realHost, file, { name: 'image', report: (message) => said.push(message) })
    const listed = (): unknown[] => image.bitmaps.map(({ name, isConsistent }) => [name, isConsistent])
    assert.deepEqual(listed(), [
      ['one', false],
      ['two', false],
    ])
    await image.setAccess('write')
    assert.equal(said.length, 1)
    assert.match(said[0] ?? '', /does not know bitmaps: remove its bitmaps one, two$/)
    await image.write(MIB, MIB, Buffer.alloc(MIB, 8), 0, 0)
    assert.deepEqual(listed(), [
      ['one', false],
      ['two', false],
    ])
    await image.bitmapEdits.remove('one')
    await image.close()
    assertClean(file)
    assert.deepEqual(
      bitmapsOfQemu(file).map(({ name, flags }) => [name, flags]),
      [['two', ['in-use', 'auto']]],
    )
    peer('qemu-io', '-f', 'qcow2', '-c', 'read -P 7 0 1M', '-c', 'read -P 8 1M 1M', file)
  })
})
