import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random } from '../base/random.ts'
import { isBlockError } from '../block/error.ts'
import { CHUNK_BYTES, CODEC_LOCKED, CODEC_RAW, CODEC_ZSTD, ID_BYTES, LOCK_BYTES } from './spec.ts'
import {
  batchMemory,
  EXPAND_FIELDS,
  InlineSqueezer,
  PIECE_CHECKSUM,
  PIECE_CODEC,
  PIECE_GOOD,
  PIECE_ID,
  sharedMemory,
  type Squeezer,
} from './squeezer.ts'
import { PLAIN_VAULT, Vault } from './vault.ts'
import { WorkerSqueezer } from './worker-squeezer.ts'

/** Random bytes and text, side by side, and one byte behind a gap. */
function sample(): Uint8Array<SharedArrayBuffer> {
  const bytes = batchMemory(CHUNK_BYTES * 2 + 11, 3)
  new Random(1).fill(bytes.subarray(0, CHUNK_BYTES))
  bytes.set(Buffer.from('sediment '.repeat(7000)), CHUNK_BYTES)
  bytes[CHUNK_BYTES * 2 + 10] = 10
  return bytes
}

const PIECES = [0, CHUNK_BYTES, CHUNK_BYTES, CHUNK_BYTES, CHUNK_BYTES * 2 + 10, 1]

/** Hashes, compresses and expands the sample; `spoil` may change what goes to expand. */
async function roundTrip(
  squeezer: Squeezer,
  spoil: (stored: Uint8Array, pieces: Uint32Array, ids: Uint8Array) => void = () => undefined,
) {
  const bytes = sample()
  const hashed = await squeezer.hash(bytes, Uint32Array.from(PIECES))
  const ids = hashed.slice()
  assert.deepEqual(bytes, sample())
  const records = await squeezer.compress(bytes, Uint32Array.from(PIECES), hashed.slice())
  const pieces = new Uint32Array(3 * EXPAND_FIELDS)
  let at = 0
  for (let i = 0; i < 3; i++) {
    const [length, codec, crc] = records.subarray(i * 3, i * 3 + 3) as unknown as [number, number, number]
    pieces.set([at, length, PIECES[i * 2 + 1] as number, codec, crc], i * EXPAND_FIELDS)
    at += length
  }
  const stored = new Uint8Array(bytes.subarray(0, at))
  const form = stored.slice()
  spoil(stored, pieces, hashed)
  const memory = sharedMemory(stored.length)
  memory.set(stored)
  const into = sharedMemory(bytes.length)
  const outcome = await squeezer.expand(memory, pieces, hashed, into)
  const plain = into.slice()
  return { ids, form, codecs: [records[1], records[4], records[7]], plain, outcome: [...outcome] }
}

suite('squeezer', () => {
  test('pieces come back as they were, stored raw unless zstd makes them shorter', async () => {
    const { ids, codecs, plain, outcome } = await roundTrip(new InlineSqueezer())
    const bytes = sample()
    assert.deepEqual(outcome, [PIECE_GOOD, PIECE_GOOD, PIECE_GOOD])
    assert.deepEqual(codecs, [CODEC_RAW, CODEC_ZSTD, CODEC_RAW])
    assert.ok(Buffer.from(plain.subarray(0, CHUNK_BYTES * 2)).equals(bytes.subarray(0, CHUNK_BYTES * 2)))
    assert.equal(plain[CHUNK_BYTES * 2], 10)
    assert.deepEqual(ids.subarray(0, ID_BYTES), new Uint8Array(PLAIN_VAULT.idOf(bytes.subarray(0, CHUNK_BYTES))))
  })

  test('a locked piece comes back too, though its stored form is longer than it was', async () => {
    const vault = new Vault(new Uint8Array(32).fill(7))
    const { codecs, outcome, form } = await roundTrip(new InlineSqueezer(vault))
    assert.deepEqual(outcome, [PIECE_GOOD, PIECE_GOOD, PIECE_GOOD])
    assert.deepEqual(codecs, [CODEC_RAW + CODEC_LOCKED, CODEC_ZSTD + CODEC_LOCKED, CODEC_RAW + CODEC_LOCKED])
    assert.ok(form.length > CHUNK_BYTES + LOCK_BYTES)
  })

  test('threads give the same as the calling thread', async () => {
    const threads = new WorkerSqueezer(PLAIN_VAULT, 2)
    const expected = await roundTrip(new InlineSqueezer())
    const results = await Promise.all(Array.from({ length: 12 }, () => roundTrip(threads)))
    for (const result of results) assert.deepEqual(result, expected)
    await threads.close()
  })

  test('a thread of a plain repository that is closed serves the next one, and that of an encrypted one does not', async () => {
    const secret = new Uint8Array(32).fill(7)
    const vaults = [PLAIN_VAULT, new Vault(secret), PLAIN_VAULT, new Vault(secret)]
    const started: number[] = []
    for (const vault of vaults) {
      const threads = new WorkerSqueezer(vault, 1)
      const before = WorkerSqueezer.started
      await roundTrip(threads)
      started.push(WorkerSqueezer.started - before)
      await threads.close()
      assert.equal(threads.threads, 0)
    }
    assert.deepEqual(started.slice(1), [1, 0, 1])
  })

  test('while guests ask for anything one thread less works', async () => {
    let areIdle = false
    const threads = new WorkerSqueezer(PLAIN_VAULT, 2, () => areIdle)
    await Promise.all([roundTrip(threads), roundTrip(threads), roundTrip(threads)])
    assert.equal(threads.threads, 1)
    areIdle = true
    await Promise.all([roundTrip(threads), roundTrip(threads), roundTrip(threads)])
    assert.equal(threads.threads, 2)
    await threads.close()
  })

  test('what is urgent has a thread of its own, which the others never wait for', async () => {
    const threads = new WorkerSqueezer(PLAIN_VAULT, 2)
    const urgent: Squeezer = {
      hash: (bytes, pieces) => threads.hash(bytes, pieces),
      compress: (bytes, pieces, ids) => threads.compress(bytes, pieces, ids),
      expand: (bytes, pieces, ids, into) => threads.expand(bytes, pieces, ids, into, true),
      close: () => threads.close(),
    }
    const expected = await roundTrip(new InlineSqueezer())
    const hashing = Array.from({ length: 4 }, () => roundTrip(threads))
    assert.deepEqual(await roundTrip(urgent), expected)
    await Promise.all(hashing)
    assert.equal(threads.threads, 2)
    assert.equal(threads.hasUrgent, true)
    await threads.close()
    assert.equal(threads.hasUrgent, false)
  })

  test('each kind of damage is told from the others', async () => {
    const squeezer = new InlineSqueezer()
    const checksum = await roundTrip(squeezer, (stored) => (stored[100] = (stored[100] as number) ^ 1))
    assert.deepEqual(checksum.outcome, [PIECE_CHECKSUM, PIECE_GOOD, PIECE_GOOD])
    const id = await roundTrip(squeezer, (_stored, _pieces, ids) => (ids[40] = (ids[40] as number) ^ 1))
    assert.deepEqual(id.outcome, [PIECE_GOOD, PIECE_ID, PIECE_GOOD])
    const raw = await roundTrip(squeezer, (_stored, pieces) => (pieces[3] = CODEC_ZSTD))
    assert.deepEqual(raw.outcome, [PIECE_CODEC, PIECE_GOOD, PIECE_GOOD])
    const length = await roundTrip(squeezer, (_stored, pieces) => (pieces[7] = 100))
    assert.deepEqual(length.outcome, [PIECE_GOOD, PIECE_CODEC, PIECE_GOOD])
  })

  test('when its threads end, what was asked fails, and what is asked next is done by new ones', async () => {
    const threads = new WorkerSqueezer(PLAIN_VAULT, 1)
    await roundTrip(threads)
    const asked = Array.from({ length: 20 }, () => roundTrip(threads))
    const outcomes = Promise.allSettled(asked)
    await threads.close()
    const failed = (await outcomes).filter((outcome) => outcome.status === 'rejected')
    assert.ok(failed.length > 0)
    for (const { reason } of failed) assert.ok(isBlockError(reason, 'io') && reason.message.includes('has ended'))
    assert.deepEqual((await roundTrip(threads)).outcome, [PIECE_GOOD, PIECE_GOOD, PIECE_GOOD])
    await threads.close()
  })
})
