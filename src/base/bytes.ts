// Big-endian numbers in byte arrays, and small helpers over bytes. The wire (NBD) and the disk (qcow2, the dirty log)
// are big-endian. 64-bit values become safe integers here, once: a value above 2^53 - 1 is reported, not rounded.

import { assert } from './assert.ts'

const TWO_32 = 0x1_0000_0000

/** Largest offset or length that Varve handles: 2^53 - 1 bytes, 8 PiB. */
export const MAX_SAFE = Number.MAX_SAFE_INTEGER

export function getUint16(bytes: Uint8Array, at: number): number {
  return ((bytes[at] as number) << 8) | (bytes[at + 1] as number)
}

export function getUint32(bytes: Uint8Array, at: number): number {
  return (
    (bytes[at] as number) * 0x100_0000 +
    (((bytes[at + 1] as number) << 16) | ((bytes[at + 2] as number) << 8) | (bytes[at + 3] as number))
  )
}

/** A 64-bit value as a number, or -1 when it is above 2^53 - 1. */
export function getUint64(bytes: Uint8Array, at: number): number {
  const high = getUint32(bytes, at)
  return high > 0x1f_ffff ? -1 : high * TWO_32 + getUint32(bytes, at + 4)
}

export function setUint16(bytes: Uint8Array, at: number, value: number): void {
  bytes[at] = value >>> 8
  bytes[at + 1] = value
}

export function setUint32(bytes: Uint8Array, at: number, value: number): void {
  bytes[at] = value >>> 24
  bytes[at + 1] = value >>> 16
  bytes[at + 2] = value >>> 8
  bytes[at + 3] = value
}

export function setUint64(bytes: Uint8Array, at: number, value: number): void {
  assert(value >= 0 && value <= MAX_SAFE)
  setUint32(bytes, at, Math.floor(value / TWO_32))
  setUint32(bytes, at + 4, value % TWO_32)
}

/** Copies `length` bytes, from `from[fromAt]` to `to[toAt]`; the ranges may overlap. */
export function copyBytes(from: Uint8Array, fromAt: number, to: Uint8Array, toAt: number, length: number): void {
  if (from === to) to.copyWithin(toAt, fromAt, fromAt + length)
  else to.set(from.subarray(fromAt, fromAt + length), toAt)
}

const ZEROS = Buffer.alloc(64 * 1024)

/** True when all `length` bytes from `at` are zero. */
export function isZero(bytes: Uint8Array, at: number, length: number): boolean {
  // Most blocks that are not zero show it in their first byte; the rest is left to memcmp.
  if (length > 0 && bytes[at] !== 0) return false
  for (let done = 0; done < length; done += ZEROS.length) {
    const piece = Math.min(ZEROS.length, length - done)
    if (ZEROS.compare(bytes, at + done, at + done + piece, 0, piece) !== 0) return false
  }
  return true
}

export function equalBytes(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && Buffer.compare(a, b) === 0
}

/** Text to UTF-8 bytes and back. */
export const utf8 = {
  encode: (text: string): Uint8Array => Buffer.from(text, 'utf8'),
  decode: (bytes: Uint8Array): string => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('utf8'),
}
