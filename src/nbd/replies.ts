// Encodes the replies of the transmission phase in place ("Simple reply message", "Structured reply chunk message"). Each
// function writes at `to[at]`, takes the cookie from `cookie[from]`, and returns the length of the reply in bytes.
//
//   simple       magic 4 | error 4 | cookie 8 | data
//   structured   magic 4 | flags 2 | type 2 | cookie 8 | length 4 | payload

import { isZero, setUint16, setUint32, setUint64 } from '../base/bytes.ts'
import {
  CHUNK_SIZE,
  NBD_REPLY_FLAG_DONE,
  NBD_REPLY_TYPE_BLOCK_STATUS,
  NBD_REPLY_TYPE_ERROR,
  NBD_REPLY_TYPE_NONE,
  NBD_REPLY_TYPE_OFFSET_DATA,
  NBD_REPLY_TYPE_OFFSET_HOLE,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
  SIMPLE_REPLY_SIZE,
} from './spec.ts'

/** Reads from this length on are sent as a hole when they are all zeros; below, looking costs more than it saves. */
const HOLE_MIN = 64 * 1024

const DATA_HEADER = CHUNK_SIZE + 8

/** What comes before the data of a read, in bytes. */
export function readHeaderSize(structured: boolean): number {
  return structured ? DATA_HEADER : SIMPLE_REPLY_SIZE
}

function copyCookie(to: Uint8Array, at: number, cookie: Uint8Array, from: number): void {
  // Eight assignments: a view for `set` would be an allocation per request.
  to[at] = cookie[from] as number
  to[at + 1] = cookie[from + 1] as number
  to[at + 2] = cookie[from + 2] as number
  to[at + 3] = cookie[from + 3] as number
  to[at + 4] = cookie[from + 4] as number
  to[at + 5] = cookie[from + 5] as number
  to[at + 6] = cookie[from + 6] as number
  to[at + 7] = cookie[from + 7] as number
}

/** A simple reply without data; `errno` 0 is success. */
export function simple(to: Uint8Array, at: number, cookie: Uint8Array, from: number, errno: number): number {
  setUint32(to, at, NBD_SIMPLE_REPLY_MAGIC)
  setUint32(to, at + 4, errno)
  copyCookie(to, at + 8, cookie, from)
  return SIMPLE_REPLY_SIZE
}

function chunk(
  to: Uint8Array,
  at: number,
  cookie: Uint8Array,
  from: number,
  type: number,
  flags: number,
  length: number,
): void {
  setUint32(to, at, NBD_STRUCTURED_REPLY_MAGIC)
  setUint16(to, at + 4, flags)
  setUint16(to, at + 6, type)
  copyCookie(to, at + 8, cookie, from)
  setUint32(to, at + 16, length)
}

/** The only chunk of a read, around the `length` bytes that already lie behind its header. */
export function structuredRead(
  to: Uint8Array,
  at: number,
  cookie: Uint8Array,
  from: number,
  offset: number,
  length: number,
  mayHole: boolean,
): number {
  if (length === 0) {
    chunk(to, at, cookie, from, NBD_REPLY_TYPE_NONE, NBD_REPLY_FLAG_DONE, 0)
    return CHUNK_SIZE
  }
  const isHole = mayHole && length >= HOLE_MIN && isZero(to, at + DATA_HEADER, length)
  const type = isHole ? NBD_REPLY_TYPE_OFFSET_HOLE : NBD_REPLY_TYPE_OFFSET_DATA
  chunk(to, at, cookie, from, type, NBD_REPLY_FLAG_DONE, isHole ? 12 : 8 + length)
  setUint64(to, at + CHUNK_SIZE, offset)
  if (!isHole) return DATA_HEADER + length
  setUint32(to, at + DATA_HEADER, length)
  return DATA_HEADER + 4
}

/** The last chunk of a reply that failed; `message` of at most 65535 bytes is for people. */
export function structuredError(
  to: Uint8Array,
  at: number,
  cookie: Uint8Array,
  from: number,
  errno: number,
  message: Uint8Array,
): number {
  chunk(to, at, cookie, from, NBD_REPLY_TYPE_ERROR, NBD_REPLY_FLAG_DONE, 6 + message.length)
  setUint32(to, at + CHUNK_SIZE, errno)
  setUint16(to, at + CHUNK_SIZE + 4, message.length)
  to.set(message, at + CHUNK_SIZE + 6)
  return CHUNK_SIZE + 6 + message.length
}

/** One context's chunk of a block status reply. `extents` are pairs of length and status, at least one. */
export function statusChunk(
  to: Uint8Array,
  at: number,
  cookie: Uint8Array,
  from: number,
  contextId: number,
  extents: readonly number[],
  isLast: boolean,
): number {
  const payload = 4 + extents.length * 4
  chunk(to, at, cookie, from, NBD_REPLY_TYPE_BLOCK_STATUS, isLast ? NBD_REPLY_FLAG_DONE : 0, payload)
  setUint32(to, at + CHUNK_SIZE, contextId)
  for (let i = 0; i < extents.length; i++) setUint32(to, at + CHUNK_SIZE + 4 + i * 4, extents[i] as number)
  return CHUNK_SIZE + payload
}

/** The size of that chunk in bytes. */
export function statusChunkSize(extents: readonly number[]): number {
  return CHUNK_SIZE + 4 + extents.length * 4
}
