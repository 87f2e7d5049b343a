// The constants of the dirty log's format and the coding of its records; docs/internals/dirty-log.md has the pictures.

import { crc32 } from 'node:zlib'
import { getUint32, getUint64, setUint32, setUint64 } from '../base/bytes.ts'

export const MAGIC = 'VARVEDLS'
export const VERSION = 1

/** Bytes of a slot's header; the directory follows, then from the next multiple of BITS_ALIGNMENT the bits. */
export const HEADER_BYTES = 32
export const BITS_ALIGNMENT = 4096

export const RECORD_BYTES = 32

export const MARK = 1
export const COLD_MARK = 2
export const CLEAR = 3
export const HEAT = 4

export type RecordKind = typeof MARK | typeof COLD_MARK | typeof CLEAR | typeof HEAT

export interface LogRecord {
  readonly epoch: number
  readonly kind: RecordKind
  /** The bitmap that CLEAR means; 0 with the others. */
  readonly bitmap: number
  /** Bytes of the disk. */
  readonly offset: number
  readonly length: number
}

/** Makes records in one buffer, over and over: nothing is allocated. */
export class RecordEncoder {
  /** The record made last. */
  readonly bytes = Buffer.alloc(RECORD_BYTES)
  readonly #checked = this.bytes.subarray(4)

  encode(epoch: number, kind: RecordKind, bitmap: number, offset: number, length: number): void {
    setUint32(this.bytes, 4, epoch)
    setUint32(this.bytes, 8, kind)
    setUint32(this.bytes, 12, bitmap)
    setUint64(this.bytes, 16, offset)
    setUint64(this.bytes, 24, length)
    setUint32(this.bytes, 0, crc32(this.#checked))
  }
}

/** The epoch of the record at `at`, before its checksum is looked at. */
export function epochAt(bytes: Uint8Array, at: number): number {
  return getUint32(bytes, at + 4)
}

/** The record at `at`, or undefined when there is none that is whole. */
export function decodeRecord(bytes: Uint8Array, at: number): LogRecord | undefined {
  const checksum = crc32(bytes.subarray(at + 4, at + RECORD_BYTES))
  const kind = getUint32(bytes, at + 8)
  const offset = getUint64(bytes, at + 16)
  const length = getUint64(bytes, at + 24)
  const isKind = kind >= MARK && kind <= HEAT
  if (checksum !== getUint32(bytes, at) || !isKind || offset < 0 || length < 0) return undefined
  return { epoch: epochAt(bytes, at), kind: kind as RecordKind, bitmap: getUint32(bytes, at + 12), offset, length }
}
