// The change of a qcow2 image between read and write access: the claim, the repair of what a crash left, the dirty bit, and what
// makes the image clean again. As long as an image has access 'write', its dirty bit is set: refcounts in the file may be behind,
// and whoever opens it after a crash rebuilds them. Requests are the writer's (writer.ts).

import type { Access } from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import { Allocator } from './allocator.ts'
import type { Bitmaps } from './bitmaps.ts'
import type { Surroundings } from './changes.ts'
import { type DataFile, readyDataFile } from './data-file.ts'
import { type Header, isDirty, isMarkedCorrupt, knownAutoclear, writeFeatures } from './header.ts'
import { recoverRefcounts } from './recover.ts'
import { Refcounts } from './refcounts.ts'
import { SharedSync } from './shared-sync.ts'
import { INCOMPAT_DIRTY } from './spec.ts'
import type { Tables } from './tables.ts'
import { Writer } from './writer.ts'

/** What an image is made of. */
export interface Parts {
  readonly file: HostFile
  readonly isBlockDevice: boolean
  /** Undefined without an external one. */
  readonly dataFile: DataFile | undefined
  readonly header: Header
  readonly tables: Tables
  readonly bitmaps: Bitmaps
}

/** What access 'write' adds to an image. */
export interface Writing {
  readonly allocator: Allocator
  readonly writer: Writer
}

/**
 * Makes an image ready to be written, and repairs it when it was not closed cleanly. Kinds: 'busy', 'permission', 'corrupt'; the
 * image then has access 'read' as before.
 */
export async function beginWriting(parts: Parts, image: Surroundings): Promise<Writing> {
  refuseToWrite(parts)
  claim(parts, 'write')
  try {
    return await begin(parts, image)
  } catch (error) {
    claim(parts, 'read')
    throw error
  }
}

/** Stores what is in memory alone. After a failure the image stays dirty. No request may be in flight. */
export async function storeAll({ file, bitmaps }: Parts, allocator: Allocator): Promise<void> {
  try {
    await bitmaps.store()
    await allocator.finish()
    await file.sync()
  } catch (error) {
    // What reached the file is not known: neither refcounts nor bitmaps may be believed when this is tried again.
    allocator.isDamaged = true
    bitmaps.giveUp()
    throw error
  }
}

/** After `storeAll`: says in the image that all is as it should be. Nothing is written any more. */
export async function markClean({ file, header, bitmaps }: Parts, allocator: Allocator): Promise<void> {
  await bitmaps.release()
  if (!allocator.isDamaged) header.incompatible &= ~INCOMPAT_DIRTY
  await writeFeatures(file, header)
}

/** Changes the claim on the image and on its data file, or on neither. */
export function claim({ file, dataFile }: Parts, access: Access): void {
  file.lock(access)
  try {
    dataFile?.file.lock(access)
  } catch (error) {
    file.lock(access === 'write' ? 'read' : 'write')
    throw error
  }
}

/** The error of whoever would write to an image that is marked corrupt. */
export function markedCorrupt(path: string): BlockError {
  const message = `${path} is marked corrupt and can only be read; repair it with: varve image check -r all ${path}`
  return new BlockError('corrupt', message, { path })
}

async function begin(parts: Parts, image: Surroundings): Promise<Writing> {
  const { file, isBlockDevice, dataFile, header, tables, bitmaps } = parts
  if (dataFile !== undefined) await readyDataFile(dataFile, header)
  const data = dataFile?.file ?? file
  const sync = new SharedSync(data === file ? [file] : [data, file])
  const deviceSize = isBlockDevice ? file.size() : undefined
  const allocator = new Allocator(file, header, new Refcounts(file, header), sync, deviceSize)
  // What stale bitmaps held is free, by a count of all that is still in use.
  const { isStale } = bitmaps
  if (isDirty(header) || isStale) await recoverRefcounts(file, header, tables, allocator)
  await allocator.refcounts.open()
  await allocator.open()
  await bitmaps.begin({ file, header, allocator })
  if (header.version !== 2) header.incompatible |= INCOMPAT_DIRTY
  // What only holds as long as every writer knows it ends with this writer, unless it is known here.
  header.autoclear = knownAutoclear(header)
  await writeFeatures(file, header)
  tables.mayPassEnd = false
  if (isStale) await bitmaps.refound()
  return { allocator, writer: new Writer(file, data, image, tables, allocator) }
}

function refuseToWrite({ file, dataFile, header }: Parts): void {
  const { path } = file
  if (isMarkedCorrupt(header)) throw markedCorrupt(path)
  const fixed = [file, dataFile?.file].find((each) => each?.writable === false)
  if (fixed === undefined) return
  const message = `${fixed.path} may not be written by this user; change its owner, mode or mount`
  throw new BlockError('permission', message, { path })
}
