import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random } from '../base/random.ts'
import { isBlockError } from '../block/error.ts'
import { BlobIndex, NO_ENTRY } from './blob-index.ts'
import { decodeIndex, encodeIndex } from './index-object.ts'
import { newPackName, type PackDirectory, writeRecord } from './pack.ts'
import { PLAIN_VAULT } from './vault.ts'
import { BLOB_CHUNK, CODEC_RAW, CODEC_ZSTD, ID_BYTES, RECORD_BYTES } from './spec.ts'

/** A directory of blobs with random ids; every other one is compressed. */
function directoryOf(random: Random, count: number): PackDirectory {
  const records = new Uint8Array(count * RECORD_BYTES)
  for (let i = 0; i < count; i++) {
    const plain = 4096
    const stored = i % 2 === 0 ? plain : 100 + (i % 1000)
    const codec = i % 2 === 0 ? CODEC_RAW : CODEC_ZSTD
    const id = Buffer.alloc(ID_BYTES)
    for (let at = 0; at < ID_BYTES; at += 4) id.writeUInt32BE(random.next(), at)
    writeRecord(records, i * RECORD_BYTES, id, { stored, plain, crc: random.next(), type: BLOB_CHUNK, codec })
  }
  return { pack: newPackName(), count, records }
}

suite('blob index', () => {
  test('every blob of many packs is found where it is, and no other', () => {
    const random = new Random(1)
    const index = new BlobIndex()
    const directories = Array.from({ length: 40 }, () => directoryOf(random, 1700))
    for (const directory of directories) index.addPack(directory)
    assert.equal(index.count, 68_000)
    assert.equal(index.packs, 40)
    for (const { pack, records } of directories) {
      let offset = 16
      for (let at = 0; at < records.length; at += RECORD_BYTES) {
        const entry = index.find(records, at)
        assert.ok(entry !== NO_ENTRY)
        assert.equal(index.pack(entry), pack)
        assert.equal(index.offset(entry), offset)
        assert.equal(index.plain(entry), 4096)
        assert.equal(index.codec(entry) === CODEC_RAW, index.stored(entry) === 4096)
        assert.equal(index.crc(entry), Buffer.from(records).readUInt32BE(at + 40))
        offset += index.stored(entry)
      }
    }
    const { records } = directoryOf(random, 1000)
    for (let at = 0; at < records.length; at += RECORD_BYTES) assert.equal(index.find(records, at), NO_ENTRY)
  })

  test('a blob in two packs stays where it was found first, and a pack given twice changes nothing', () => {
    const index = new BlobIndex()
    const first = directoryOf(new Random(2), 10)
    index.addPack(first)
    index.addPack({ ...first, pack: newPackName() })
    index.addPack(first)
    assert.equal(index.count, 20)
    assert.equal(index.packs, 2)
    assert.equal(index.pack(index.find(first.records, 0)), first.pack)
  })

  test('a blob costs less than 70 bytes of memory, the slack of growing included', () => {
    const random = new Random(3)
    const index = new BlobIndex()
    for (let i = 0; i < 5; i++) index.addPack(directoryOf(random, 50_000))
    const each = index.bytes / index.count
    assert.ok(each > 52 && each < 70, `${each} bytes`)
  })

  test('a directory with a record that cannot be right is refused and adds nothing', () => {
    const good = directoryOf(new Random(4), 3)
    const changes: [number, number][] = [
      [32, 1], // longer than a chunk
      [RECORD_BYTES + 38, 0], // plain length shorter than stored
      [44, 7], // no such type
      [45, 9], // no such codec
      [45, CODEC_ZSTD], // compressed to the same length
      [47, 1], // reserved
    ]
    for (const [at, value] of changes) {
      const records = good.records.with(at, value)
      const index = new BlobIndex()
      assert.throws(
        () => index.addPack({ ...good, records }),
        (error) => isBlockError(error, 'corrupt') && error.message.includes(good.pack),
        `byte ${at}`,
      )
      assert.equal(index.count, 0)
      assert.ok(!index.hasPack(good.pack))
    }
  })
})

suite('index objects', () => {
  test('an index gives back the directories that it was made of', () => {
    const random = new Random(5)
    const directories = [directoryOf(random, 3), directoryOf(random, 0), directoryOf(random, 100)]
    const decoded = decodeIndex(PLAIN_VAULT, encodeIndex(PLAIN_VAULT, directories), 'index/x')
    assert.deepEqual(
      decoded.map(({ pack, count, records }) => ({ pack, count, records: Buffer.from(records) })),
      directories.map(({ pack, count, records }) => ({ pack, count, records: Buffer.from(records) })),
    )
    assert.deepEqual(decodeIndex(PLAIN_VAULT, encodeIndex(PLAIN_VAULT, []), 'index/x'), [])
  })

  test('an index that is cut or changed is refused by name', () => {
    const bytes = encodeIndex(PLAIN_VAULT, [directoryOf(new Random(6), 3)])
    for (const bad of [
      new Uint8Array(0),
      bytes.subarray(0, 40),
      bytes.subarray(1),
      bytes.with(70, 1),
      bytes.with(9, 1),
    ]) {
      assert.throws(
        () => decodeIndex(PLAIN_VAULT, bad, 'index/x'),
        (error) => isBlockError(error, 'corrupt') && error.message.includes('index/x'),
      )
    }
  })
})
