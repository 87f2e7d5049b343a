// Restore: copies a backup's disk onto a new device that reads as zeros. Only the parts that hold data are read and written,
// so a sparse disk comes back sparse.

import { ZERO, type BlockDevice } from '../block/device.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import { Copier } from './copier.ts'
import type { Job } from './job.ts'

/** Copies all data of `source` to `target`, of the same size or larger, and flushes it. Returns the bytes copied. */
export async function runRestore(job: Job, source: BlockDevice, target: BlockDevice): Promise<number> {
  const todo = await allocatedGranules(source)
  job.expect(todo.bytes)
  const copied = (_offset: number, length: number): undefined => job.advance(length, todo.bytes) as undefined
  const copier = new Copier({ job, source, target, todo, copied, lanes: 2 })
  await copier.pass()
  const flushed = target.flush()
  if (flushed !== undefined) await flushed
  return copier.readBytes
}

/** The granules of a device that do not read as zeros for certain. */
export async function allocatedGranules(device: Pick<BlockDevice, 'size' | 'extents'>): Promise<Bitmap> {
  const bitmap = new Bitmap(device.size)
  for (let start = 0; start < device.size; start += EXTENTS_PIECE) {
    let position = start
    const length = Math.min(EXTENTS_PIECE, device.size - start)
    const pending = device.extents(start, length, (piece, extent) => {
      if ((extent & ZERO) === 0) bitmap.set(position, piece)
      position += piece
      return true
    })
    if (pending !== undefined) await pending
  }
  return bitmap
}

/** How much of a device is asked for its extents at a time, in bytes: some devices collect the answer first. */
const EXTENTS_PIECE = 256 * 1024 * 1024
