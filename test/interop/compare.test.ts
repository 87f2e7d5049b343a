// `compare` against `qemu-img compare`: the same answer, in the same words, for the same images. And `diff` against a plain look
// at every block.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { suite, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import type { Format } from '../../src/chain/open.ts'
import { realHost } from '../../src/host/real.ts'
import { compareImages, type Comparison, describeComparison } from '../../src/image/compare.ts'
import { diffImages, diffOverlay } from '../../src/image/diff.ts'
import { openImage } from '../../src/image/open-image.ts'
import { withPair } from '../../src/image/pair.ts'
import { breakCompressedCluster, contentByQemu, qemuIo, writeRawDisk } from '../support/images.ts'
import { missing, peer, runPeer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'

const KIB = 1024
const MIB = 1024 * KIB
const SKIP = { skip: missing('qemu-img', 'qemu-io') }

const formatOf = (name: string): Format => (name.endsWith('.raw') ? 'raw' : 'qcow2')

function compare(first: string, second: string, strict = false): Promise<Comparison> {
  const [a, b] = [first, second].map((file) => ({ host: realHost, path: file, format: formatOf(file) }))
  assert.ok(a !== undefined && b !== undefined)
  return withPair(a, b, (one, other) => compareImages(one, other, { strict }))
}

async function assertLikeQemu(first: string, second: string): Promise<void> {
  const formats = ['-f', formatOf(first), '-F', formatOf(second)]
  const { status, stdout } = runPeer('qemu-img', ['compare', ...formats, first, second])
  const comparison = await compare(first, second)
  const said = stdout.replace('Warning: Image size mismatch!\n', '').trimEnd()
  assert.equal(describeComparison(comparison), said)
  assert.equal(comparison.outcome === 'identical' ? 0 : 1, status)
}

suite('Comparisons, beside qemu-img', SKIP, () => {
  test('images of any format are identical, or differ at the same offset', async (t) => {
    const folder = tempFolder(t)
    const [raw, copy, other] = ['a.raw', 'a.qcow2', 'b.qcow2'].map((name) => path.join(folder, name)) as [
      string,
      string,
      string,
    ]
    writeRawDisk(raw, 3 * MIB, new Random(31))
    peer('qemu-img', 'convert', '-O', 'qcow2', raw, copy)
    peer('qemu-img', 'convert', '-c', '-O', 'qcow2', raw, other)
    for (const pair of [
      [raw, copy],
      [copy, other],
      [other, raw],
      [raw, raw],
    ] as const)
      await assertLikeQemu(...pair)
    const random = new Random(32)
    for (let round = 0; round < 12; round++) {
      qemuIo(other, 'qcow2', `write -P ${random.between(1, 255)} ${random.below(6000) * 512} 512`)
      await assertLikeQemu(raw, other)
      await assertLikeQemu(other, copy)
    }
  })

  test('what one image has more must be zeros', async (t) => {
    const folder = tempFolder(t)
    const [short, long] = [path.join(folder, 'short.raw'), path.join(folder, 'long.qcow2')]
    writeRawDisk(short, MIB, new Random(33))
    peer('qemu-img', 'convert', '-O', 'qcow2', short, long)
    peer('qemu-img', 'resize', '-q', long, '3M')
    await assertLikeQemu(short, long)
    qemuIo(long, 'qcow2', 'write -P 0 1M 64k')
    await assertLikeQemu(short, long)
    qemuIo(long, 'qcow2', 'write -P 1 2M 512')
    await assertLikeQemu(short, long)
    await assertLikeQemu(long, short)
    assert.equal((await compare(short, long, true)).outcome, 'size')
  })

  test('strictly, what is allocated must be the same too', async (t) => {
    const folder = tempFolder(t)
    const [a, b] = [path.join(folder, 'a.qcow2'), path.join(folder, 'b.qcow2')]
    for (const file of [a, b]) {
      peer('qemu-img', 'create', '-q', '-f', 'qcow2', file, '1M')
      qemuIo(file, 'qcow2', 'write -P 3 64k 64k')
    }
    assert.equal((await compare(a, b, true)).outcome, 'identical')
    qemuIo(b, 'qcow2', 'write -P 0 512k 64k')
    assert.equal((await compare(a, b)).outcome, 'identical')
    const { outcome, ...rest } = await compare(a, b, true)
    assert.deepEqual([outcome, 'offset' in rest ? rest.offset : -1], ['status', 512 * KIB])
    assert.equal(describeComparison(await compare(a, b, true)), 'Strict mode: Offset 524288 block status mismatch!')
  })

  test('what both take from one backing file is not read', async (t) => {
    const folder = tempFolder(t)
    const base = path.join(folder, 'base.qcow2')
    const overlays = ['a.qcow2', 'b.qcow2'].map((name) => path.join(folder, name)) as [string, string]
    fs.writeFileSync(path.join(folder, 'base.raw'), Buffer.alloc(2 * MIB, 'base '))
    peer('qemu-img', 'convert', '-c', '-O', 'qcow2', path.join(folder, 'base.raw'), base)
    for (const overlay of overlays) {
      peer('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', overlay)
      qemuIo(overlay, 'qcow2', 'write -P 5 64k 128k')
    }
    qemuIo(overlays[1], 'qcow2', 'write -P 6 1M 4k')
    await assertLikeQemu(...overlays)
    // Data that cannot be read any more does not matter where it is the same data.
    breakCompressedCluster(base, 0)
    assert.equal((await compare(...overlays)).outcome, 'content')
    qemuIo(overlays[0], 'qcow2', 'write -P 6 1M 64k')
    qemuIo(overlays[1], 'qcow2', 'write -P 6 1M 64k')
    assert.equal((await compare(...overlays)).outcome, 'identical')
  })
})

suite('Differences', SKIP, () => {
  for (const granule of [512, 4 * KIB, 64 * KIB, MIB]) {
    test(`are the blocks of ${granule} bytes in which two images differ`, async (t) => {
      const folder = tempFolder(t)
      const [raw, changed] = [path.join(folder, 'a.raw'), path.join(folder, 'b.qcow2')]
      const random = new Random(granule)
      const before = writeRawDisk(raw, 5 * MIB + 1024, random)
      peer('qemu-img', 'convert', '-O', 'qcow2', raw, changed)
      peer('qemu-img', 'resize', '-q', changed, '6M')
      for (let i = 0; i < 20; i++) {
        const verb = random.chance(0.3) ? 'write -z' : `write -P ${random.between(1, 255)}`
        qemuIo(changed, 'qcow2', `${verb} ${random.below(6 * 2048 - 64) * 512} ${random.between(1, 60) * 512}`)
      }
      const after = contentByQemu(changed, 'qcow2', folder)
      const expected = new Set<number>()
      const padded = Buffer.concat([before, Buffer.alloc(after.length - before.length)])
      for (let at = 0; at < after.length; at += granule)
        if (!padded.subarray(at, at + granule).equals(after.subarray(at, at + granule))) expected.add(at / granule)
      const found = new Set<number>()
      let end = -1
      const visit = (start: number, length: number): void => {
        assert.ok(start > end, 'ranges are in order and do not touch')
        end = start + length
        for (let at = start; at < end; at += granule) found.add(at / granule)
      }
      const two = [raw, changed].map((file) => ({ host: realHost, path: file, format: formatOf(file) }))
      await withPair(two[0] as (typeof two)[0], two[1] as (typeof two)[0], (a, b) =>
        diffImages(a, b, { granule, visit }),
      )
      assert.deepEqual(found, expected)
    })
  }

  test('of an overlay are what it holds, without reading it', async (t) => {
    const folder = tempFolder(t)
    const [base, overlay] = [path.join(folder, 'base.raw'), path.join(folder, 'overlay.qcow2')]
    writeRawDisk(base, 4 * MIB, new Random(35))
    peer('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'base.raw', '-F', 'raw', overlay)
    qemuIo(overlay, 'qcow2', 'write -P 1 70k 4k', 'write -z 1M 128k', 'write -P 2 3M 64k')
    const found: number[][] = []
    const chain = await openImage({ host: realHost, path: overlay, format: 'qcow2' })
    await diffOverlay(chain.active, { granule: 64 * KIB, visit: (...range) => found.push(range) })
    await chain.close()
    assert.deepEqual(found, [
      [64 * KIB, 64 * KIB],
      [MIB, 128 * KIB],
      [3 * MIB, 64 * KIB],
    ])
  })
})
