// What the bitmaps of an image refuse, what they give up and say, and that a directory which breaks a rule is not believed.
// Between QEMU and Varve: test/interop/bitmaps.test.ts; crashes: test/crash/qcow2-bitmaps.test.ts.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { setUint32 } from '../../base/bytes.ts'
import { Bitmap } from '../../bitmap/bitmap.ts'
import { BlockError, type ErrorKind, isBlockError } from '../../block/error.ts'
import { SimulatedHost } from '../../host/simulated.ts'
import { createQcow2 } from './create.ts'
import { openQcow2, type Qcow2Image } from './image.ts'
import { BITMAP, BITMAP_LENGTH } from './spec.ts'

const PATH = '/disk'
const MIB = 1024 * 1024

interface Made {
  readonly host: SimulatedHost
  readonly said: string[]
  readonly open: () => Promise<Qcow2Image>
}

async function make(size: number, clusterSize = 4096, host = new SimulatedHost()): Promise<Made> {
  await createQcow2(host, PATH, { size, clusterSize })
  const said: string[] = []
  const open = (): Promise<Qcow2Image> =>
    openQcow2(host, PATH, { name: 'disk', report: (message) => void said.push(message) })
  return { host, said, open }
}

const kind =
  (wanted: ErrorKind) =>
  (error: unknown): boolean =>
    isBlockError(error, wanted)

test('a bitmap that cannot be is refused, and the image goes on', async () => {
  const { open } = await make(MIB)
  const image = await open()
  assert.throws(() => image.bitmapEdits, kind('read-only'))
  await image.setAccess('write')
  const { bitmapEdits: edits } = image
  for (const [name, granularity] of [
    ['', 4096],
    ['x'.repeat(1024), 4096],
    ['a\0b', 4096],
    ['b', 256],
    ['b', 5000],
    ['b', 4096 * MIB],
  ] as const)
    await assert.rejects(edits.add(name, granularity, true), kind('invalid-argument'), JSON.stringify(name))
  await edits.add('b', undefined, true)
  await assert.rejects(edits.add('b', undefined, true), kind('exists'))
  await assert.rejects(edits.remove('c'), kind('not-found'))
  await assert.rejects(image.readBitmap('c'), kind('not-found'))
  const foreign = new Bitmap(2 * MIB, 4096)
  await assert.rejects(edits.save([{ name: 'd', bits: foreign, isRecording: false }]), kind('invalid-argument'))
  await edits.add('x'.repeat(1023), 512, true)
  assert.deepEqual(
    image.bitmaps.map(({ name, granularity, count }) => [name.length, granularity, count]),
    [
      [1, 4096, 0],
      [1023, 512, 0],
    ],
  )
  await image.close()
})

test('bitmaps that would not fit memory are refused: added, or through a resize', async () => {
  const { open } = await make(8 * MIB * MIB, 2 * MIB)
  const image = await open()
  await image.setAccess('write')
  await assert.rejects(image.bitmapEdits.add('fine', 512, true), kind('unsupported'))
  await image.bitmapEdits.add('coarse', 64 * 1024, true)
  await assert.rejects(image.grow(800 * MIB * MIB), kind('unsupported'))
  assert.equal(image.size, 8 * MIB * MIB)
  await image.write(0, 512, new Uint8Array(512), 0, 0)
  await image.close()
  const again = await open()
  assert.equal((await again.readBitmap('coarse')).count, 1)
  await again.close()
})

test('a version 2 image, or a header without room, takes no bitmap', async () => {
  const host = new SimulatedHost()
  await createQcow2(host, PATH, { size: MIB, version: 2 })
  const old = await openQcow2(host, PATH, { name: 'disk' })
  await old.setAccess('write')
  await assert.rejects(old.bitmapEdits.add('b', undefined, true), kind('unsupported'))
  await old.close()
  await createQcow2(host, '/full', { size: MIB, clusterSize: 512, backing: { name: 'b'.repeat(330), format: 'raw' } })
  const full = await openQcow2(host, '/full', { name: 'full' })
  await full.setAccess('write')
  await assert.rejects(full.bitmapEdits.add('b', undefined, true), kind('unsupported'))
  assert.equal(full.backingReference?.name.length, 330)
  await full.close()
})

test('a bitmap that finds no space at the end is given up aloud; the disk is whole', async () => {
  const { host, said, open } = await make(64 * MIB, 4096, new SimulatedHost({ capacity: MIB }))
  const image = await open()
  await image.setAccess('write')
  await image.bitmapEdits.add('b', 512, true)
  await image.zero(0, 64 * MIB, 0)
  let isFull = false
  for (let at = 0; !isFull; at += 4096) {
    try {
      await image.write(at, 4096, new Uint8Array(4096).fill(1), 0, 0)
    } catch (error) {
      if (!(error instanceof BlockError) || error.kind !== 'no-space') throw error
      isFull = true
    }
  }
  await image.close()
  assert.match(said.join('\n'), /the bitmap "b" is not saved and inconsistent now$/)
  const again = await openQcow2(host, PATH, { name: 'disk' })
  assert.deepEqual(
    again.bitmaps.map(({ isConsistent }) => isConsistent),
    [false],
  )
  const { corruptions, leaks, problems } = await again.check()
  assert.deepEqual([corruptions, leaks], [0, 0], problems.join('\n'))
  await again.close()
})

/** Breaks the directory, which holds two bitmaps, "one" and "two". */
type Breaking = (directory: Uint8Array) => void

const SECOND = BITMAP_LENGTH + 8

const BREAKINGS: Readonly<Record<string, Breaking>> = {
  'another type': (d) => (d[BITMAP.type] = 2),
  'reserved flags': (d) => (d[BITMAP.flags + 2] = 1),
  'a granularity below 512': (d) => (d[BITMAP.granularity_bits] = 8),
  'a granularity above 2 GiB': (d) => (d[BITMAP.granularity_bits] = 32),
  'no name': (d) => (d[BITMAP.name_size + 1] = 0),
  'a name past the end': (d) => (d[SECOND + BITMAP.name_size] = 1),
  'extra data past the end': (d) => (d[BITMAP.extra_data_size] = 1),
  'padding that is not zero': (d) => (d[BITMAP_LENGTH + 7] = 1),
  'one name twice': (d) => d.copyWithin(SECOND + BITMAP_LENGTH, BITMAP_LENGTH, BITMAP_LENGTH + 3),
  'a name that is not UTF-8': (d) => (d[BITMAP_LENGTH] = 0xff),
  'a table in the header': (d) => d.fill(0, BITMAP.bitmap_table_offset, BITMAP.bitmap_table_offset + 8),
  'a table within a cluster': (d) => (d[BITMAP.bitmap_table_offset + 7] = 8),
  'a table after the file': (d) => (d[BITMAP.bitmap_table_offset + 2] = 1),
  'a table of no entries': (d) => setUint32(d, BITMAP.bitmap_table_size, 0),
  'a table too short': (d) => setUint32(d, BITMAP.bitmap_table_size, 1),
}

test('a directory that breaks a rule is not believed: the disk is read, and nothing is written', async () => {
  for (const [what, breaking] of Object.entries(BREAKINGS)) {
    const { host, open } = await make(20 * MIB)
    const image = await open()
    await image.setAccess('write')
    for (const name of ['one', 'two']) await image.bitmapEdits.add(name, 512, true)
    const { offset, size } = image.header.bitmaps ?? { offset: 0, size: 0 }
    await image.close()
    const file = await host.open(PATH, { write: true })
    const directory = new Uint8Array(size)
    await file.read(offset, size, directory, 0)
    breaking(directory)
    await file.write(offset, size, directory, 0)
    await file.close()
    const again = await open()
    assert.throws(() => again.bitmaps, kind('invalid-format'), what)
    await again.read(0, 4096, new Uint8Array(4096), 0)
    await assert.rejects(again.setAccess('write'), kind('invalid-format'), what)
    assert.equal(again.access, 'read')
    await again.close()
  }
})

test('bits and tables that break a rule make a bitmap unusable, aloud, and the disk can be written', async () => {
  const wrongs: Readonly<Record<string, readonly [at: 'table' | 'bits', byte: number, value: number]>> = {
    'a reserved bit': ['table', 0, 1],
    'ones with a place': ['table', 7, 1],
    'a place after the file': ['table', 3, 1],
    'a bit after the end': ['bits', 4095, 1],
  }
  for (const [what, [where, byte, value]] of Object.entries(wrongs)) {
    const { host, said, open } = await make(3 * MIB + 512)
    const image = await open()
    await image.setAccess('write')
    await image.bitmapEdits.add('b', 512, true)
    await image.write(0, 512, new Uint8Array(512), 0, 0)
    const { offset } = image.header.bitmaps ?? { offset: 0 }
    await image.close()
    const file = await host.open(PATH, { write: true })
    const placeAt = async (at: number): Promise<number> => {
      const bytes = Buffer.alloc(8)
      await file.read(at, 8, bytes, 0)
      return bytes.readUInt32BE(4)
    }
    const table = await placeAt(offset)
    const at = where === 'table' ? table : await placeAt(table)
    await file.write(at + byte, 1, Uint8Array.of(value), 0)
    await file.close()
    const again = await open()
    await assert.rejects(again.readBitmap('b'), kind('corrupt'), what)
    await again.setAccess('write')
    assert.match(said.join('\n'), /the bitmap "b" .*; what is written from now on is not in it$/, what)
    await again.write(0, 512, new Uint8Array(512), 0, 0)
    await again.bitmapEdits.remove('b')
    await again.close()
  }
})

test('clusters that an all-ones entry stands for read as ones, and are written as what they become', async () => {
  const { host, open } = await make(48 * MIB + 512)
  const image = await open()
  await image.setAccess('write')
  await image.bitmapEdits.add('b', 512, true)
  const { offset } = image.header.bitmaps ?? { offset: 0 }
  await image.close()
  const file = await host.open(PATH, { write: true })
  const place = Buffer.alloc(8)
  await file.read(offset, 8, place, 0)
  // The second of the four clusters, and the last, which holds one bit.
  for (const entry of [1, 3]) await file.write(place.readUInt32BE(4) + entry * 8 + 7, 1, Uint8Array.of(1), 0)
  await file.close()
  for (let life = 0; life < 2; life++) {
    const again = await open()
    const bits = await again.readBitmap('b')
    assert.deepEqual([bits.count - life, bits.nextSet(32_768), bits.nextClear(32_768)], [32_769, 32_768, 65_536])
    assert.ok(bits.has(bits.length - 1))
    await again.setAccess('write')
    await again.write(0, 512, new Uint8Array(512), 0, 0)
    await again.close()
    const closed = await open()
    const { corruptions, leaks, problems } = await closed.check()
    assert.deepEqual([corruptions, leaks], [0, 0], problems.join('\n'))
    await closed.close()
  }
})
