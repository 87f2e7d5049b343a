// What a bitmap of a qcow2 image holds (specification, "Bitmap table" and "Bitmap data"): reads it, and writes it in place where
// its table fits, else anew. A bitmap that is written is marked in_use in the file, so that nobody trusts what is half
// done; but its table never leads to a cluster that is not durable yet. The marks are bitmaps.ts's affair.
//
//   table entry   63      56 55                          9 8       1  0
//                 reserved   host offset of the cluster    reserved O     O without an offset: reads as ones, else zeros

import { getUint32, isZero, setUint64 } from '../../base/bytes.ts'
import { divideUp } from '../../base/round.ts'
import { Bitmap } from '../../bitmap/bitmap.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Allocator } from './allocator.ts'
import { type BitmapEntry, tableEntriesFor } from './bitmap-directory.ts'
import { bitmapBytes } from './bitmap-shape.ts'
import type { Header } from './header.ts'
import * as spec from './spec.ts'

export interface StorageHome {
  readonly file: HostFile
  readonly header: Header
  readonly allocator: Allocator
}

/** Where a bitmap's bits are: offsets in the file, or these two for clusters of one value. */
const ZEROS = 0
const ONES = -1

/** Reads the bits of a bitmap that is not in use. Kind 'corrupt' when its table or its tail breaks the specification. */
export async function loadBits(file: HostFile, header: Header, entry: BitmapEntry): Promise<Bitmap> {
  const { clusterSize } = header
  const bitmap = new Bitmap(header.size, 2 ** entry.granularityBits)
  const fail = (what: string): BlockError => {
    const message = `${file.path}: the bitmap ${JSON.stringify(entry.name)} ${what}; remove it`
    return new BlockError('corrupt', message, { path: file.path, offset: entry.tableOffset })
  }
  const table = await readTable(file, header, entry, fail)
  const bytes = bitmapBytes(header.size, bitmap.granule)
  const cluster = new Uint8Array(clusterSize)
  for (const [index, place] of table.entries()) {
    const first = index * clusterSize
    const length = Math.min(clusterSize, bytes - first)
    if (length <= 0 || place === ZEROS) continue
    if (place === ONES) {
      bitmap.setGranules(first * 8, Math.min(bitmap.length, (first + length) * 8))
      continue
    }
    await file.read(place, clusterSize, cluster, 0)
    const unused = (first + length) * 8 - bitmap.length
    const lastByte = cluster[length - 1] as number
    const isTailSet = unused > 0 && lastByte >>> (8 - unused) !== 0
    if (isTailSet || !isZero(cluster, length, clusterSize - length)) throw fail('has bits set after its end')
    bitmap.addBytes(first, length, cluster, 0)
  }
  return bitmap
}

async function readTable(
  file: HostFile,
  { clusterSize }: Header,
  { tableOffset, tableSize }: BitmapEntry,
  fail: (what: string) => BlockError,
): Promise<Float64Array> {
  const bytes = new Uint8Array(tableSize * spec.ENTRY_SIZE)
  await file.read(tableOffset, bytes.length, bytes, 0)
  const fileSize = file.size()
  const table = new Float64Array(tableSize)
  for (let index = 0; index < tableSize; index++) {
    const high = getUint32(bytes, index * spec.ENTRY_SIZE)
    const low = getUint32(bytes, index * spec.ENTRY_SIZE + 4)
    const place = spec.entryOffset(high, low)
    const isOne = (low & spec.BITMAP_TABLE_ONES_LOW) !== 0
    const isReserved = (high & spec.BITMAP_TABLE_RESERVED_HIGH) !== 0 || (low & spec.BITMAP_TABLE_RESERVED_LOW) !== 0
    if (isReserved || (isOne && place !== 0)) throw fail(`has reserved bits set in entry ${index} of its table`)
    if (place % clusterSize !== 0 || place >= fileSize) throw fail(`has its bits at ${place}, where they cannot be`)
    table[index] = place === 0 && isOne ? ONES : place
  }
  return table
}

function encodeTable(table: Float64Array): Uint8Array {
  const bytes = new Uint8Array(table.length * spec.ENTRY_SIZE)
  for (const [index, place] of table.entries()) {
    if (place === ONES) bytes[index * spec.ENTRY_SIZE + 7] = spec.BITMAP_TABLE_ONES_LOW
    else setUint64(bytes, index * spec.ENTRY_SIZE, place)
  }
  return bytes
}

/** A bitmap's bits in the file, and a table that is to lead to them. */
export interface Stored {
  readonly entry: BitmapEntry
  /** Where the table is to be: the old place, or a new one. */
  readonly tableOffset: number
  readonly table: Float64Array
  readonly isTableChanged: boolean
  /** Clusters, as offsets, that nothing refers to once the table and the directory are durable. */
  readonly dropped: number[]
}

/**
 * Writes the bits of a bitmap, which is in use; a sync must follow before `writeTable`. On failure no cluster is lost, and
 * what the bitmap holds in the file is of no meaning.
 */
export async function storeBits(home: StorageHome, entry: BitmapEntry, bitmap: Bitmap): Promise<Stored> {
  const { file, header, allocator } = home
  const { clusterSize } = header
  const size = Math.max(1, tableEntriesFor(header.size, bitmap.granule, clusterSize))
  const old = await readTableLeniently(home, entry)
  const isInPlace = size === entry.tableSize && old.every((place) => place !== ONES)
  const table = isInPlace ? old.slice() : new Float64Array(size)
  const dropped = isInPlace ? [] : [...old.filter((place) => place > 0), ...tableClusters(entry, clusterSize)]
  const fresh: number[] = []
  try {
    const bytes = bitmapBytes(header.size, bitmap.granule)
    const cluster = new Uint8Array(clusterSize)
    for (let index = 0; index < size; index++) {
      const first = index * clusterSize
      cluster.fill(0)
      bitmap.copyBytes(first, Math.max(0, Math.min(clusterSize, bytes - first)), cluster, 0)
      const before = await ownPlace(home, table[index] as number)
      if (isZero(cluster, 0, clusterSize)) {
        if (before !== ZEROS) dropped.push(before)
        table[index] = ZEROS
        continue
      }
      const place = before === ZEROS ? (await allocateOne(allocator)) * clusterSize : before
      if (before === ZEROS) fresh.push(place)
      table[index] = place
      await file.write(place, clusterSize, cluster, 0)
    }
    const tableOffset = isInPlace ? entry.tableOffset : await allocateTable(home, size)
    const isTableChanged = !isInPlace || table.some((place, index) => place !== old[index])
    return { entry, tableOffset, table, isTableChanged, dropped }
  } catch (error) {
    await freeClusters(home, fresh)
    throw error
  }
}

/** Writes the table of what was stored; a sync must follow. */
export async function writeTable({ file }: StorageHome, { table, tableOffset }: Stored): Promise<void> {
  const bytes = encodeTable(table)
  await file.write(tableOffset, bytes.length, bytes, 0)
}

/** A new table whose bits are all zero; gives its place. Durable after the next sync. */
export async function allocateTable({ header, allocator }: StorageHome, entries: number): Promise<number> {
  const { clusterSize } = header
  return (await allocator.allocateRun(divideUp(entries * spec.ENTRY_SIZE, clusterSize))) * clusterSize
}

/** Frees a bitmap's table and bits, after the directory without it is durable. */
export async function freeBitmap(home: StorageHome, entry: BitmapEntry): Promise<void> {
  const table = await readTableLeniently(home, entry)
  const places = [...table.filter((place) => place > 0), ...tableClusters(entry, home.header.clusterSize)]
  await freeClusters(home, places)
}

/** Frees clusters that are given as offsets. */
export async function freeClusters({ header, allocator }: StorageHome, places: readonly number[]): Promise<void> {
  for (const place of places) await allocator.freeLater(place / header.clusterSize, 1)
}

function tableClusters({ tableOffset, tableSize }: BitmapEntry, clusterSize: number): number[] {
  const count = divideUp(tableSize * spec.ENTRY_SIZE, clusterSize)
  return Array.from({ length: count }, (_, index) => tableOffset + index * clusterSize)
}

/** The table of a bitmap that need not be right: what cannot be counts as empty, and at worst leaks. */
async function readTableLeniently({ file, header }: StorageHome, entry: BitmapEntry): Promise<Float64Array> {
  try {
    return await readTable(file, header, entry, () => new BlockError('corrupt', entry.name))
  } catch (error) {
    if (error instanceof BlockError && error.kind === 'corrupt') return new Float64Array(entry.tableSize)
    throw error
  }
}

/** The place, where the refcounts say that nothing else is there; else ZEROS, for a damaged image is not written into. */
async function ownPlace({ header, allocator }: StorageHome, place: number): Promise<number> {
  if (place === ZEROS) return ZEROS
  const cluster = place / header.clusterSize
  let isOwn = false
  await allocator.refcounts.withPage(cluster, () => {
    isOwn = allocator.refcounts.get(cluster) === 1
  })
  return isOwn ? place : ZEROS
}

async function allocateOne(allocator: Allocator): Promise<number> {
  for (;;) {
    const cluster = allocator.allocate(1)
    if (cluster >= 0) return cluster
    await allocator.prepare()
  }
}
