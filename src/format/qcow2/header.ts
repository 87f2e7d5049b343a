// The header of a qcow2 image: reads and checks it, and writes it. Everything that the header says is checked here, once;
// the tables that it points to are checked where they are read (tables.ts, refcounts.ts).
//
//   cluster 0   | fields (72 or header_length bytes) | extensions ... end | backing file name | free |

import { getUint32, getUint64, MAX_SAFE, setUint32, setUint64, utf8 } from '../../base/bytes.ts'
import {
  QCOW2_BITMAPS_MAX,
  QCOW2_DIRECTORY_MAX,
  QCOW2_L1_MAX,
  QCOW2_REFCOUNT_TABLE_MAX,
  QCOW2_SNAPSHOTS_MAX,
} from '../../base/limits.ts'
import { divideUp, roundUp } from '../../base/round.ts'
import type { BackingReference } from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import { type Fail, type Features, noFeatures, parseFeatures } from './features.ts'
import * as spec from './spec.ts'

export interface HeaderExtension {
  readonly type: number
  readonly data: Uint8Array
}

/** Where the bitmaps extension points to. */
export interface BitmapDirectory {
  readonly count: number
  readonly size: number
  readonly offset: number
}

/** The file that holds the guest's data, in place of the image itself. */
export interface DataFileReference {
  /** As written in the header: absolute, or relative to the image's folder. */
  readonly name: string
  /** True when it is at all times what the disk reads as, so that it can be used as a raw image. */
  readonly isRaw: boolean
}

/** What the header says. Offsets and sizes in bytes, tables in entries unless the name says otherwise. */
export interface Header extends Features {
  readonly version: 2 | 3
  size: number
  readonly clusterBits: number
  readonly clusterSize: number
  l1Offset: number
  l1Size: number
  refcountTableOffset: number
  refcountTableClusters: number
  snapshotCount: number
  snapshotsOffset: number
  /** True when L2 entries are extended; they then have 16 bytes, else 8. */
  readonly extendedL2: boolean
  readonly l2EntrySize: number
  /** The smallest unit of the map, in bytes: a subcluster with extended L2 entries, else a cluster. */
  readonly unitSize: number
  /** Fields after byte 104 up to header_length, kept as they are. */
  readonly moreFields: Uint8Array
  /** Without the backing format's, which is in `backing`, and without the end marker. */
  /** The external data file, whose name may be empty when the header does not say it; undefined for an image without one. */
  readonly dataFile: DataFileReference | undefined
  extensions: readonly HeaderExtension[]
  /** Where the bitmaps are, when autoclear bit 0 says that every writer knew of them. */
  bitmaps: BitmapDirectory | undefined
  backing: BackingReference | undefined
  /** Where the backing file's name is; 0 without one. */
  backingNameOffset: number
}

export function isDirty(header: Header): boolean {
  return (header.incompatible & spec.INCOMPAT_DIRTY) !== 0
}

export function isMarkedCorrupt(header: Header): boolean {
  return (header.incompatible & spec.INCOMPAT_CORRUPT) !== 0
}

/** True when a bit of the low byte of autoclear_features is set. */
export function hasAutoclear(header: Pick<Header, 'autoclear'>, bit: number): boolean {
  return ((header.autoclear[7] as number) & bit) !== 0
}

/**
 * Reads and checks the header of the image in `file`.
 * Kinds: 'invalid-format' (no qcow2, or a header that cannot be right), 'unsupported' (a feature, by name).
 */
export async function readHeader(file: HostFile): Promise<Header> {
  return parseHeader(await readFirstCluster(file), file.size(), file.path)
}

/** Reads the image's first cluster, which holds its header. Kind 'invalid-format' when it is no qcow2 image. */
export async function readFirstCluster(file: HostFile): Promise<Uint8Array> {
  const fileSize = file.size()
  const start = Buffer.alloc(spec.HEADER_LENGTH_V3)
  await file.read(0, start.length, start, 0)
  const fail = failure(file.path)
  if (fileSize < spec.HEADER_LENGTH_V2 || getUint32(start, 0) !== spec.MAGIC)
    throw fail(
      'invalid-format',
      'is no qcow2 image (its first bytes are not "QFI\\xfb"); check the format named for it',
      0,
    )
  const bits = getUint32(start, spec.HEADER.cluster_bits)
  if (bits < spec.MIN_CLUSTER_BITS || bits > spec.MAX_CLUSTER_BITS)
    throw fail('invalid-format', `has clusters of 2^${bits} bytes; 2^9 to 2^21 are possible`, spec.HEADER.cluster_bits)
  const first = Buffer.alloc(2 ** bits)
  await file.read(0, first.length, first, 0)
  return first
}

function failure(path: string): Fail {
  return (kind, what, offset) => new BlockError(kind, `${path} ${what}`, { path, offset })
}

/** Checks and reads the header in `bytes`, the image's whole first cluster. `fileSize` bounds what it may point to. */
export function parseHeader(bytes: Uint8Array, fileSize: number, path: string): Header {
  const fail = failure(path)
  const field = (name: keyof typeof spec.HEADER): number => getUint32(bytes, spec.HEADER[name])
  const long = (name: keyof typeof spec.HEADER): number => getUint64(bytes, spec.HEADER[name])
  const version = field('version')
  if (version !== 2 && version !== 3)
    throw fail('unsupported', `is a qcow2 image of version ${version}; versions 2 and 3 are known`, 4)
  if (field('crypt_method') !== 0)
    throw fail('unsupported', 'is encrypted, which Varve does not read', spec.HEADER.crypt_method)
  const headerLength = version === 2 ? spec.HEADER_LENGTH_V2 : field('header_length')
  const isShort = version === 3 && (headerLength < spec.HEADER_LENGTH_V3 || headerLength % 8 !== 0)
  if (isShort || headerLength > bytes.length)
    throw fail('invalid-format', `has a header of ${headerLength} bytes, which cannot be`, spec.HEADER.header_length)
  const { extensions, backingFormat } = parseExtensions(bytes, headerLength, fail)
  const names = extensions.find(({ type }) => type === spec.EXT_FEATURE_TABLE)?.data ?? new Uint8Array(0)
  const features = version === 2 ? noFeatures() : parseFeatures(bytes, headerLength, names, fail)
  const clusterBits = field('cluster_bits')
  const backingNameOffset = long('backing_file_offset')
  const name = backingNameOffset === 0 ? undefined : parseBackingName(bytes, backingNameOffset, fail)
  const header: Header = {
    version,
    size: long('size'),
    clusterBits,
    clusterSize: 2 ** clusterBits,
    l1Offset: long('l1_table_offset'),
    l1Size: field('l1_size'),
    refcountTableOffset: long('refcount_table_offset'),
    refcountTableClusters: field('refcount_table_clusters'),
    snapshotCount: field('nb_snapshots'),
    snapshotsOffset: long('snapshots_offset'),
    ...features,
    ...mapShape(clusterBits, features.incompatible),
    dataFile: parseDataFile(features, extensions, fail),
    moreFields: version === 2 ? new Uint8Array(0) : bytes.slice(spec.HEADER_LENGTH_V3, headerLength),
    extensions,
    bitmaps: hasAutoclear(features, spec.AUTOCLEAR_BITMAPS)
      ? parseBitmapDirectory(extensions, clusterBits, fileSize, fail)
      : undefined,
    backing: name === undefined ? undefined : { name, format: backingFormat },
    backingNameOffset,
  }
  if (header.extendedL2 && clusterBits < spec.MIN_CLUSTER_BITS_EXTL2)
    throw fail('invalid-format', `has extended L2 entries with clusters of only 2^${clusterBits} bytes`, 20)
  checkTables(header, fileSize, fail)
  return header
}

function parseDataFile(
  { incompatible, autoclear }: Features,
  extensions: readonly HeaderExtension[],
  fail: Fail,
): DataFileReference | undefined {
  const isRaw = ((autoclear[7] as number) & spec.AUTOCLEAR_DATA_FILE_RAW) !== 0
  if ((incompatible & spec.INCOMPAT_DATA_FILE) === 0) return undefined
  const found = extensions.find(({ type }) => type === spec.EXT_DATA_FILE)
  if (found === undefined) return { name: '', isRaw }
  const name = utf8.decode(found.data)
  if (name === '' || name.includes('\0'))
    throw fail('invalid-format', 'has a data file name that cannot be', spec.HEADER_LENGTH_V3)
  return { name, isRaw }
}

/** How L2 tables look with these incompatible features. */
export function mapShape(
  clusterBits: number,
  incompatible: number,
): Pick<Header, 'extendedL2' | 'l2EntrySize' | 'unitSize'> {
  const extendedL2 = (incompatible & spec.INCOMPAT_EXTL2) !== 0
  const l2EntrySize = extendedL2 ? spec.EXTENDED_ENTRY_SIZE : spec.ENTRY_SIZE
  return { extendedL2, l2EntrySize, unitSize: 2 ** clusterBits / (extendedL2 ? spec.SUBCLUSTERS : 1) }
}

function parseExtensions(
  bytes: Uint8Array,
  start: number,
  fail: Fail,
): { extensions: HeaderExtension[]; backingFormat: string | undefined } {
  const extensions: HeaderExtension[] = []
  let backingFormat: string | undefined
  // The area ends at its end marker; when a cluster is full, also at the name or the cluster's end.
  const nameOffset = getUint64(bytes, spec.HEADER.backing_file_offset)
  const limit = nameOffset > 0 && nameOffset < bytes.length ? nameOffset : bytes.length
  let at = start
  while (at + 8 <= limit) {
    const type = getUint32(bytes, at)
    if (type === spec.EXT_END) break
    const length = getUint32(bytes, at + 4)
    if (length > limit - at - 8)
      throw fail('invalid-format', `has a header extension of ${length} bytes, which leaves the header`, at)
    const data = bytes.slice(at + 8, at + 8 + length)
    if (type === spec.EXT_BACKING_FORMAT) backingFormat = utf8.decode(data)
    else extensions.push({ type, data })
    at += 8 + roundUp(length, 8)
  }
  return { extensions, backingFormat }
}

function parseBackingName(bytes: Uint8Array, offset: number, fail: Fail): string {
  const size = getUint32(bytes, spec.HEADER.backing_file_size)
  const place = spec.HEADER.backing_file_offset
  if (size === 0 || size > spec.MAX_BACKING_NAME)
    throw fail('invalid-format', `has a backing file name of ${size} bytes; 1 to 1023 are possible`, place)
  if (offset < spec.HEADER_LENGTH_V2 || offset + size > bytes.length)
    throw fail('invalid-format', `has its backing file name at ${offset}, outside the first cluster`, place)
  const name = utf8.decode(bytes.subarray(offset, offset + size))
  if (name.includes('\0')) throw fail('invalid-format', 'has a zero byte in its backing file name', place)
  return name
}

/** Where the bitmaps extension points to, whatever the autoclear bit says; undefined where it cannot be right. */
export function findBitmapDirectory(header: Header, fileSize: number): BitmapDirectory | undefined {
  try {
    return parseBitmapDirectory(header.extensions, header.clusterBits, fileSize, failure(''))
  } catch {
    return undefined
  }
}

function parseBitmapDirectory(
  extensions: readonly HeaderExtension[],
  clusterBits: number,
  fileSize: number,
  fail: Fail,
): BitmapDirectory | undefined {
  const found = extensions.find((extension) => extension.type === spec.EXT_BITMAPS)
  if (found === undefined) return undefined
  if (found.data.length !== spec.BITMAPS_EXTENSION_LENGTH)
    throw fail('invalid-format', 'has a bitmaps extension of a wrong length', 0)
  const { BITMAPS_EXTENSION } = spec
  const count = getUint32(found.data, BITMAPS_EXTENSION.nb_bitmaps)
  const size = getUint64(found.data, BITMAPS_EXTENSION.bitmap_directory_size)
  const offset = getUint64(found.data, BITMAPS_EXTENSION.bitmap_directory_offset)
  const isSized = count > 0 && count <= QCOW2_BITMAPS_MAX && size > 0 && size <= QCOW2_DIRECTORY_MAX
  const isPlaced = offset > 0 && offset % 2 ** clusterBits === 0 && offset + size <= fileSize
  if (!isSized || !isPlaced)
    throw fail('invalid-format', `has a bitmap directory of ${size} bytes at ${offset}, which cannot be`, offset)
  return { count, size, offset }
}

/** One area of the image that the header points to: it must be aligned, inside the file and apart from the others. */
interface Area {
  readonly what: string
  readonly offset: number
  readonly length: number
}

function checkTables(header: Header, fileSize: number, fail: Fail): void {
  const { clusterSize, size, l1Size } = header
  if (size < 0) throw fail('invalid-format', `has a size above ${MAX_SAFE} bytes`, spec.HEADER.size)
  const l1Needed = l1EntriesFor(size, clusterSize, header.l2EntrySize)
  if (l1Size * spec.ENTRY_SIZE > QCOW2_L1_MAX)
    throw fail('invalid-format', `has an L1 table of ${l1Size} entries, above the limit`, spec.HEADER.l1_size)
  if (l1Size < l1Needed)
    throw fail('invalid-format', `has ${l1Size} L1 entries; its size needs ${l1Needed}`, spec.HEADER.l1_size)
  if (
    header.refcountTableClusters === 0 ||
    header.refcountTableClusters * clusterSize > roundUp(QCOW2_REFCOUNT_TABLE_MAX, clusterSize)
  )
    throw fail('invalid-format', 'has a refcount table of an impossible length', spec.HEADER.refcount_table_clusters)
  if (header.snapshotCount > QCOW2_SNAPSHOTS_MAX)
    throw fail('invalid-format', `has ${header.snapshotCount} snapshots, above the limit`, spec.HEADER.nb_snapshots)
  const areas: Area[] = [
    { what: 'refcount table', offset: header.refcountTableOffset, length: header.refcountTableClusters * clusterSize },
  ]
  if (l1Size > 0) areas.push({ what: 'L1 table', offset: header.l1Offset, length: l1Size * spec.ENTRY_SIZE })
  if (header.snapshotCount > 0) areas.push({ what: 'snapshot table', offset: header.snapshotsOffset, length: 40 })
  checkAreas(areas, clusterSize, fileSize, fail)
}

function checkAreas(areas: readonly Area[], clusterSize: number, fileSize: number, fail: Fail): void {
  const header: Area = { what: 'header', offset: 0, length: clusterSize }
  areas.forEach((area, index) => {
    if (area.offset < 0 || area.offset % clusterSize !== 0)
      throw fail('invalid-format', `has its ${area.what} at ${area.offset}, which is not the start of a cluster`, 0)
    for (const other of [header, ...areas.slice(0, index)]) {
      const length = roundUp(area.length, clusterSize)
      if (area.offset < other.offset + roundUp(other.length, clusterSize) && other.offset < area.offset + length)
        throw fail('invalid-format', `has its ${area.what} at ${area.offset}, inside its ${other.what}`, area.offset)
    }
    if (area.offset + area.length > fileSize)
      throw fail('invalid-format', `is cut off: its ${area.what} ends after the file`, area.offset)
  })
}

/** How many L1 entries a disk of `size` bytes needs, with L2 entries of `l2EntrySize` bytes. */
export function l1EntriesFor(size: number, clusterSize: number, l2EntrySize: number): number {
  return divideUp(size, clusterSize * (clusterSize / l2EntrySize))
}

/**
 * The header as bytes, to be written at offset 0: fields, extensions, end marker. The backing file's name is not in it
 * but at `header.backingNameOffset`.
 */
export function encodeHeader(header: Header): Uint8Array {
  const fieldsLength = header.version === 2 ? spec.HEADER_LENGTH_V2 : spec.HEADER_LENGTH_V3 + header.moreFields.length
  const extensions = [...header.extensions]
  const format = header.backing?.format
  if (format !== undefined) extensions.unshift({ type: spec.EXT_BACKING_FORMAT, data: utf8.encode(format) })
  const length = extensions.reduce((sum, { data }) => sum + 8 + roundUp(data.length, 8), fieldsLength + 8)
  const bytes = new Uint8Array(length)
  const backingLength = header.backing === undefined ? 0 : utf8.encode(header.backing.name).length
  const { HEADER } = spec
  setUint32(bytes, HEADER.magic, spec.MAGIC)
  setUint32(bytes, HEADER.version, header.version)
  setUint64(bytes, HEADER.backing_file_offset, header.backingNameOffset)
  setUint32(bytes, HEADER.backing_file_size, backingLength)
  setUint32(bytes, HEADER.cluster_bits, header.clusterBits)
  setUint64(bytes, HEADER.size, header.size)
  setUint32(bytes, HEADER.l1_size, header.l1Size)
  setUint64(bytes, HEADER.l1_table_offset, header.l1Offset)
  setUint64(bytes, HEADER.refcount_table_offset, header.refcountTableOffset)
  setUint32(bytes, HEADER.refcount_table_clusters, header.refcountTableClusters)
  setUint32(bytes, HEADER.nb_snapshots, header.snapshotCount)
  setUint64(bytes, HEADER.snapshots_offset, header.snapshotsOffset)
  if (header.version === 3) {
    setUint64(bytes, HEADER.incompatible_features, header.incompatible)
    bytes.set(header.compatible, HEADER.compatible_features)
    bytes.set(header.autoclear, HEADER.autoclear_features)
    setUint32(bytes, HEADER.refcount_order, header.refcountOrder)
    setUint32(bytes, HEADER.header_length, fieldsLength)
    bytes.set(header.moreFields, spec.HEADER_LENGTH_V3)
  }
  let at = fieldsLength
  for (const { type, data } of extensions) {
    setUint32(bytes, at, type)
    setUint32(bytes, at + 4, data.length)
    bytes.set(data, at + 8)
    at += 8 + roundUp(data.length, 8)
  }
  return bytes
}

/**
 * Where in the first cluster a backing name of `length` bytes goes: after the extensions, which end at `start`, and beside
 * the name that is there, never over it. -1 when it does not fit.
 */
export function placeBackingName(header: Header, start: number, length: number): number {
  const oldStart = header.backingNameOffset
  const oldEnd = header.backing === undefined ? oldStart : oldStart + utf8.encode(header.backing.name).length
  const isBefore = oldStart === 0 || start + length <= oldStart
  const place = isBefore ? start : Math.max(start, roundUp(oldEnd, 8))
  return place + length <= header.clusterSize ? place : -1
}

/**
 * The autoclear features that hold on while Varve writes: those that it knows, where they apply. Of all others the
 * specification has a writer clear the bits.
 */
export function knownAutoclear(header: Header): Uint8Array {
  const raw = header.dataFile?.isRaw === true ? spec.AUTOCLEAR_DATA_FILE_RAW : 0
  const known = raw | (header.bitmaps === undefined ? 0 : spec.AUTOCLEAR_BITMAPS)
  const bytes = new Uint8Array(8)
  bytes[7] = (header.autoclear[7] as number) & known
  return bytes
}

/** Writes the three feature fields, which version 2 does not have, and syncs. */
export async function writeFeatures(file: HostFile, header: Header): Promise<void> {
  if (header.version === 2) return
  const bytes = new Uint8Array(24)
  setUint64(bytes, 0, header.incompatible)
  bytes.set(header.compatible, 8)
  bytes.set(header.autoclear, 16)
  await file.write(spec.HEADER.incompatible_features, bytes.length, bytes, 0)
  await file.sync()
}
