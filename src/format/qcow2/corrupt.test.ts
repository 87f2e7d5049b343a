// What happens when a change finds the image corrupt: the change fails, the image is marked, and then only read.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { getUint32, setUint32 } from '../../base/bytes.ts'
import { Random } from '../../base/random.ts'
import { MAY_UNMAP } from '../../block/device.ts'
import { isBlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import { SimulatedHost } from '../../host/simulated.ts'
import { createQcow2 } from './create.ts'
import { isMarkedCorrupt, readHeader } from './header.ts'
import { openQcow2, type Qcow2Image } from './image.ts'
import { OFLAG_COPIED_HIGH } from './spec.ts'

const CLUSTER = 4096
/** One L2 table maps so much. */
const REACH = (CLUSTER / 8) * CLUSTER
const SIZE = 4 * REACH
const PIECE = new Uint8Array(512).fill(1)

interface Made {
  readonly host: SimulatedHost
  readonly file: HostFile
  /** Place of the L2 entry of cluster 2, and the offsets that are read and written in it and beside it. */
  readonly entry: number
}

/** An image with data in its first clusters, and the file that a test damages. */
async function made(options: { isLate?: boolean; dataFile?: string; extendedL2?: boolean } = {}): Promise<Made> {
  const { isLate = false, extendedL2 = false } = options
  const host = new SimulatedHost(isLate ? { scheduler: new Random(3) } : {})
  const clusterSize = extendedL2 ? 16_384 : CLUSTER
  const dataFile = options.dataFile === undefined ? {} : { dataFile: options.dataFile }
  await createQcow2(host, '/disk', { size: SIZE, clusterSize, extendedL2, ...dataFile })
  const image = await openQcow2(host, '/disk', { name: 'disk' })
  await image.setAccess('write')
  await image.write(0, 8 * clusterSize, new Uint8Array(8 * clusterSize).fill(7), 0, 0)
  await image.close()
  const file = await host.open('/disk', { write: true })
  const header = await readHeader(file)
  const l1 = new Uint8Array(8)
  await file.read(header.l1Offset, 8, l1, 0)
  const table = (getUint32(l1, 0) & 0xff_ffff) * 2 ** 32 + getUint32(l1, 4)
  return { host, file, entry: table + 2 * header.l2EntrySize }
}

async function put(file: HostFile, place: number, high: number, low: number): Promise<void> {
  const bytes = new Uint8Array(8)
  setUint32(bytes, 0, high)
  setUint32(bytes, 4, low)
  await file.write(place, 8, bytes, 0)
}

async function openForWriting(host: SimulatedHost): Promise<Qcow2Image> {
  const image = await openQcow2(host, '/disk', { name: 'disk' })
  await image.setAccess('write')
  return image
}

async function isCorrupt(work: () => Promise<void> | undefined): Promise<void> {
  await assert.rejects(
    async () => {
      await work()
    },
    (error) => isBlockError(error, 'corrupt') && error.message.endsWith('varve image check -r all /disk'),
  )
}

/** What an L2 entry can lead to that no data may be written to, or that cannot be. */
const WRONG: readonly (readonly [what: string, low: (file: HostFile) => Promise<number>])[] = [
  ['into the header', async () => 512],
  ['to the L1 table', async (file) => (await readHeader(file)).l1Offset],
  ['to the refcount table', async (file) => (await readHeader(file)).refcountTableOffset],
  ['to no cluster’s start', async (file) => (await readHeader(file)).l1Offset + CLUSTER + 512],
  ['past the end', async () => 2 ** 30],
]

suite('a qcow2 image that a write finds corrupt', () => {
  for (const [what, low] of WRONG) {
    for (const isLate of [false, true]) {
      test(`is marked durably, and then only read: an entry leads ${what}${isLate ? ', late' : ''}`, async () => {
        const { host, file, entry } = await made({ isLate })
        await put(file, entry, OFLAG_COPIED_HIGH, await low(file))
        await file.sync()
        const image = await openForWriting(host)
        await image.write(0, PIECE.length, PIECE, 0, 0)
        await isCorrupt(() => image.write(2 * CLUSTER, PIECE.length, PIECE, 0, 0))
        const marked = await host.clone().open('/disk')
        assert.ok(isMarkedCorrupt(await readHeader(marked)))

        await isCorrupt(() => image.write(0, PIECE.length, PIECE, 0, 0))
        await isCorrupt(() => image.zero(0, CLUSTER, MAY_UNMAP))
        await isCorrupt(() => image.trim(0, CLUSTER, 0))
        await isCorrupt(() => image.grow(2 * SIZE))
        const seen = new Uint8Array(PIECE.length)
        await image.read(0, seen.length, seen, 0)
        assert.deepEqual(seen, PIECE)
        await image.flush()
        await image.close()

        host.crash('none')
        const again = await openQcow2(host, '/disk', { name: 'disk' })
        await isCorrupt(() => again.setAccess('write'))
        await again.read(0, seen.length, seen, 0)
        assert.deepEqual(seen, PIECE, 'what was flushed')
        await again.close()
      })
    }
  }

  test('is found by a zero and by a trim as well', async () => {
    for (const change of [
      (image: Qcow2Image) => image.zero(2 * CLUSTER, CLUSTER, 0),
      (image: Qcow2Image) => image.trim(2 * CLUSTER, CLUSTER, 0),
    ]) {
      const { host, file, entry } = await made()
      await put(file, entry, OFLAG_COPIED_HIGH, 2 ** 30)
      const image = await openForWriting(host)
      await isCorrupt(() => change(image))
      assert.ok(isMarkedCorrupt(image.header))
      await image.close()
    }
  })

  test('is found where an L1 entry leads to the refcount table', async () => {
    const { host, file } = await made()
    const { l1Offset, refcountTableOffset } = await readHeader(file)
    await put(file, l1Offset + 8, OFLAG_COPIED_HIGH, refcountTableOffset)
    const image = await openForWriting(host)
    await isCorrupt(() => image.write(REACH, PIECE.length, PIECE, 0, 0))
    assert.ok(isMarkedCorrupt(image.header))
    await image.close()
  })

  test('keeps its L1 table, even when the refcounts call that free', async () => {
    const { host, file } = await made()
    const { l1Offset, refcountTableOffset } = await readHeader(file)
    const block = new Uint8Array(8)
    await file.read(refcountTableOffset, 8, block, 0)
    await file.write(getUint32(block, 4) + (l1Offset / CLUSTER) * 2, 2, new Uint8Array(2), 0)
    const image = await openForWriting(host)
    for (let i = 8; i < 50; i++) {
      await image.write(i * CLUSTER, PIECE.length, PIECE, 0, 0)
      await image.flush()
    }
    await image.close()
    const again = await openQcow2(host, '/disk', { name: 'disk' })
    const seen = new Uint8Array(PIECE.length)
    for (let i = 8; i < 50; i++) {
      await again.read(i * CLUSTER, seen.length, seen, 0)
      assert.deepEqual(seen, PIECE)
    }
    await again.close()
  })

  test('is one with a subcluster that is both data and zeros, or data without a place', async () => {
    for (const damage of ['both', 'no place'] as const) {
      const { host, file, entry } = await made({ extendedL2: true })
      if (damage === 'both') await put(file, entry + 8, 1, 0xffff_ffff)
      else await put(file, entry, 0, 0)
      const image = await openForWriting(host)
      await isCorrupt(() => image.write(2 * 16_384, PIECE.length, PIECE, 0, 0))
      assert.ok(isMarkedCorrupt(image.header))
      await image.close()
    }
  })

  test('is one whose data file’s cluster is at another’s place, or compressed', async () => {
    for (const high of [OFLAG_COPIED_HIGH, 0x4000_0000]) {
      const { host, file, entry } = await made({ dataFile: 'data' })
      await put(file, entry, high, 9 * CLUSTER)
      const image = await openForWriting(host)
      await isCorrupt(() => image.write(2 * CLUSTER, PIECE.length, PIECE, 0, 0))
      assert.ok(isMarkedCorrupt(image.header))
      await image.close()
    }
  })

  test('is not the one over a backing file that is corrupt', async () => {
    const { host, file, entry } = await made()
    await put(file, entry, OFLAG_COPIED_HIGH, 2 ** 30)
    await createQcow2(host, '/top', { size: SIZE, backing: { name: 'disk', format: 'qcow2' } })
    const top = await openQcow2(host, '/top', { name: 'top' })
    top.backing = await openQcow2(host, '/disk', { name: 'disk' })
    await top.setAccess('write')
    await assert.rejects(
      async () => top.write(2 * CLUSTER, PIECE.length, PIECE, 0, 0),
      (error) => isBlockError(error, 'corrupt'),
    )
    assert.ok(!isMarkedCorrupt(top.header))
    await top.write(SIZE / 2, PIECE.length, PIECE, 0, 0)
    await top.backing.close()
    await top.close()
  })
})
