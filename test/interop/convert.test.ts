// Conversions against QEMU's: what Varve converts, QEMU finds identical to the source and clean, and it is as sparse as what
// qemu-img makes of the same source with the same options.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { suite, type TestContext, test } from 'node:test'
import { Random } from '../../src/base/random.ts'
import type { Format } from '../../src/chain/open.ts'
import { openQcow2 } from '../../src/format/qcow2/image.ts'
import { realHost } from '../../src/host/real.ts'
import { parseCreateOptions } from '../../src/image/create-options.ts'
import { type ConvertOptions, type Converted, convertImage } from '../../src/image/convert.ts'
import { breakCompressedCluster, contentByQemu, qemuIo, writeRawDisk } from '../support/images.ts'
import { missing, peer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'

const KIB = 1024
const MIB = 1024 * KIB
const SKIP = { skip: missing('qemu-img', 'qemu-io') }

/** A folder with a raw disk, the same as qcow2, and names for what is made of them. */
class Bench {
  readonly folder: string
  readonly bytes: Buffer

  constructor(t: TestContext, seed: number, size = 7 * MIB + 512) {
    this.folder = tempFolder(t)
    this.bytes = writeRawDisk(this.path('source.raw'), size, new Random(seed))
    peer('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', this.path('source.raw'), this.path('source.qcow2'))
  }

  path(name: string): string {
    return path.join(this.folder, name)
  }

  convert(source: string, target: string, more: Partial<ConvertOptions> = {}): Promise<Converted> {
    return convertImage({
      host: realHost,
      sources: [{ host: realHost, path: this.path(source), format: formatOf(source) }],
      target: this.path(target),
      format: formatOf(target),
      ...more,
    })
  }

  /** QEMU sees the source's content in it, and no fault. */
  assertSame(target: string): void {
    peer('qemu-img', 'compare', '-f', 'raw', '-F', formatOf(target), this.path('source.raw'), this.path(target))
    if (formatOf(target) === 'qcow2') peer('qemu-img', 'check', '-f', 'qcow2', this.path(target))
  }

  /** How many clusters a qcow2 image holds, by QEMU. */
  clustersOf(target: string): number {
    const check = peer('qemu-img', 'check', '--output=json', '-f', 'qcow2', this.path(target))
    return (JSON.parse(check) as { 'allocated-clusters': number })['allocated-clusters']
  }

  /** The ranges of a raw image that hold data, by QEMU. */
  dataOf(target: string): string[] {
    const map = peer('qemu-img', 'map', '--output=json', '-f', formatOf(target), this.path(target))
    const entries = JSON.parse(map) as { start: number; length: number; data: boolean }[]
    return entries.filter(({ data }) => data).map(({ start, length }) => `${start}+${length}`)
  }
}

const formatOf = (name: string): Format => (name.endsWith('.raw') ? 'raw' : 'qcow2')

suite('Conversions, beside qemu-img', SKIP, () => {
  for (const [source, target] of [
    ['source.raw', 'made.qcow2'],
    ['source.qcow2', 'made.raw'],
    ['source.raw', 'made.raw'],
    ['source.qcow2', 'made.qcow2'],
  ] as const) {
    test(`${source} to ${target}: the same content, and holes where qemu-img leaves them`, async (t) => {
      const bench = new Bench(t, 11, 7 * MIB)
      await bench.convert(source, target)
      bench.assertSame(target)
      const peers = target.replace('made', 'qemu')
      peer('qemu-img', 'convert', '-O', formatOf(target), bench.path(source), bench.path(peers))
      if (formatOf(target) === 'raw') assert.deepEqual(bench.dataOf(target), bench.dataOf(peers))
      else assert.equal(bench.clustersOf(target), bench.clustersOf(peers))
    })
  }

  test('a size that is no whole number of sectors is rounded up with zeros', async (t) => {
    const bench = new Bench(t, 12, 3 * MIB + 100)
    await bench.convert('source.raw', 'made.qcow2')
    const content = contentByQemu(bench.path('made.qcow2'), 'qcow2', bench.folder)
    assert.equal(content.length, 3 * MIB + 512)
    assert.ok(content.subarray(0, bench.bytes.length).equals(bench.bytes))
  })

  for (const sparse of [0, 512, 64 * KIB]) {
    test(`zeros of ${sparse} bytes are told as with qemu-img -S`, async (t) => {
      const bench = new Bench(t, 13, 4 * MIB)
      await bench.convert('source.raw', 'made.raw', { sparse })
      bench.assertSame('made.raw')
      peer('qemu-img', 'convert', '-S', String(sparse), '-O', 'raw', bench.path('source.raw'), bench.path('qemu.raw'))
      assert.deepEqual(bench.dataOf('made.raw'), bench.dataOf('qemu.raw'))
    })
  }

  for (const clusterSize of [512, 4 * KIB, 2 * MIB]) {
    test(`clusters of ${clusterSize} bytes`, async (t) => {
      const bench = new Bench(t, 14)
      await bench.convert('source.raw', 'made.qcow2', { settings: { clusterSize } })
      bench.assertSame('made.qcow2')
      await bench.convert('made.qcow2', 'back.raw')
      bench.assertSame('back.raw')
    })
  }

  for (const option of [
    'compat=0.10',
    'refcount_bits=1',
    'extended_l2=on',
    'preallocation=metadata',
    'preallocation=full',
    'data_file=made.data',
    'data_file=made.data,data_file_raw=on',
    'lazy_refcounts=on,cluster_size=2M',
  ]) {
    test(`-o ${option}`, async (t) => {
      const bench = new Bench(t, 26, 3 * MIB)
      // QEMU looks for a relative name in its working folder.
      const words = option.replace('made.data', bench.path('made.data'))
      await bench.convert('source.raw', 'made.qcow2', { settings: parseCreateOptions('qcow2', [words]) })
      bench.assertSame('made.qcow2')
      await bench.convert('made.qcow2', 'back.raw')
      bench.assertSame('back.raw')
    })
  }

  test('a conversion that fails takes its data file along', async (t) => {
    const bench = new Bench(t, 27, MIB)
    const settings = { dataFile: 'made.data' }
    await assert.rejects(bench.convert('source.raw', 'made.qcow2', { settings, signal: AbortSignal.abort() }))
    await assert.rejects(bench.convert('source.raw', 'made.qcow2', { settings, compress: true }), {
      kind: 'unsupported',
    })
    assert.deepEqual(fs.readdirSync(bench.folder).sort(), ['source.qcow2', 'source.raw'])
  })

  test('a chain becomes one image; with -B only what its top holds is copied', async (t) => {
    const bench = new Bench(t, 15, 4 * MIB)
    const overlay = bench.path('overlay.qcow2')
    peer('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'source.qcow2', '-F', 'qcow2', overlay)
    qemuIo(overlay, 'qcow2', 'write -P 7 100k 300k', 'write -z 1m 200k', 'write -P 9 3m 4k')
    await bench.convert('overlay.qcow2', 'whole.raw')
    peer('qemu-img', 'compare', '-f', 'qcow2', '-F', 'raw', overlay, bench.path('whole.raw'))
    const settings = { backingName: 'source.qcow2', backingFormat: 'qcow2' } as const
    await bench.convert('overlay.qcow2', 'copy.qcow2', { settings })
    peer('qemu-img', 'compare', '-f', 'qcow2', '-F', 'qcow2', overlay, bench.path('copy.qcow2'))
    const size = (name: string): number => fs.statSync(bench.path(name)).size
    assert.ok(size('copy.qcow2') <= size('overlay.qcow2') + 64 * KIB, 'nothing of the backing file is copied')
  })

  test('several sources follow each other', async (t) => {
    const bench = new Bench(t, 16, 2 * MIB)
    const sources = ['source.raw', 'source.qcow2', 'source.raw'].map((name) => ({
      host: realHost,
      path: bench.path(name),
      format: formatOf(name),
    }))
    await bench.convert('source.raw', 'made.qcow2', { sources })
    const content = contentByQemu(bench.path('made.qcow2'), 'qcow2', bench.folder)
    assert.ok(content.equals(Buffer.concat([bench.bytes, bench.bytes, bench.bytes])))
  })

  for (const compression of ['zlib', 'zstd'] as const) {
    test(`compressed with ${compression}: as many clusters compressed as by qemu-img, in no more space`, async (t) => {
      const bench = new Bench(t, 21, 9 * MIB + 512)
      await bench.convert('source.raw', 'made.qcow2', { compress: true, settings: { compression } })
      bench.assertSame('made.qcow2')
      const option = `compression_type=${compression}`
      peer('qemu-img', 'convert', '-c', '-O', 'qcow2', '-o', option, bench.path('source.raw'), bench.path('qemu.qcow2'))
      assert.equal(bench.clustersOf('made.qcow2'), bench.clustersOf('qemu.qcow2'))
      const size = (name: string): number => fs.statSync(bench.path(name)).size
      assert.ok(size('made.qcow2') <= size('qemu.qcow2') * 1.02 + 64 * KIB, `${size('made.qcow2')} bytes`)
      await bench.convert('made.qcow2', 'back.raw')
      bench.assertSame('back.raw')
    })
  }

  test('a disk of one cluster, of zeros or of no bytes is compressed too', async (t) => {
    const bench = new Bench(t, 25, 40 * KIB)
    fs.writeFileSync(bench.path('zeros.raw'), Buffer.alloc(MIB))
    fs.writeFileSync(bench.path('empty.raw'), '')
    for (const name of ['source', 'zeros', 'empty']) {
      await bench.convert(`${name}.raw`, `${name}-packed.qcow2`, { compress: true })
      peer('qemu-img', 'compare', '-f', 'raw', bench.path(`${name}.raw`), bench.path(`${name}-packed.qcow2`))
    }
  })

  test('compressed over an existing image, what was there is replaced and freed', async (t) => {
    const bench = new Bench(t, 22, 3 * MIB)
    peer('qemu-img', 'create', '-q', '-f', 'qcow2', bench.path('there.qcow2'), '3M')
    qemuIo(bench.path('there.qcow2'), 'qcow2', 'write -P 5 0 3M')
    await bench.convert('source.raw', 'there.qcow2', { existing: 'any', compress: true })
    bench.assertSame('there.qcow2')
  })

  test('an internal snapshot is read by its name or id', async (t) => {
    const bench = new Bench(t, 23, 2 * MIB)
    peer('qemu-img', 'snapshot', '-c', 'before', bench.path('source.qcow2'))
    qemuIo(bench.path('source.qcow2'), 'qcow2', 'write -P 1 0 2M')
    for (const [snapshot, target] of [
      ['before', 'name.raw'],
      ['1', 'id.qcow2'],
    ] as const) {
      await bench.convert('source.qcow2', target, { snapshot })
      bench.assertSame(target)
    }
    await assert.rejects(bench.convert('source.qcow2', 'none.raw', { snapshot: 'never' }), { kind: 'not-found' })
  })

  test('bitmaps go along, as with qemu-img --bitmaps', async (t) => {
    const bench = new Bench(t, 24, 4 * MIB)
    const source = bench.path('source.qcow2')
    peer('qemu-img', 'bitmap', '--add', '-g', '32k', source, 'one')
    qemuIo(source, 'qcow2', 'write -P 1 1M 100k', 'write -P 2 3M 4k')
    peer('qemu-img', 'bitmap', '--add', '--disable', source, 'two')
    peer('qemu-img', 'convert', '--bitmaps', '-O', 'qcow2', source, bench.path('qemu.qcow2'))
    await bench.convert('source.qcow2', 'made.qcow2', { bitmaps: 'all' })
    peer('qemu-img', 'compare', source, bench.path('made.qcow2'))
    const [made, qemu] = await Promise.all(['made.qcow2', 'qemu.qcow2'].map((name) => bitmapsOf(bench.path(name))))
    assert.deepEqual(made, qemu)
    peer('qemu-img', 'check', bench.path('made.qcow2'))
  })

  test('an existing target is filled in place, whatever it held', async (t) => {
    const bench = new Bench(t, 17, 3 * MIB)
    for (const target of ['there.raw', 'there.qcow2']) {
      peer('qemu-img', 'create', '-q', '-f', formatOf(target), bench.path(target), '3M')
      qemuIo(bench.path(target), formatOf(target), 'write -P 5 0 3M')
      await bench.convert('source.raw', target, { existing: 'any' })
      bench.assertSame(target)
    }
  })

  test('an existing target that is too small is refused and not touched', async (t) => {
    const bench = new Bench(t, 18, 3 * MIB)
    peer('qemu-img', 'create', '-q', '-f', 'qcow2', bench.path('small.qcow2'), '1M')
    const before = fs.readFileSync(bench.path('small.qcow2'))
    const filled = bench.convert('source.raw', 'small.qcow2', { existing: 'any' })
    await assert.rejects(filled, { kind: 'invalid-argument' })
    assert.ok(fs.readFileSync(bench.path('small.qcow2')).equals(before))
  })

  test('a target that is there is refused, and with force replaced when the new one is whole', async (t) => {
    const bench = new Bench(t, 19, 2 * MIB)
    fs.writeFileSync(bench.path('made.qcow2'), 'precious')
    await assert.rejects(bench.convert('source.raw', 'made.qcow2'), { kind: 'exists' })
    await assert.rejects(bench.convert('missing.raw', 'made.qcow2', { force: true }), { kind: 'not-found' })
    const signal = AbortSignal.abort()
    await assert.rejects(bench.convert('source.raw', 'made.qcow2', { force: true, signal }), { kind: 'cancelled' })
    assert.equal(fs.readFileSync(bench.path('made.qcow2'), 'utf8'), 'precious')
    assert.deepEqual(fs.readdirSync(bench.folder).sort(), ['made.qcow2', 'source.qcow2', 'source.raw'])
    await bench.convert('source.raw', 'made.qcow2', { force: true })
    bench.assertSame('made.qcow2')
  })

  test('salvage copies all but what cannot be read, and lists it', async (t) => {
    const bench = new Bench(t, 20, MIB)
    peer('qemu-img', 'convert', '-c', '-O', 'qcow2', bench.path('source.raw'), bench.path('packed.qcow2'))
    const map = peer('qemu-img', 'map', '--output=json', bench.path('source.qcow2'))
    const data = (JSON.parse(map) as { start: number; data: boolean }[]).find((entry) => entry.data)
    assert.ok(data !== undefined)
    const start = data.start - (data.start % (64 * KIB))
    breakCompressedCluster(bench.path('packed.qcow2'), start)
    await assert.rejects(bench.convert('packed.qcow2', 'made.raw'), { kind: 'corrupt' })
    const { lost, lostBytes } = await bench.convert('packed.qcow2', 'made.raw', { salvage: true })
    assert.deepEqual(
      lost.map((range) => [range.start, range.length]),
      [[start, 64 * KIB]],
    )
    assert.equal(lostBytes, 64 * KIB)
    const expected = Buffer.from(bench.bytes).fill(0, start, start + 64 * KIB)
    assert.ok(fs.readFileSync(bench.path('made.raw')).equals(expected))
  })
})

/** What QEMU says of an image's bitmaps, and the granules that are set. */
async function bitmapsOf(image: string): Promise<unknown> {
  const info = JSON.parse(peer('qemu-img', 'info', '--output=json', image)) as {
    'format-specific': { data: { bitmaps: { name: string }[] } }
  }
  const { bitmaps } = info['format-specific'].data
  const opened = await openQcow2(realHost, image, { name: 'image' })
  const bits: string[] = []
  for (const { name } of bitmaps) bits.push(Buffer.from((await opened.readBitmap(name)).toBytes()).toString('hex'))
  await opened.close()
  return { bitmaps, bits }
}
