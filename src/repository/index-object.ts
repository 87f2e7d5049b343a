// Index objects: copies of the directories of some packs, in one object with one digest.
//
//   magic, version, packs | pack name, blobs, zero | records | pack name, blobs, zero | records | ... | SHA-256

import { equalBytes, getUint32, setUint32, utf8 } from '../base/bytes.ts'
import { BlockError } from '../block/error.ts'
import type { PackDirectory } from './pack.ts'
import {
  FORMAT_VERSION,
  ID_BYTES,
  INDEX_HEADER_BYTES,
  INDEX_MAGIC,
  INDEX_PACK_BYTES,
  PACK_NAME_BYTES,
  RECORD_BYTES,
} from './spec.ts'
import type { Vault } from './vault.ts'

export function encodeIndex(vault: Vault, directories: readonly PackDirectory[]): Uint8Array {
  const header = new Uint8Array(INDEX_HEADER_BYTES)
  header.set(utf8.encode(INDEX_MAGIC))
  setUint32(header, 8, FORMAT_VERSION)
  setUint32(header, 12, directories.length)
  const parts: Uint8Array[] = [header]
  for (const { pack, count, records } of directories) {
    const head = new Uint8Array(INDEX_PACK_BYTES)
    head.set(Buffer.from(pack, 'hex'))
    setUint32(head, PACK_NAME_BYTES, count)
    parts.push(head, records)
  }
  const body = Buffer.concat(parts)
  return Buffer.concat([body, vault.proofOf(body)])
}

/** The directories in an index. Kind 'corrupt', or 'invalid-format' for another version; `where` names it. */
export function decodeIndex(vault: Vault, bytes: Uint8Array, where: string): PackDirectory[] {
  const damaged = new BlockError('corrupt', `${where} is damaged`, { path: where })
  const end = bytes.length - ID_BYTES
  if (end < INDEX_HEADER_BYTES || !equalBytes(vault.proofOf(bytes.subarray(0, end)), bytes.subarray(end))) throw damaged
  const version = getUint32(bytes, 8)
  if (utf8.decode(bytes.subarray(0, 8)) !== INDEX_MAGIC || version !== FORMAT_VERSION) {
    const message = `${where} has format version ${version}; this Varve reads version ${FORMAT_VERSION}`
    throw new BlockError('invalid-format', message, { path: where })
  }
  const directories: PackDirectory[] = []
  let at = INDEX_HEADER_BYTES
  for (let left = getUint32(bytes, 12); left > 0; left--) {
    if (at + INDEX_PACK_BYTES > end) throw damaged
    const pack = Buffer.from(bytes.subarray(at, at + PACK_NAME_BYTES)).toString('hex')
    const count = getUint32(bytes, at + PACK_NAME_BYTES)
    at += INDEX_PACK_BYTES
    if (at + count * RECORD_BYTES > end) throw damaged
    directories.push({ pack, count, records: bytes.subarray(at, at + count * RECORD_BYTES) })
    at += count * RECORD_BYTES
  }
  if (at !== end) throw damaged
  return directories
}
