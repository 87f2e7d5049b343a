// The bitmap directory of a qcow2 image (specification, "Bitmaps"): reads and checks it strictly, and writes it. What a bitmap
// holds is bitmap-storage.ts's work, and what happens to it while the image is written bitmaps.ts's.
//
//   header extension -> directory   | 24 bytes | extra data | name | zeros to a multiple of 8 |        one after the other
//   entry -> bitmap table -> clusters of bits
//
// Flags change in place, where no power loss can tear them. For anything else a new directory is written and the header
// extension led to it, which may cross a sector: meanwhile autoclear bit 0 is clear, so that nobody trusts what is half done.

import {
  equalBytes,
  getUint16,
  getUint32,
  getUint64,
  isZero,
  setUint16,
  setUint32,
  setUint64,
  utf8,
} from '../../base/bytes.ts'
import { QCOW2_BITMAP_MAX, QCOW2_BITMAPS_MAX, QCOW2_DIRECTORY_MAX } from '../../base/limits.ts'
import { divideUp, roundUp } from '../../base/round.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Allocator } from './allocator.ts'
import { type BitmapDirectory, encodeHeader, type Header, type HeaderExtension, writeFeatures } from './header.ts'
import * as spec from './spec.ts'

/** A bitmap as the directory has it. */
export interface BitmapEntry {
  readonly name: string
  readonly granularityBits: number
  /** Kept as they are. */
  readonly extra: Uint8Array
  tableOffset: number
  /** Entries of the bitmap table. */
  tableSize: number
  flags: number
}

/** How many entries the table of a bitmap has. All in bytes. */
export function tableEntriesFor(size: number, granularity: number, clusterSize: number): number {
  return divideUp(divideUp(divideUp(size, granularity), 8), clusterSize)
}

/** Reads the directory. Kind 'invalid-format' when it breaks a rule of the specification or a limit of QEMU. */
export async function readDirectory(file: HostFile, header: Header, place: BitmapDirectory): Promise<BitmapEntry[]> {
  const bytes = new Uint8Array(place.size)
  await file.read(place.offset, bytes.length, bytes, 0)
  const entries: BitmapEntry[] = []
  const names = new Set<string>()
  let at = 0
  const fail = (what: string): BlockError => {
    const message = `${file.path}: bitmap ${entries.length + 1} of its bitmap directory ${what}`
    return new BlockError('invalid-format', message, { path: file.path, offset: place.offset + at })
  }
  while (entries.length < place.count) {
    const length = entryLength(bytes, at)
    if (length === 0) throw fail('ends after the directory')
    const entry = parseEntry(bytes, at)
    checkEntry(entry, bytes, at, header, file.size(), fail)
    if (names.has(entry.name)) throw fail(`has the name of another one, ${JSON.stringify(entry.name)}`)
    names.add(entry.name)
    entries.push(entry)
    at += length
  }
  if (at !== bytes.length) throw fail('is followed by more than the header says')
  return entries
}

/** Writes the flags of the entries where the directory has them; a sync must follow. */
export async function writeFlags(
  file: HostFile,
  place: BitmapDirectory,
  entries: readonly BitmapEntry[],
): Promise<void> {
  const field = new Uint8Array(4)
  let at = place.offset
  for (const entry of entries) {
    setUint32(field, 0, entry.flags)
    await file.write(at + spec.BITMAP.flags, field.length, field, 0)
    at += encodedLength(entry)
  }
}

/** What writing a directory anew needs. */
export interface DirectoryHome {
  readonly file: HostFile
  readonly header: Header
  readonly allocator: Allocator
}

/**
 * Kind 'unsupported' when the header or the directory has no room for these entries: to be asked before anything that
 * `writeDirectory` would make durable is begun.
 */
export function checkDirectoryFits({ file, header }: DirectoryHome, entries: readonly BitmapEntry[]): void {
  const fail = (what: string): BlockError => new BlockError('unsupported', `${file.path}: ${what}`, { path: file.path })
  if (header.version === 2) throw fail('bitmaps need version 3 of qcow2: qemu-img amend -f qcow2 -o compat=1.1')
  const size = entries.reduce((sum, entry) => sum + encodedLength(entry), 0)
  if (entries.length > QCOW2_BITMAPS_MAX || size > QCOW2_DIRECTORY_MAX) throw fail('no more bitmaps fit; remove some')
  if (entries.length > 0 && layOutHeader(header, { count: entries.length, size, offset: 0 }) === undefined)
    throw fail(`its header, a cluster of ${header.clusterSize} bytes, has no room for bitmaps`)
}

/** Writes the directory to new clusters, leads the header to it, and frees the old one. Durable on return. */
export async function writeDirectory(home: DirectoryHome, entries: readonly BitmapEntry[]): Promise<void> {
  const { file, header, allocator } = home
  const { clusterSize } = header
  const bytes = encodeDirectory(entries)
  const old = header.bitmaps
  let place: BitmapDirectory | undefined
  if (entries.length > 0) {
    const first = await allocator.allocateRun(divideUp(bytes.length, clusterSize))
    place = { count: entries.length, size: bytes.length, offset: first * clusterSize }
    await file.write(place.offset, bytes.length, bytes, 0)
    await file.sync()
  }
  await setAutoclear(file, header, false)
  await leadHeaderTo(file, header, place)
  await setAutoclear(file, header, place !== undefined)
  if (old !== undefined) await allocator.freeLater(old.offset / clusterSize, divideUp(old.size, clusterSize))
}

async function setAutoclear(file: HostFile, header: Header, isSet: boolean): Promise<void> {
  const low = header.autoclear[7] as number
  const next = isSet ? low | spec.AUTOCLEAR_BITMAPS : low & ~spec.AUTOCLEAR_BITMAPS
  if (next === low) return
  header.autoclear = header.autoclear.with(7, next)
  await writeFeatures(file, header)
}

interface Layout {
  readonly extensions: readonly HeaderExtension[]
  readonly backingNameOffset: number
}

/** The header's extensions with this directory, and where its backing file's name then is; undefined without room. */
function layOutHeader(header: Header, place: BitmapDirectory | undefined): Layout | undefined {
  const others = header.extensions.filter(({ type }) => type !== spec.EXT_BITMAPS)
  const extensions = place === undefined ? others : [...others, { type: spec.EXT_BITMAPS, data: encodePlace(place) }]
  const { length } = encodeHeader({ ...header, extensions })
  const { backing, backingNameOffset, clusterSize } = header
  if (backing === undefined || length <= backingNameOffset)
    return length <= clusterSize ? { extensions, backingNameOffset } : undefined
  // The name makes room, to a place that does not touch the old one.
  const nameLength = utf8.encode(backing.name).length
  const moved = roundUp(Math.max(length, backingNameOffset + nameLength), 8)
  return moved + nameLength <= clusterSize ? { extensions, backingNameOffset: moved } : undefined
}

async function leadHeaderTo(file: HostFile, header: Header, place: BitmapDirectory | undefined): Promise<void> {
  const layout = layOutHeader(header, place)
  if (layout === undefined) {
    const message = `${file.path}: its header has no room for bitmaps`
    throw new BlockError('unsupported', message, { path: file.path })
  }
  if (header.backing !== undefined && layout.backingNameOffset !== header.backingNameOffset) {
    const name = utf8.encode(header.backing.name)
    await file.write(layout.backingNameOffset, name.length, name, 0)
    await file.sync()
    const field = new Uint8Array(8)
    setUint64(field, 0, layout.backingNameOffset)
    await file.write(spec.HEADER.backing_file_offset, field.length, field, 0)
    await file.sync()
    header.backingNameOffset = layout.backingNameOffset
  }
  const bytes = encodeHeader({ ...header, extensions: layout.extensions })
  await file.write(0, bytes.length, bytes, 0)
  await file.sync()
  header.extensions = layout.extensions
  header.bitmaps = place
}

function encodePlace({ count, size, offset }: BitmapDirectory): Uint8Array {
  const data = new Uint8Array(spec.BITMAPS_EXTENSION_LENGTH)
  setUint32(data, spec.BITMAPS_EXTENSION.nb_bitmaps, count)
  setUint64(data, spec.BITMAPS_EXTENSION.bitmap_directory_size, size)
  setUint64(data, spec.BITMAPS_EXTENSION.bitmap_directory_offset, offset)
  return data
}

/** Bytes of the entry at `at` with its padding; 0 when it does not end within the directory. */
function entryLength(bytes: Uint8Array, at: number): number {
  if (at + spec.BITMAP_LENGTH > bytes.length) return 0
  const { BITMAP } = spec
  const texts = getUint32(bytes, at + BITMAP.extra_data_size) + getUint16(bytes, at + BITMAP.name_size)
  const length = roundUp(spec.BITMAP_LENGTH + texts, 8)
  return at + length <= bytes.length ? length : 0
}

function parseEntry(bytes: Uint8Array, at: number): BitmapEntry {
  const { BITMAP } = spec
  const extraAt = at + spec.BITMAP_LENGTH
  const nameAt = extraAt + getUint32(bytes, at + BITMAP.extra_data_size)
  return {
    name: utf8.decode(bytes.subarray(nameAt, nameAt + getUint16(bytes, at + BITMAP.name_size))),
    granularityBits: bytes[at + BITMAP.granularity_bits] as number,
    extra: bytes.slice(extraAt, nameAt),
    tableOffset: getUint64(bytes, at + BITMAP.bitmap_table_offset),
    tableSize: getUint32(bytes, at + BITMAP.bitmap_table_size),
    flags: getUint32(bytes, at + BITMAP.flags),
  }
}

function checkEntry(
  entry: BitmapEntry,
  bytes: Uint8Array,
  at: number,
  header: Header,
  fileSize: number,
  fail: (what: string) => BlockError,
): void {
  const { BITMAP } = spec
  const { clusterSize } = header
  const { tableOffset, tableSize, granularityBits, flags } = entry
  const type = bytes[at + BITMAP.type] as number
  const nameSize = getUint16(bytes, at + BITMAP.name_size)
  const end = at + spec.BITMAP_LENGTH + entry.extra.length + nameSize
  if (type !== spec.BITMAP_TYPE_DIRTY) throw fail(`has the type ${type}; only 1, dirty tracking, is known`)
  if ((flags & spec.BITMAP_RESERVED_FLAGS) !== 0) throw fail('has reserved flags set')
  if (granularityBits < spec.MIN_GRANULARITY_BITS || granularityBits > spec.MAX_GRANULARITY_BITS)
    throw fail(`has a granularity of 2^${granularityBits} bytes; 2^9 to 2^31 are possible`)
  if (nameSize === 0 || nameSize > spec.MAX_BITMAP_NAME)
    throw fail(`has a name of ${nameSize} bytes; 1 to 1023 are possible`)
  if (!equalBytes(utf8.encode(entry.name), bytes.subarray(end - nameSize, end)))
    throw fail('has a name that is not UTF-8')
  if (!isZero(bytes, end, roundUp(end, 8) - end)) throw fail('has padding that is not zero')
  const isPlaced = tableOffset >= clusterSize && tableOffset % clusterSize === 0
  if (!isPlaced || tableOffset + tableSize * spec.ENTRY_SIZE > fileSize)
    throw fail(`has its table at ${tableOffset}, where it cannot be`)
  if (tableSize === 0 || tableSize * clusterSize > Math.max(QCOW2_BITMAP_MAX, clusterSize))
    throw fail(`has a table of ${tableSize} entries, which cannot be`)
  const needed = tableEntriesFor(header.size, 2 ** granularityBits, clusterSize)
  // The size of one that was not saved may be that of the disk before it was resized.
  if ((flags & spec.BITMAP_IN_USE) === 0 && tableSize !== Math.max(1, needed))
    throw fail(`has a table of ${tableSize} entries, and its disk needs ${needed}`)
}

function encodedLength(entry: BitmapEntry): number {
  return roundUp(spec.BITMAP_LENGTH + entry.extra.length + utf8.encode(entry.name).length, 8)
}

function encodeDirectory(entries: readonly BitmapEntry[]): Uint8Array {
  const { BITMAP } = spec
  const bytes = new Uint8Array(entries.reduce((sum, entry) => sum + encodedLength(entry), 0))
  let at = 0
  for (const entry of entries) {
    const name = utf8.encode(entry.name)
    setUint64(bytes, at + BITMAP.bitmap_table_offset, entry.tableOffset)
    setUint32(bytes, at + BITMAP.bitmap_table_size, entry.tableSize)
    setUint32(bytes, at + BITMAP.flags, entry.flags)
    bytes[at + BITMAP.type] = spec.BITMAP_TYPE_DIRTY
    bytes[at + BITMAP.granularity_bits] = entry.granularityBits
    setUint16(bytes, at + BITMAP.name_size, name.length)
    setUint32(bytes, at + BITMAP.extra_data_size, entry.extra.length)
    bytes.set(entry.extra, at + spec.BITMAP_LENGTH)
    bytes.set(name, at + spec.BITMAP_LENGTH + entry.extra.length)
    at += encodedLength(entry)
  }
  return bytes
}
