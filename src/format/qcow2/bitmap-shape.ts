// What a persistent bitmap of a qcow2 image may be: its name, its granularity, and how much it may take. The limits are QEMU's,
// so that what is made here opens there.

import { utf8 } from '../../base/bytes.ts'
import { GRANULE_MAX, GRANULE_MIN, QCOW2_BITMAP_MAX } from '../../base/limits.ts'
import { divideUp, isPowerOfTwo } from '../../base/round.ts'
import { BlockError, type ErrorKind } from '../../block/error.ts'
import * as spec from './spec.ts'

/** The cluster size, but from 4 to 64 KiB: as QEMU chooses the granularity of a new bitmap. */
const DEFAULT_MIN = 4096
const DEFAULT_MAX = 65_536

/** Bytes. */
export function defaultGranularity(clusterSize: number): number {
  return Math.min(DEFAULT_MAX, Math.max(DEFAULT_MIN, clusterSize))
}

/** Bytes that the bits of a disk of `size` bytes take. */
export function bitmapBytes(size: number, granularity: number): number {
  return divideUp(divideUp(size, granularity), 8)
}

/**
 * Checks a bitmap for a disk of `size` bytes in the image at `path`. Kinds: 'invalid-argument' for a name or a granularity that
 * cannot be, 'unsupported' when it would be too large.
 */
export function checkBitmap(path: string, size: number, name: string, granularity: number): void {
  const fail = (kind: ErrorKind, what: string): BlockError => new BlockError(kind, `${path}: ${what}`, { path })
  const nameLength = utf8.encode(name).length
  if (nameLength === 0 || nameLength > spec.MAX_BITMAP_NAME || name.includes('\0'))
    throw fail('invalid-argument', `a bitmap's name has 1 to ${spec.MAX_BITMAP_NAME} bytes, not ${nameLength}`)
  if (!isPowerOfTwo(granularity) || granularity < GRANULE_MIN || granularity > GRANULE_MAX)
    throw fail('invalid-argument', `a granularity is a power of two from 512 bytes to 2 GiB, not ${granularity}`)
  if (size === 0) throw fail('unsupported', 'a disk of no bytes has no bitmaps')
  if (bitmapBytes(size, granularity) > QCOW2_BITMAP_MAX) throw tooLarge(path, name)
}

export function tooLarge(path: string, name: string): BlockError {
  const message = `${path}: the bitmap ${JSON.stringify(name)} takes too much memory: use a larger granularity`
  return new BlockError('unsupported', message, { path })
}
