// Packs: blobs back to back and a directory of them. This file makes and reads the bytes of a pack and of its directory;
// pack-writer.ts fills packs, blob-index.ts finds blobs in them.
//
//   header 16 | blob | blob | ... | record 48 | record 48 | ... | footer 64

import crypto from 'node:crypto'
import { equalBytes, getUint16, getUint32, getUint64, setUint32, setUint64, utf8 } from '../base/bytes.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import type { ObjectStore } from './store.ts'
import {
  BLOB_CHUNK,
  BLOB_NODE,
  CHUNK_BYTES,
  CODEC_LOCKED,
  CODEC_RAW,
  CODEC_ZSTD,
  FORMAT_VERSION,
  ID_BYTES,
  LOCK_BYTES,
  PACK_FOOTER_BYTES,
  PACK_HEADER_BYTES,
  PACK_MAGIC,
  PACK_NAME_BYTES,
  PACK_TAIL_MAGIC,
  PACKS,
  RECORD_BYTES,
} from './spec.ts'
import type { Vault } from './vault.ts'

const DIGEST_AT = 32

/** The directory of one pack: its records as they are on disk. Blob offsets follow from the stored lengths. */
export interface PackDirectory {
  /** 32 hexadecimal digits. */
  readonly pack: string
  readonly count: number
  readonly records: Uint8Array
}

/** What a record says of a blob, but for its id. */
export interface BlobRecord {
  readonly stored: number
  readonly plain: number
  readonly crc: number
  readonly type: number
  readonly codec: number
}

export function packKey(pack: string): string {
  return PACKS + pack
}

/** A new name, of 32 digits; it begins with those of `owner`. */
export function newPackName(owner = ''): string {
  return owner + crypto.randomBytes(PACK_NAME_BYTES - owner.length / 2).toString('hex')
}

export function packHeader(): Uint8Array {
  const header = new Uint8Array(PACK_HEADER_BYTES)
  header.set(utf8.encode(PACK_MAGIC))
  setUint32(header, 8, FORMAT_VERSION)
  return header
}

/** `blobBytes` is the length of all blobs together. */
export function packFooter(vault: Vault, directory: PackDirectory, blobBytes: number): Uint8Array {
  const footer = new Uint8Array(PACK_FOOTER_BYTES)
  setUint64(footer, 0, PACK_HEADER_BYTES + blobBytes)
  setUint32(footer, 8, directory.count)
  setUint32(footer, 12, FORMAT_VERSION)
  footer.set(utf8.encode(PACK_TAIL_MAGIC), 16)
  footer.set(tailDigest(vault, packHeader(), directory.records, footer), DIGEST_AT)
  return footer
}

export function writeRecord(into: Uint8Array, at: number, id: Uint8Array, record: BlobRecord): void {
  into.set(id, at)
  setUint32(into, at + 32, record.stored)
  setUint32(into, at + 36, record.plain)
  setUint32(into, at + 40, record.crc)
  into[at + 44] = record.type
  into[at + 45] = record.codec
}

/** Visits the records of a directory with the offset of each blob in the pack. Kind 'corrupt' when one cannot be right. */
export function visitRecords(
  { pack, count, records }: PackDirectory,
  visit: (idAt: number, offset: number, record: BlobRecord) => void,
): void {
  let offset = PACK_HEADER_BYTES
  for (let i = 0; i < count; i++) {
    const at = i * RECORD_BYTES
    const record: BlobRecord = {
      stored: getUint32(records, at + 32),
      plain: getUint32(records, at + 36),
      crc: getUint32(records, at + 40),
      type: records[at + 44] as number,
      codec: records[at + 45] as number,
    }
    if (!isPossible(record) || getUint16(records, at + 46) !== 0) {
      throw new BlockError('corrupt', `record ${i} of the directory of ${packKey(pack)} cannot be right`, {
        path: packKey(pack),
      })
    }
    visit(at, offset, record)
    offset += record.stored
  }
}

function isPossible({ stored, plain, type, codec }: BlobRecord): boolean {
  // Without its lock.
  const form = stored - ((codec & CODEC_LOCKED) === 0 ? 0 : LOCK_BYTES)
  const lengths = form > 0 && form <= plain && plain <= CHUNK_BYTES
  const isRaw = (codec & ~CODEC_LOCKED) === CODEC_RAW
  const isZstd = (codec & ~CODEC_LOCKED) === CODEC_ZSTD
  return (
    lengths && ((isRaw && form === plain) || (isZstd && form < plain)) && (type === BLOB_CHUNK || type === BLOB_NODE)
  )
}

/** Reads and checks header, directory and footer of a pack. Kind 'corrupt', or 'invalid-format' for another version. */
export async function readDirectory(store: ObjectStore, vault: Vault, pack: string): Promise<PackDirectory> {
  const key = packKey(pack)
  const damaged = (what: string): BlockError =>
    new BlockError('corrupt', `${store.name}: ${what} of ${key} is damaged`, { path: key })
  const size = (await store.status(key))?.size
  if (size === undefined) throw new BlockError('not-found', `${store.name}: there is no ${key}`, { path: key })
  if (size < PACK_HEADER_BYTES + PACK_FOOTER_BYTES) throw damaged('the length')
  const header = await store.getRange(key, 0, PACK_HEADER_BYTES)
  const footer = await store.getRange(key, size - PACK_FOOTER_BYTES, PACK_FOOTER_BYTES)
  const start = getUint64(footer, 0)
  const count = getUint32(footer, 8)
  if (start < PACK_HEADER_BYTES || start + count * RECORD_BYTES + PACK_FOOTER_BYTES !== size)
    throw damaged('the footer')
  const records = await store.getRange(key, start, count * RECORD_BYTES)
  if (!equalBytes(tailDigest(vault, header, records, footer), footer.subarray(DIGEST_AT)))
    throw damaged('the directory')
  const version = getUint32(footer, 12)
  if (version !== FORMAT_VERSION || !equalBytes(header, packHeader())) {
    const message = `${store.name}: ${key} has format version ${version}; this Varve reads version ${FORMAT_VERSION}`
    throw new BlockError('invalid-format', message, { path: key })
  }
  const directory = { pack, count, records }
  let end = PACK_HEADER_BYTES
  visitRecords(directory, (_idAt, offset, record) => (end = offset + record.stored))
  if (end !== start) throw damaged('the directory')
  return directory
}

/** The bytes of a pack between two offsets, in `into` perhaps. A pack that is gone or too short, though it is known, is kind 'corrupt'. */
export async function readBlobs(
  store: ObjectStore,
  pack: string,
  start: number,
  end: number,
  into?: Uint8Array,
): Promise<Uint8Array> {
  const key = packKey(pack)
  try {
    return await store.getRange(key, start, end - start, into)
  } catch (error) {
    if (!isBlockError(error, 'not-found') && !isBlockError(error, 'out-of-range')) throw error
    throw new BlockError(
      'corrupt',
      `${store.name}: ${key} is gone or cut short: ${error.message}`,
      { path: key },
      error,
    )
  }
}

function tailDigest(vault: Vault, header: Uint8Array, records: Uint8Array, footer: Uint8Array): Uint8Array {
  return vault.proofOf(Buffer.concat([header, records, footer.subarray(0, DIGEST_AT)]))
}

export function recordId(records: Uint8Array, at: number): Uint8Array {
  return records.subarray(at, at + ID_BYTES)
}
