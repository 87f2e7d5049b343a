import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { setUint32, setUint64, utf8 } from '../../base/bytes.ts'
import { isBlockError } from '../../block/error.ts'
import { SimulatedHost } from '../../host/simulated.ts'
import { createQcow2 } from './create.ts'
import { encodeHeader, parseHeader, readHeader } from './header.ts'
import { EXT_FEATURE_TABLE, HEADER, INCOMPAT_EXTL2 } from './spec.ts'

const CLUSTER = 4096

async function newImage(): Promise<Buffer> {
  const host = new SimulatedHost()
  const backing = { name: 'base.qcow2', format: 'qcow2' }
  await createQcow2(host, '/disk', { size: 5_000_000, clusterSize: CLUSTER, backing })
  const file = await host.open('/disk')
  const bytes = Buffer.alloc(file.size())
  await file.read(0, bytes.length, bytes, 0)
  return bytes
}

/** The kind with which the header is refused after `damage`. */
async function refusal(damage: (bytes: Buffer) => void, fileSize?: number): Promise<string> {
  const bytes = await newImage()
  damage(bytes)
  try {
    parseHeader(bytes.subarray(0, CLUSTER), fileSize ?? bytes.length, '/disk')
    return 'accepted'
  } catch (error) {
    assert.ok(isBlockError(error), String(error))
    assert.equal(error.place.path, '/disk')
    return error.kind
  }
}

suite('a qcow2 header', () => {
  test('says what the image was made with', async () => {
    const bytes = await newImage()
    const header = parseHeader(bytes.subarray(0, CLUSTER), bytes.length, '/disk')
    assert.equal(header.size, 5_000_000)
    assert.equal(header.clusterSize, CLUSTER)
    assert.deepEqual(header.backing, { name: 'base.qcow2', format: 'qcow2' })
    assert.equal(header.compatible[7], 1)
  })

  test('is written back byte for byte, with extensions that nobody knows', async () => {
    const bytes = await newImage()
    const header = parseHeader(bytes.subarray(0, CLUSTER), bytes.length, '/disk')
    const more = { ...header, extensions: [{ type: 0x1234_5678, data: utf8.encode('whatever it is') }] }
    more.backingNameOffset = 1000
    const encoded = encodeHeader(more)
    bytes.set(encoded, 0)
    bytes.set(utf8.encode('base.qcow2'), 1000)
    const again = parseHeader(bytes.subarray(0, CLUSTER), bytes.length, '/disk')
    assert.deepEqual(encodeHeader(again), encoded)
    assert.equal(utf8.decode(again.extensions[0]?.data ?? new Uint8Array(0)), 'whatever it is')
  })

  test('of a new image carries the names of the features, which an image with smaller clusters has no room for', async () => {
    const host = new SimulatedHost()
    for (const clusterSize of [4096, 8192]) {
      await createQcow2(host, `/${clusterSize}`, { size: 1, clusterSize })
      const { extensions } = await readHeader(await host.open(`/${clusterSize}`))
      const table = extensions.find(({ type }) => type === EXT_FEATURE_TABLE)?.data
      assert.equal(table?.length, clusterSize === 4096 ? undefined : 8 * 48)
      if (table !== undefined) assert.equal(utf8.decode(table.subarray(2, 11)), 'dirty bit')
    }
  })

  test('refuses an unknown feature by the name that the image has for it, and else by its number', async () => {
    const bytes = await newImage()
    const header = parseHeader(bytes.subarray(0, CLUSTER), bytes.length, '/disk')
    const entry = Buffer.alloc(48)
    entry[1] = 37
    entry.write('time travel', 2)
    const named = { ...header, extensions: [{ type: EXT_FEATURE_TABLE, data: entry }], backingNameOffset: 1000 }
    bytes.set(encodeHeader(named), 0)
    bytes.write('base.qcow2', 1000)
    setUint64(bytes, HEADER.incompatible_features, 2 ** 37 + 2 ** 40)
    assert.throws(
      () => parseHeader(bytes.subarray(0, CLUSTER), bytes.length, '/disk'),
      (error) => isBlockError(error, 'unsupported') && error.message.endsWith('"time travel" (bit 37), bit 40'),
    )
  })

  const invalid: readonly (readonly [what: string, damage: (bytes: Buffer) => void])[] = [
    ['an L1 table in the header', (bytes) => setUint64(bytes, HEADER.l1_table_offset, 0)],
    ['an L1 table in the refcount table', (bytes) => setUint64(bytes, HEADER.l1_table_offset, CLUSTER)],
    ['an L1 table at no cluster’s start', (bytes) => setUint64(bytes, HEADER.l1_table_offset, 3 * CLUSTER + 8)],
    ['an L1 table after the end of the file', (bytes) => setUint64(bytes, HEADER.l1_table_offset, 900 * CLUSTER)],
    ['an L1 table above 2^53', (bytes) => bytes.fill(0xff, HEADER.l1_table_offset, HEADER.l1_table_offset + 8)],
    ['too few L1 entries', (bytes) => setUint32(bytes, HEADER.l1_size, 1)],
    ['far too many L1 entries', (bytes) => setUint32(bytes, HEADER.l1_size, 0xffff_ffff)],
    ['a size above 2^53', (bytes) => bytes.fill(0xff, HEADER.size, HEADER.size + 8)],
    ['no refcount table', (bytes) => setUint32(bytes, HEADER.refcount_table_clusters, 0)],
    ['a refcount table in the header', (bytes) => setUint64(bytes, HEADER.refcount_table_offset, 0)],
    ['refcounts of 128 bits', (bytes) => setUint32(bytes, HEADER.refcount_order, 7)],
    ['a header longer than its cluster', (bytes) => setUint32(bytes, HEADER.header_length, 2 * CLUSTER)],
    ['a header shorter than its fields', (bytes) => setUint32(bytes, HEADER.header_length, 96)],
    ['an extension that leaves the header', (bytes) => setUint32(bytes, 116, 0xffff_fff0)],
    ['a backing name of 1024 bytes', (bytes) => setUint32(bytes, HEADER.backing_file_size, 1024)],
    ['a backing name outside its cluster', (bytes) => setUint64(bytes, HEADER.backing_file_offset, CLUSTER - 4)],
    [
      'extended L2 entries in clusters of 4 KiB',
      (bytes) => setUint64(bytes, HEADER.incompatible_features, INCOMPAT_EXTL2),
    ],
    [
      'a compression type without its feature bit',
      (bytes) => bytes.fill(1, HEADER.compression_type, HEADER.compression_type + 1),
    ],
  ]
  for (const [what, damage] of invalid) {
    test(`with ${what} is refused`, async () => assert.equal(await refusal(damage), 'invalid-format'))
  }

  test('of a file that was cut off is refused', async () => {
    assert.equal(await refusal(() => undefined, CLUSTER), 'invalid-format')
  })

  const unsupported: readonly (readonly [what: string, damage: (bytes: Buffer) => void])[] = [
    ['version 4', (bytes) => setUint32(bytes, HEADER.version, 4)],
    ['encryption', (bytes) => setUint32(bytes, HEADER.crypt_method, 2)],
    ['an unknown incompatible feature', (bytes) => setUint64(bytes, HEADER.incompatible_features, 2 ** 40)],
  ]
  for (const [what, damage] of unsupported) {
    test(`with ${what} is refused as unsupported`, async () => assert.equal(await refusal(damage), 'unsupported'))
  }
})
