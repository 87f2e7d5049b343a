// External data files between QEMU and Varve, both ways, raw and not, with and without subclusters; and what is refused of them.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { suite, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import { listExtents } from '../../src/block/extents.ts'
import { MAY_UNMAP, type Layer, ZERO } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import { guard } from '../../src/block/guard.ts'
import { openChain } from '../../src/chain/open.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { realHost } from '../../src/host/real.ts'
import { againstModel } from '../contract/device.ts'
import { contentByQemu, qemuIo, writeRawDisk } from '../support/images.ts'
import { missing, peer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'

const KIB = 1024
const MIB = 1024 * KIB
const SIZE = 3 * MIB + 5 * 512

const KINDS: readonly (readonly [name: string, options: string, isRaw: boolean])[] = [
  ['plain', '', false],
  ['plain, subclusters', ',extended_l2=on', false],
  ['raw', ',data_file_raw=on', true],
  ['raw, clusters of 4 KiB', ',data_file_raw=on,cluster_size=4k', true],
  ['raw, subclusters', ',data_file_raw=on,extended_l2=on', true],
]

async function open(file: string): Promise<Qcow2Image> {
  return openQcow2(realHost, file, { name: path.basename(file) })
}

async function readAll(image: Layer): Promise<Buffer> {
  const bytes = Buffer.alloc(image.size)
  await image.read(0, bytes.length, bytes, 0)
  return bytes
}

async function refusal(file: string, kind: string, message: RegExp): Promise<void> {
  await assert.rejects(open(file), (error) => isBlockError(error) && error.kind === kind && message.test(error.message))
}

suite('external data files between QEMU and Varve', { skip: missing('qemu-img', 'qemu-io') }, () => {
  for (const [name, options, isRaw] of KINDS) {
    test(`both write one image in turns, and each reads what the other wrote: ${name}`, async (t) => {
      const folder = tempFolder(t)
      const [source, target, data] = ['source', 'image.qcow2', 'data'].map((file) => path.join(folder, file)) as [
        string,
        string,
        string,
      ]
      const first = writeRawDisk(source, SIZE, new Random(1))
      peer('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', '-o', `data_file=${data}${options}`, source, target)
      let image = await open(target)
      assert.equal(image.dataFile, data)
      assert.ok((await readAll(image)).equals(first))
      for (let turn = 0; turn < 3; turn++) {
        await image.setAccess('write')
        await againstModel(guard(image), new Random(turn), 80)
        await image.zero(MIB, 200 * KIB, turn === 1 ? 0 : MAY_UNMAP)
        const { corruptions, leaks, problems } = await image.check()
        assert.deepEqual([corruptions, leaks], [0, 0], problems.join('\n'))
        const disk = await readAll(image)
        await image.close()
        peer('qemu-img', 'check', '-f', 'qcow2', target)
        assert.ok(contentByQemu(target, 'qcow2', folder).equals(disk))
        // QEMU makes the data file a whole number of clusters.
        if (isRaw) assert.ok(fs.readFileSync(data).subarray(0, SIZE).equals(disk))
        qemuIo(target, 'qcow2', 'write -P 0x5a 100k 70k', 'write -z 1100k 3k', 'write -zu 2M 128k', 'discard 1M 64k')
        const after = contentByQemu(target, 'qcow2', folder)
        image = await open(target)
        assert.ok((await readAll(image)).equals(after))
      }
      await image.close()
    })
  }

  test('what Varve makes with a data file, QEMU opens, checks and writes; the raw bit stays', async (t) => {
    const folder = tempFolder(t)
    for (const [name, more] of Object.entries({ plain: {}, raw: { dataFileRaw: true }, fine: { extendedL2: true } })) {
      const target = path.join(folder, `${name}.qcow2`)
      const dataFile = path.join(folder, `${name}.data`)
      await createQcow2(realHost, target, { size: SIZE, dataFile, ...more })
      peer('qemu-img', 'check', '-f', 'qcow2', target)
      qemuIo(target, 'qcow2', 'write -P 7 64k 100k')
      const image = await open(target)
      await image.setAccess('write')
      await image.write(130 * KIB, 4096, Buffer.alloc(4096, 9), 0, 0)
      await image.close()
      const expected = Buffer.alloc(SIZE)
        .fill(7, 64 * KIB, 164 * KIB)
        .fill(9, 130 * KIB, 134 * KIB)
      assert.ok(contentByQemu(target, 'qcow2', folder).equals(expected))
      const info = JSON.parse(peer('qemu-img', 'info', '--output=json', target)) as {
        'format-specific': { data: Record<string, unknown> }
      }
      const { data } = info['format-specific']
      assert.deepEqual([data['data-file'], data['data-file-raw']], [dataFile, name === 'raw'])
    }
  })

  test('a grown image grows its data file, and what an over-long one held after the disk reads as zeros', async (t) => {
    const folder = tempFolder(t)
    for (const dataFileRaw of [false, true]) {
      const target = path.join(folder, `${dataFileRaw}.qcow2`)
      const data = path.join(folder, `${dataFileRaw}.data`)
      await createQcow2(realHost, target, { size: MIB, dataFile: data, dataFileRaw })
      fs.appendFileSync(data, Buffer.alloc(MIB, 0xee))
      const image = await open(target)
      await image.setAccess('write')
      await image.write(MIB - 512, 512, Buffer.alloc(512, 1), 0, 0)
      await image.grow(40 * MIB)
      await image.write(39 * MIB, 512, Buffer.alloc(512, 2), 0, 0)
      await image.close()
      const expected = Buffer.alloc(40 * MIB)
      expected.fill(1, MIB - 512, MIB)
      expected.fill(2, 39 * MIB, 39 * MIB + 512)
      assert.equal(fs.statSync(data).size, 40 * MIB)
      assert.ok(contentByQemu(target, 'qcow2', folder).equals(expected))
      if (dataFileRaw) assert.ok(fs.readFileSync(data).equals(expected))
      peer('qemu-img', 'check', '-f', 'qcow2', target)
    }
  })

  test('holes of a data file that is mapped whole are known to be zeros', async (t) => {
    const folder = tempFolder(t)
    const target = path.join(folder, 'image.qcow2')
    const data = path.join(folder, 'data')
    peer('qemu-img', 'create', '-f', 'qcow2', '-o', `data_file=${data},data_file_raw=on`, target, '8M')
    qemuIo(target, 'qcow2', 'write -P 3 1M 64k')
    const image = await open(target)
    // QEMU itself allocates the first block of a file, and the last that it preallocates.
    const extents = await listExtents(image, 64 * KIB, 7 * MIB)
    assert.deepEqual(
      extents.map(({ length, extent }) => [length, extent & ZERO]),
      [
        [MIB - 64 * KIB, ZERO],
        [64 * KIB, 0],
        [6 * MIB, ZERO],
      ],
    )
    await image.close()
  })

  test('the check counts what QEMU’s counts, also a first cluster whose place is 0', async (t) => {
    const folder = tempFolder(t)
    const target = path.join(folder, 'image.qcow2')
    peer('qemu-img', 'create', '-f', 'qcow2', '-o', `data_file=${path.join(folder, 'data')}`, target, '1M')
    for (const commands of [['write 0 256k'], ['write -z 0 64k', 'write -z 128k 64k']]) {
      qemuIo(target, 'qcow2', ...commands)
      const theirs = JSON.parse(peer('qemu-img', 'check', '-f', 'qcow2', '--output=json', target)) as object
      const image = await open(target)
      const ours = await image.check()
      await image.close()
      const { 'allocated-clusters': allocated, 'fragmented-clusters': fragmented = 0 } = theirs as Record<
        string,
        number
      >
      assert.deepEqual([ours.allocatedClusters, ours.fragmentedClusters], [allocated, fragmented])
    }
  })

  test('an overlay over an image with a data file shows it, and leaves it alone', async (t) => {
    const folder = tempFolder(t)
    const base = path.join(folder, 'base.qcow2')
    const data = path.join(folder, 'data')
    peer('qemu-img', 'create', '-f', 'qcow2', '-o', `data_file=${data}`, base, '2M')
    qemuIo(base, 'qcow2', 'write -P 3 0 2M')
    const target = path.join(folder, 'top.qcow2')
    await createQcow2(realHost, target, { size: 2 * MIB, backing: { name: 'base.qcow2', format: 'qcow2' } })
    const before = fs.readFileSync(data)
    const layers = await openChain({ host: realHost, path: target, format: 'qcow2' })
    const top = layers.at(-1) as Layer
    await top.setAccess('write')
    await top.write(4096, 4096, Buffer.alloc(4096, 8), 0, 0)
    const expected = Buffer.alloc(2 * MIB, 3).fill(8, 4096, 8192)
    assert.ok((await readAll(top)).equals(expected))
    for (const layer of layers) await layer.close()
    assert.ok(contentByQemu(target, 'qcow2', folder).equals(expected))
    assert.ok(fs.readFileSync(data).equals(before))
  })

  test('a data file is looked for beside the image, and opened only in the allowed folders', async (t) => {
    const folder = tempFolder(t)
    const target = path.join(folder, 'image.qcow2')
    await createQcow2(realHost, target, { size: MIB, dataFile: 'data' })
    fs.renameSync(path.join(folder, 'data'), path.join(folder, 'other'))
    await refusal(target, 'not-found', /bring it back, or name it with: qemu-img amend/)
    fs.symlinkSync(path.join(folder, 'other'), path.join(folder, 'data'))
    await (await open(target)).close()

    const elsewhere = path.join(tempFolder(t), 'data')
    fs.writeFileSync(elsewhere, Buffer.alloc(MIB))
    fs.rmSync(path.join(folder, 'data'))
    fs.symlinkSync(elsewhere, path.join(folder, 'data'))
    const chain = { host: realHost, path: target, format: 'qcow2' as const }
    await assert.rejects(openChain(chain), (error) => isBlockError(error, 'permission'))
    const layers = await openChain({ ...chain, allowedFolders: [path.dirname(elsewhere)] })
    assert.equal((layers[0] as Qcow2Image).dataFile, elsewhere)
    await layers[0]?.close()
  })
})
