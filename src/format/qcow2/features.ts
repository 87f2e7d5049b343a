// The feature bits of a qcow2 header: which an image uses, which of them Varve knows, and the table of their names that the
// image carries, so that a program that does not know a feature can at least say its name.
//
//   feature name table   | type of feature | bit | name, padded with zeros to 46 bytes |  ...      48 bytes each

import { getUint32, utf8 } from '../../base/bytes.ts'
import type { BlockError, ErrorKind } from '../../block/error.ts'
import * as spec from './spec.ts'

/** Makes the error of a header that is refused: what is wrong, and where. */
export type Fail = (kind: ErrorKind, what: string, offset: number) => BlockError

export interface Features {
  readonly refcountOrder: number
  readonly compression: 'zlib' | 'zstd'
  /** Low half of incompatible_features; its high half is reserved, and an image that uses it is refused. */
  incompatible: number
  /** compatible_features and autoclear_features, eight bytes each as they are. */
  readonly compatible: Uint8Array
  autoclear: Uint8Array
}

/** What version 2 has. */
export function noFeatures(): Features {
  return {
    refcountOrder: spec.DEFAULT_REFCOUNT_ORDER,
    compression: 'zlib',
    incompatible: 0,
    compatible: new Uint8Array(8),
    autoclear: new Uint8Array(8),
  }
}

/**
 * Reads the features of the header in `bytes`, of version 3; `names` is its feature name table, or empty. Kinds: 'unsupported' for an
 * incompatible feature that is not known, by its name; 'invalid-format' for what cannot be.
 */
export function parseFeatures(bytes: Uint8Array, headerLength: number, names: Uint8Array, fail: Fail): Features {
  const { HEADER } = spec
  refuseUnknown(bytes, names, fail)
  const incompatible = getUint32(bytes, HEADER.incompatible_features + 4)
  const order = getUint32(bytes, HEADER.refcount_order)
  if (order > spec.MAX_REFCOUNT_ORDER)
    throw fail('invalid-format', `has refcounts of 2^${order} bits; at most 64 are possible`, HEADER.refcount_order)

  const typeAt = HEADER.compression_type
  const type = headerLength > typeAt ? (bytes[typeAt] as number) : spec.COMPRESSION_TYPE_ZLIB
  const isMarked = (incompatible & spec.INCOMPAT_COMPRESSION) !== 0
  if (isMarked !== (type !== spec.COMPRESSION_TYPE_ZLIB))
    throw fail('invalid-format', `has compression type ${type}, which its feature bits contradict`, typeAt)
  if (type > spec.COMPRESSION_TYPE_ZSTD) throw fail('unsupported', `has the unknown compression type ${type}`, typeAt)
  return {
    refcountOrder: order,
    compression: type === spec.COMPRESSION_TYPE_ZSTD ? 'zstd' : 'zlib',
    incompatible,
    compatible: bytes.slice(HEADER.compatible_features, HEADER.compatible_features + 8),
    autoclear: bytes.slice(HEADER.autoclear_features, HEADER.autoclear_features + 8),
  }
}

const KNOWN_FEATURES =
  spec.INCOMPAT_DIRTY |
  spec.INCOMPAT_CORRUPT |
  spec.INCOMPAT_DATA_FILE |
  spec.INCOMPAT_COMPRESSION |
  spec.INCOMPAT_EXTL2

function refuseUnknown(bytes: Uint8Array, names: Uint8Array, fail: Fail): void {
  const at = spec.HEADER.incompatible_features
  const unknown: string[] = []
  for (let bit = 0; bit < 64; bit++) {
    const isSet = (((bytes[at + 7 - (bit >>> 3)] as number) >>> (bit & 7)) & 1) !== 0
    const isKnown = bit < 32 && (KNOWN_FEATURES & (1 << bit)) !== 0
    if (isSet && !isKnown) unknown.push(nameOf(names, spec.FEATURE_INCOMPATIBLE, bit))
  }
  if (unknown.length === 0) return
  throw fail('unsupported', `uses features that Varve does not know: ${unknown.join(', ')}`, at)
}

/** What the image calls the bit, or else its number. */
function nameOf(names: Uint8Array, type: number, bit: number): string {
  for (let at = 0; at + spec.FEATURE_ENTRY_SIZE <= names.length; at += spec.FEATURE_ENTRY_SIZE) {
    if (names[at] !== type || names[at + 1] !== bit) continue
    const text = utf8.decode(names.subarray(at + 2, at + spec.FEATURE_ENTRY_SIZE)).replace(/\0.*$/s, '')
    // An image may claim anything: what would not show as text is left out.
    return `"${text.replace(/\p{C}/gu, '')}" (bit ${bit})`
  }
  return `bit ${bit}`
}

const FEATURE_NAMES: readonly (readonly [type: number, bit: number, name: string])[] = [
  [spec.FEATURE_INCOMPATIBLE, 0, 'dirty bit'],
  [spec.FEATURE_INCOMPATIBLE, 1, 'corrupt bit'],
  [spec.FEATURE_INCOMPATIBLE, 2, 'external data file'],
  [spec.FEATURE_INCOMPATIBLE, 3, 'compression type'],
  [spec.FEATURE_INCOMPATIBLE, 4, 'extended L2 entries'],
  [spec.FEATURE_COMPATIBLE, 0, 'lazy refcounts'],
  [spec.FEATURE_AUTOCLEAR, 0, 'bitmaps'],
  [spec.FEATURE_AUTOCLEAR, 1, 'raw external data'],
]

/** The table that a new image of version 3 carries: the bits that Varve knows, as QEMU names them. */
export function featureNameTable(): Uint8Array {
  const table = new Uint8Array(FEATURE_NAMES.length * spec.FEATURE_ENTRY_SIZE)
  FEATURE_NAMES.forEach(([type, bit, name], index) => {
    const at = index * spec.FEATURE_ENTRY_SIZE
    table[at] = type
    table[at + 1] = bit
    table.set(utf8.encode(name), at + 2)
  })
  return table
}
