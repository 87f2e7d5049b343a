// Hashing, compressing and their inverse, over batches of pieces. A batch is one buffer and a list of pieces in it, so
// that it crosses to another thread as one message. Batches lie in memory that threads share and that is used again and again:
// buffers that are handed over and back are new ones to the garbage collector each time, and the guests would wait for it.
//
//   hash      pieces (at, length)                       -> one id of 32 bytes each
//   compress  pieces (at, length) and their ids         -> their stored forms back to back from the batch's start, in place of
//                                                          what was there, and a record of 3 numbers each
//   expand    pieces (at, stored, plain, codec, crc)    -> plain bytes back to back in other memory, and which of them are damaged
//
// What makes an id, and the lock on a stored form, are the vault's.
//
// This file has the interface and the work itself, for the thread that calls; worker-squeezer.ts does it elsewhere.

import zlib from 'node:zlib'
import { assert } from '../base/assert.ts'
import { copyBytes } from '../base/bytes.ts'
import { looksRandom } from './looks-random.ts'
import { CHUNK_BYTES, CODEC_LOCKED, CODEC_RAW, CODEC_ZSTD, ID_BYTES, LOCK_BYTES } from './spec.ts'
import { PLAIN_VAULT, type Vault } from './vault.ts'

/** Numbers per piece in the lists. */
export const PLAIN_FIELDS = 2 // at, length
export const STORED_FIELDS = 3 // stored length, codec, crc
export const EXPAND_FIELDS = 5 // at, stored length, plain length, codec, crc

/** What became of a piece that was expanded. */
export const PIECE_GOOD = 0
export const PIECE_CHECKSUM = 1 // the stored bytes do not have their CRC
export const PIECE_CODEC = 2 // they do not decompress to the plain length
export const PIECE_ID = 3 // the plain bytes are not those of the id
export const PIECE_LOCK = 4 // they were not locked with this repository's key for this id

/** The same for people. */
export const PIECE_REASONS: Readonly<Record<number, string>> = {
  [PIECE_CHECKSUM]: 'its stored bytes have another checksum',
  [PIECE_CODEC]: 'it does not decompress',
  [PIECE_ID]: 'its content has another digest',
  [PIECE_LOCK]: 'it was not locked with the key of this repository',
}

/** The caller leaves `bytes` alone until the answer. */
export interface Squeezer {
  /** The ids, one after the other. */
  hash(bytes: Uint8Array, pieces: Uint32Array<ArrayBuffer>): Promise<Uint8Array<ArrayBuffer>>
  /** The records; `bytes`, of `batchMemory`, has the forms from then on. Pieces ascend. */
  compress(
    bytes: Uint8Array<SharedArrayBuffer>,
    pieces: Uint32Array<ArrayBuffer>,
    ids: Uint8Array<ArrayBuffer>,
  ): Promise<Uint32Array<ArrayBuffer>>
  /**
   * PIECE_GOOD or what is wrong, one for each piece. `into` has the plain bytes then; those of a damaged piece mean nothing. What is urgent, as
   * somebody waits for just that and it is little, stands behind nothing else where it can.
   */
  expand(
    bytes: Uint8Array<SharedArrayBuffer>,
    pieces: Uint32Array<ArrayBuffer>,
    ids: Uint8Array<ArrayBuffer>,
    into: Uint8Array<SharedArrayBuffer>,
    isUrgent?: boolean,
  ): Promise<Uint8Array<ArrayBuffer>>
  close(): Promise<void>
}

/** Shared memory for so many pieces of so many bytes in all, with room for their stored forms: a lock makes one longer. */
export function batchMemory(bytes: number, pieces: number): Uint8Array<SharedArrayBuffer> {
  return new Uint8Array(new SharedArrayBuffer(bytes + pieces * LOCK_BYTES))
}

// Output in one piece: the default of Node grows its output in steps, each a call into the library.
const OUTPUT_BYTES = CHUNK_BYTES + 4096
const COMPRESS_OPTIONS = {
  chunkSize: OUTPUT_BYTES,
  params: { [zlib.constants.ZSTD_c_compressionLevel]: 1 },
}
const EXPAND_OPTIONS = { chunkSize: OUTPUT_BYTES, maxOutputLength: CHUNK_BYTES }

/**
 * Gives the memory of an output back at once, when it has it to itself; it is empty then. To the collector a few hundred such outputs are a
 * reason to begin, and that took a tenth of a backup's processor time.
 */
function discard({ buffer }: Uint8Array): void {
  if (buffer instanceof ArrayBuffer && buffer.byteLength === OUTPUT_BYTES) buffer.transfer(0)
}

export function hashPieces(vault: Vault, bytes: Uint8Array, pieces: Uint32Array): Uint8Array<ArrayBuffer> {
  const count = pieces.length / PLAIN_FIELDS
  const ids = new Uint8Array(count * ID_BYTES)
  for (let i = 0; i < count; i++) {
    const at = pieces[i * PLAIN_FIELDS] as number
    const length = pieces[i * PLAIN_FIELDS + 1] as number
    ids.set(vault.idOf(bytes.subarray(at, at + length)), i * ID_BYTES)
  }
  return ids
}

export function compressPieces(
  vault: Vault,
  bytes: Uint8Array,
  pieces: Uint32Array,
  ids: Uint8Array,
): Uint32Array<ArrayBuffer> {
  const count = pieces.length / PLAIN_FIELDS
  const records = new Uint32Array(count * STORED_FIELDS)
  const forms: Uint8Array[] = []
  for (let i = 0; i < count; i++) {
    const at = pieces[i * PLAIN_FIELDS] as number
    const plain = bytes.subarray(at, at + (pieces[i * PLAIN_FIELDS + 1] as number))
    const packed = looksRandom(plain) ? undefined : zlib.zstdCompressSync(plain, COMPRESS_OPTIONS)
    const isShorter = packed !== undefined && packed.length < plain.length
    const form = vault.lock(isShorter ? packed : plain, ids.subarray(i * ID_BYTES, (i + 1) * ID_BYTES))
    const codec = (isShorter ? CODEC_ZSTD : CODEC_RAW) + (vault.isEncrypted ? CODEC_LOCKED : 0)
    records.set([form.length, codec, zlib.crc32(form)], i * STORED_FIELDS)
    forms.push(form)
  }
  let end = 0
  for (const [i, form] of forms.entries()) {
    // A form that is its piece itself lies in the batch: without a lock, no form before it reaches into it.
    const isInPlace = form.buffer === bytes.buffer
    assert(
      !isInPlace || (pieces[i * PLAIN_FIELDS] as number) >= end,
      'pieces ascend, and no form is longer than its piece',
    )
    if (!isInPlace || form.byteOffset !== bytes.byteOffset + end) bytes.set(form, end)
    end += form.length
    if (!isInPlace) discard(form)
  }
  return records
}

/** Shared memory for stored forms of so many bytes, or for what they expand to. */
export function sharedMemory(bytes: number): Uint8Array<SharedArrayBuffer> {
  return new Uint8Array(new SharedArrayBuffer(bytes))
}

export function expandPieces(
  vault: Vault,
  bytes: Uint8Array,
  pieces: Uint32Array,
  ids: Uint8Array,
  plain: Uint8Array,
): Uint8Array<ArrayBuffer> {
  const count = pieces.length / EXPAND_FIELDS
  const outcome = new Uint8Array(count)
  let end = 0
  for (let i = 0; i < count; i++) {
    const [at, length, plainLength, codec, crc] = pieces.subarray(i * EXPAND_FIELDS, (i + 1) * EXPAND_FIELDS)
    const form = bytes.subarray(at as number, (at as number) + (length as number))
    const into = plain.subarray(end, end + (plainLength as number))
    end += plainLength as number
    const id = ids.subarray(i * ID_BYTES, (i + 1) * ID_BYTES)
    outcome[i] = zlib.crc32(form) === crc ? expandPiece(vault, form, codec as number, into, id) : PIECE_CHECKSUM
  }
  return outcome
}

function expandPiece(vault: Vault, form: Uint8Array, codec: number, into: Uint8Array, id: Uint8Array): number {
  const isLocked = (codec & CODEC_LOCKED) !== 0
  const unlocked = isLocked === vault.isEncrypted ? vault.unlock(form, id) : undefined
  if (unlocked === undefined) return PIECE_LOCK
  let found = unlocked
  if ((codec & CODEC_ZSTD) !== 0) {
    try {
      found = zlib.zstdDecompressSync(unlocked, EXPAND_OPTIONS)
    } catch {
      return PIECE_CODEC
    }
  }
  if (found.length !== into.length) return PIECE_CODEC
  copyBytes(found, 0, into, 0, found.length)
  if (found !== unlocked) discard(found)
  return Buffer.compare(vault.idOf(into), id) === 0 ? PIECE_GOOD : PIECE_ID
}

/** Does the work in the calling thread: for tests and simulations, where the order of events must not vary. */
export class InlineSqueezer implements Squeezer {
  readonly #vault: Vault

  constructor(vault: Vault = PLAIN_VAULT) {
    this.#vault = vault
  }

  async hash(bytes: Uint8Array, pieces: Uint32Array): Promise<Uint8Array<ArrayBuffer>> {
    return hashPieces(this.#vault, bytes, pieces)
  }

  async compress(bytes: Uint8Array, pieces: Uint32Array, ids: Uint8Array): Promise<Uint32Array<ArrayBuffer>> {
    return compressPieces(this.#vault, bytes, pieces, ids)
  }

  async expand(
    bytes: Uint8Array,
    pieces: Uint32Array,
    ids: Uint8Array,
    into: Uint8Array,
  ): Promise<Uint8Array<ArrayBuffer>> {
    return expandPieces(this.#vault, bytes, pieces, ids, into)
  }

  async close(): Promise<void> {}
}
