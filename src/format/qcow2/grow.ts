// Makes the disk of a qcow2 image larger. What is added reads as zeros, whatever the backing file holds there. A crash at
// any point leaves the old size or the new one.

import { setUint32, setUint64 } from '../../base/bytes.ts'
import { QCOW2_L1_MAX } from '../../base/limits.ts'
import { divideUp, roundUp } from '../../base/round.ts'
import type { BlockDevice } from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Allocator } from './allocator.ts'
import type { DataFile } from './data-file.ts'
import { type Header, l1EntriesFor } from './header.ts'
import * as spec from './spec.ts'
import type { Tables } from './tables.ts'
import type { Writer } from './writer.ts'

export interface Growing {
  readonly file: HostFile
  readonly header: Header
  readonly tables: Tables
  readonly allocator: Allocator
  readonly writer: Writer
  readonly backing: BlockDevice | undefined
  readonly dataFile: DataFile | undefined
}

/** Grows to `size` bytes. Kind 'invalid-argument' for a smaller size, or one that needs larger clusters. */
export async function growImage(size: number, image: Growing): Promise<void> {
  const { file, header, writer } = image
  const invalid = (why: string): BlockError =>
    new BlockError('invalid-argument', `${file.path} cannot grow to ${size} bytes: ${why}`, { path: file.path })
  if (!Number.isSafeInteger(size) || size < header.size) throw invalid(`it has ${header.size} bytes`)
  const l1Size = l1EntriesFor(size, header.clusterSize, header.l2EntrySize)
  if (l1Size * spec.ENTRY_SIZE > QCOW2_L1_MAX)
    throw invalid(`its clusters of ${header.clusterSize} bytes are too small`)
  if (image.dataFile !== undefined) await growDataFile(size, image.dataFile, header)
  if (l1Size > header.l1Size) await writer.withTables(() => moveL1(l1Size, image))

  // The rest of the last cluster may hold anything, and below the new area there may be a longer backing file.
  const isBackingUnknown = image.backing === undefined && header.backing !== undefined
  const shownEnd = Math.max(roundUp(header.size, header.clusterSize), image.backing?.size ?? 0)
  const zeroEnd = Math.min(size, isBackingUnknown ? size : shownEnd)
  if (zeroEnd > header.size) await writer.zero(header.size, zeroEnd - header.size, true)
  await writer.flushAll()
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

async function moveL1(l1Size: number, { file, header, tables, allocator }: Growing): Promise<void> {
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
