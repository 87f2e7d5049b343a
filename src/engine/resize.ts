// Growing a disk while its guest runs: the active image, and with it the bitmaps of the disk, for which what is added counts as
// changed. The catalog has the new size before anything is done, so that a crash in between is finished when the disk is opened
// again, and its bitmaps, and with them the next incremental backup, outlive that too.
//
// A client of NBD learns the new size when it connects the next time; see docs/internals/nbd-protocol.md.

import { formatSize } from '../base/size.ts'
import { BlockError } from '../block/error.ts'
import type { Disk } from '../chain/disk.ts'
import type { DirtyLog } from '../dirtylog/dirty-log.ts'
import type { Layer } from '../block/device.ts'
import { DISK_BYTES_MAX } from '../repository/tree.ts'
import type { DiskRecord } from './catalog.ts'
import { refuseConflict } from './conflicts.ts'
import type { EngineContext, ManagedDisk } from './context.ts'

const SECTOR = 512

/**
 * Makes the disk `size` bytes large. Kinds: 'invalid-argument' for a smaller size and one that is no size, 'busy' while a job runs on
 * the disk; what the image cannot or has no space for leaves the disk as it was.
 */
export function resizeDisk(context: EngineContext, managed: ManagedDisk, size: number): Promise<void> {
  return managed.control.run(async () => {
    const { disk } = managed
    checkSize(disk, size)
    if (size === disk.size) return
    refuseConflict(context, disk.name, 'resize')
    // No backup takes its moment meanwhile.
    await managed.moment.run(() => grow(context, managed, size))
  })
}

/** Finishes what a crash left of a resize: the record without its mark. The active layer is open for writing. */
export async function finishResize(
  context: EngineContext,
  record: DiskRecord,
  active: Layer,
  log: DirtyLog,
): Promise<DiskRecord> {
  const { growTo, ...grown } = record
  if (growTo === undefined) return record
  if (active.size < growTo) await active.grow(growTo)
  if (log.size < growTo) await log.resize(growTo)
  await context.catalog.commit([{ put: 'disk', record: grown }])
  context.report(`${record.name}: finished a resize to ${formatSize(growTo)}`)
  return grown
}

async function grow(context: EngineContext, managed: ManagedDisk, size: number): Promise<void> {
  const { disk, record } = managed
  if (disk.intercepted) throw new BlockError('busy', `resize has to wait: a job is at work on disk ${disk.name}`)
  await save(context, managed, { ...record, growTo: size })
  await disk.drain()
  try {
    const { chain, log } = disk
    try {
      await chain.active.grow(size)
    } catch (error) {
      await save(context, managed, record)
      throw error
    }
    // If it cannot be made durable now it holds in memory, and the record keeps its mark.
    await log.resize(size)
    chain.replaceLayers(chain.layers)
  } finally {
    disk.undrain()
  }
  await save(context, managed, record)
}

async function save(context: EngineContext, managed: ManagedDisk, record: DiskRecord): Promise<void> {
  await context.catalog.commit([{ put: 'disk', record }])
  managed.record = record
}

function checkSize(disk: Disk, size: number): void {
  const refuse = (why: string): never => {
    throw new BlockError('invalid-argument', `disk ${disk.name} cannot be resized to ${size} bytes: ${why}`)
  }
  if (size < disk.size) {
    const lost = `the last ${formatSize(disk.size - size)} of its ${formatSize(disk.size)} would be lost`
    const instead = 'remove the disk, make its image smaller with varve image resize --shrink, and add it again'
    refuse(`${lost}. To lose them: ${instead}`)
  }
  if (!Number.isSafeInteger(size) || size % SECTOR !== 0) refuse(`a disk is a multiple of ${SECTOR} bytes`)
  if (size > DISK_BYTES_MAX) refuse(`a disk has at most ${formatSize(DISK_BYTES_MAX)}`)
}
