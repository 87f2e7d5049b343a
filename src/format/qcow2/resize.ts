// Makes the disk of a qcow2 image larger or smaller. What is added reads as zeros, whatever the backing file holds there. A crash at
// any point leaves the old size or the new one; while the disk shrinks, what is past its new end may be gone already.

import { setUint32, setUint64 } from '../../base/bytes.ts'
import { QCOW2_L1_MAX } from '../../base/limits.ts'
import { divideUp, roundUp } from '../../base/round.ts'
import type { BlockDevice } from '../../block/device.ts'
import { BlockError, type ErrorKind } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Allocator } from './allocator.ts'
import type { DataFile } from './data-file.ts'
import { type Header, l1EntriesFor } from './header.ts'
import type { Preallocation } from './preallocate.ts'
import { SharedClusters } from './shared-clusters.ts'
import * as spec from './spec.ts'
import type { Tables } from './tables.ts'
import type { Writer } from './writer.ts'

export interface ResizeOptions {
  /** Allows a smaller disk. */
  readonly shrink?: boolean
  /** Of what is added. */
  readonly preallocation?: Preallocation
}

export interface Resizing {
  readonly file: HostFile
  readonly header: Header
  readonly tables: Tables
  readonly allocator: Allocator
  readonly writer: Writer
  readonly backing: BlockDevice | undefined
  readonly dataFile: DataFile | undefined
}

/** See `Qcow2Image.resize`. */
export async function resizeImage(size: number, image: Resizing, options: ResizeOptions): Promise<void> {
  const { file, header } = image
  const { shrink = false, preallocation = 'off' } = options
  const fail = (kind: ErrorKind, why: string): BlockError =>
    new BlockError(kind, `${file.path} cannot be resized to ${size} bytes: ${why}`, { path: file.path })
  if (!Number.isSafeInteger(size) || size < 0) throw fail('invalid-argument', 'that is no size of a disk')
  if (size < header.size && !shrink) throw fail('invalid-argument', `it has ${header.size} bytes, and would lose some`)
  if (size < header.size && preallocation !== 'off')
    throw fail('invalid-argument', 'only what is added is preallocated')
  // A snapshot of version 2 may not say which size the disk had.
  if (header.version === 2 && header.snapshotCount > 0)
    throw fail(
      'unsupported',
      'it has version 2 and internal snapshots; delete these, or upgrade it with qemu-img amend',
    )
  if (preallocation !== 'off' && header.backing !== undefined && !header.extendedL2)
    throw fail('invalid-argument', 'with a backing file only extended L2 entries can be preallocated')
  if (size < header.size) await shrinkImage(size, image)
  else await growImage(size, image)
}

async function growImage(size: number, image: Resizing): Promise<void> {
  const { file, header, writer } = image
  const l1Size = l1EntriesFor(size, header.clusterSize, header.l2EntrySize)
  if (l1Size * spec.ENTRY_SIZE > QCOW2_L1_MAX) {
    const message = `${file.path} cannot grow to ${size} bytes: its clusters of ${header.clusterSize} bytes are too small`
    throw new BlockError('invalid-argument', message, { path: file.path })
  }
  if (image.dataFile !== undefined) await growDataFile(size, image.dataFile, header)
  if (l1Size > header.l1Size) await writer.withTables(() => moveL1(l1Size, image))

  // The rest of the last cluster may hold anything, and below the new area there may be a longer backing file.
  const isBackingUnknown = image.backing === undefined && header.backing !== undefined
  const shownEnd = Math.max(roundUp(header.size, header.clusterSize), image.backing?.size ?? 0)
  const zeroEnd = Math.min(size, isBackingUnknown ? size : shownEnd)
  if (zeroEnd > header.size) await writer.zero(header.size, zeroEnd - header.size, true)
  await writer.flushAll()
  await writeSize(size, image)
}

/** First what is past the new end goes, so that it never comes back when the disk grows again; then the size. */
async function shrinkImage(size: number, image: Resizing): Promise<void> {
  const { header, tables, writer, dataFile } = image
  const end = roundUp(header.size, header.clusterSize)
  const tablesEnd = roundUp(size, tables.tableReach)
  // Part of a cluster cannot go. QEMU shows it as it is when it makes the disk larger.
  const partEnd = Math.min(roundUp(size, header.clusterSize), header.size)
  if (partEnd > size) await writer.zero(size, partEnd - size, true)
  await writer.drop(roundUp(size, header.clusterSize), Math.min(end, tablesEnd))
  await writer.finish()
  if (tablesEnd < end) await writer.withTables(() => dropTables(tablesEnd / tables.tableReach, image))
  await writeSize(size, image)
  if (dataFile?.isBlockDevice === false) await dataFile.file.truncate(size)
}

/** Empties the L1 table from entry `first` on, durably, and then frees all that it led to. */
async function dropTables(first: number, { file, header, tables, allocator }: Resizing): Promise<void> {
  const dropped = tables.l1.slice(first * spec.ENTRY_SIZE)
  const nothing = new Uint8Array(dropped.length)
  await file.write(header.l1Offset + first * spec.ENTRY_SIZE, nothing.length, nothing, 0)
  await file.sync()
  await tables.open()
  tables.forget()
  await new SharedClusters({ file, header, allocator }, () => undefined).remove(dropped)
}

async function writeSize(size: number, { file, header }: Resizing): Promise<void> {
  const field = new Uint8Array(8)
  setUint64(field, 0, size)
  await file.write(spec.HEADER.size, field.length, field, 0)
  await file.sync()
  header.size = size
}

/** Makes room for the data, and zeros of what an over-long file holds there. Kind 'unsupported' for a device too small. */
async function growDataFile(size: number, { file, isBlockDevice }: DataFile, header: Header): Promise<void> {
  const before = file.size()
  if (isBlockDevice && before < size) {
    const message = `${file.path} is a block device of ${before} bytes; make it larger first`
    throw new BlockError('unsupported', message, { path: file.path })
  }
  if (before > header.size) await file.zero(header.size, Math.min(before, size) - header.size)
  if (before < size) await file.truncate(size)
}

async function moveL1(l1Size: number, { file, header, tables, allocator }: Resizing): Promise<void> {
  const bytes = new Uint8Array(l1Size * spec.ENTRY_SIZE)
  bytes.set(tables.l1)
  const clusters = divideUp(bytes.length, header.clusterSize)
  const first = await allocator.allocateRun(clusters)
  const place = first * header.clusterSize
  try {
    await file.write(place, bytes.length, bytes, 0)
    await file.sync()
  } catch (error) {
    await allocator.freeLater(first, clusters)
    throw error
  }
  const fields = new Uint8Array(12)
  setUint32(fields, 0, l1Size)
  setUint64(fields, 4, place)
  await file.write(spec.HEADER.l1_size, fields.length, fields, 0)
  await file.sync()
  const old = { first: header.l1Offset / header.clusterSize, bytes: header.l1Size * spec.ENTRY_SIZE }
  header.l1Size = l1Size
  header.l1Offset = place
  await tables.open()
  await allocator.freeLater(old.first, divideUp(old.bytes, header.clusterSize))
}
