import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import zlib from 'node:zlib'
import { Random } from '../base/random.ts'
import { looksRandom } from './looks-random.ts'

const CHUNK = 65_536

function randomBytes(seed: number, length: number): Uint8Array {
  return Buffer.from(new Random(seed).fill(new Uint8Array(length)))
}

suite('looks random', () => {
  test('random bytes do, of a chunk and of a granule, but for one piece in hundreds', () => {
    for (const length of [CHUNK, CHUNK - 4096, 4096]) {
      const pieces = Array.from({ length: 500 }, (_, seed) => looksRandom(randomBytes(seed, length)))
      assert.ok(pieces.filter((isRandom) => !isRandom).length <= 1)
    }
  })

  test('what is compressed already does', () => {
    const words = Array.from(randomBytes(7, 200_000), (byte) => `layer ${byte * byte} `).join('')
    const packed = zlib.zstdCompressSync(words)
    assert.ok(packed.length > CHUNK + 1000)
    assert.equal(looksRandom(packed.subarray(1000, 1000 + CHUNK)), true)
  })

  test('text, zeros, numbers and base64 do not', () => {
    const number = new Uint8Array(Uint32Array.from({ length: CHUNK / 4 }, (_, index) => index * 3).buffer)
    assert.equal(looksRandom(number), false)
    assert.equal(looksRandom(new Uint8Array(CHUNK)), false)
    assert.equal(looksRandom(Buffer.from('sediment '.repeat(CHUNK / 8)).subarray(0, CHUNK)), false)
    assert.equal(
      looksRandom(Buffer.from(Buffer.from(randomBytes(1, CHUNK)).toString('base64')).subarray(0, CHUNK)),
      false,
    )
  })

  test('a piece of random bytes with one granule of zeros, or one that is there twice, does not', () => {
    const zeros = randomBytes(1, CHUNK)
    zeros.fill(0, 5 * 4096, 6 * 4096)
    assert.equal(looksRandom(zeros), false)
    const twice = randomBytes(2, CHUNK)
    twice.copyWithin(9 * 4096, 3 * 4096, 4 * 4096)
    assert.equal(looksRandom(twice), false)
  })

  test('too few bytes to tell do not', () => {
    assert.equal(looksRandom(randomBytes(1, 2047)), false)
    assert.equal(looksRandom(new Uint8Array(0)), false)
  })
})
