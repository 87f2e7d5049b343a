// Backup: copies a point in time of one or more disks into a repository while the guests write. The moment is already taken
// when this runs: each disk comes as a view with the granules that it needs. What is copied is released from the view at
// once, so that scratch stays small. Which bits are kept or returned afterwards is the engine's.

import type { Bitmap } from '../bitmap/bitmap.ts'
import type { Pending } from '../block/device.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import type { BackupInfo, BackupWriter, DiskWriter } from '../repository/repository.ts'
import { Copier, type CopySource } from './copier.ts'
import type { Job } from './job.ts'
import { mend } from './mend.ts'
import { allocatedGranules } from './restore.ts'

/** A disk as it was at the moment, in this thread or in another one. */
export interface BackupView extends CopySource {
  /** Bytes. */
  readonly size: number
  /** Bytes that were saved for it in all, and the most that scratch held at one time. */
  readonly savedBytes: number
  readonly scratchPeak: number
  /** Why it can be read no longer; never set where that is not known here. */
  readonly broken?: BlockError | undefined
  /** Only these granules are read after all. */
  restrict(needed: Bitmap): void
  /** The backup has the range: it is not read again. */
  release(offset: number, length: number): void
  /** Puts what the disk had at the moment on stable storage. */
  flushDisk(): Pending
  close(): Promise<void>
}

export interface BackupDisk {
  readonly name: string
  readonly view: BackupView
  /** The granules that changed since the parent; undefined for a full, which finds what is allocated by itself. */
  readonly changed: Bitmap | undefined
}

export interface BackupResult {
  readonly info: BackupInfo
  readonly readBytes: number
}

/** Copies all disks and makes the backup visible. On failure the writer is aborted and nothing is visible. */
export async function runBackup(job: Job, disks: readonly BackupDisk[], writer: BackupWriter): Promise<BackupResult> {
  try {
    const todos: Bitmap[] = []
    for (const disk of disks) {
      const todo = disk.changed?.copy() ?? (await allocatedGranules(disk.view))
      disk.view.restrict(todo)
      todos.push(todo)
    }
    const left = (): number => todos.reduce((sum, todo) => sum + todo.bytes, 0)
    job.expect(left())
    let readBytes = 0
    for (const [index, disk] of disks.entries()) {
      readBytes += await copyDisk(job, disk, todos[index] as Bitmap, writer.disk(index), left)
    }
    // All of it but what makes it visible: whatever the store has no room for is met while the job can still wait for it.
    await writer.store()
    while (!(await job.mayTakeEffect())) continue
    await job.pausePoint(0)
    job.move('finalizing')
    // A visible backup ends the marks of what it holds. Were a write that it holds still to be lost with the power, the disk
    // would differ from it without a mark: so what the disk had at the moment is on stable storage first.
    for (const disk of disks) {
      const flushed = disk.view.flushDisk()
      if (flushed !== undefined) await flushed
    }
    return { info: await writer.finish(), readBytes }
  } catch (error) {
    await writer.abort()
    throw error
  }
}

/** Copies one disk; `left` says what is to do of all. Returns the bytes read. */
async function copyDisk(
  job: Job,
  disk: BackupDisk,
  todo: Bitmap,
  sink: DiskWriter,
  left: () => number,
): Promise<number> {
  const copier = new Copier({
    job,
    source: mendedSource(job, disk.view),
    target: {
      write: (offset, length, from, at) => sink.write(offset, length, from, at),
      zero: (offset, length) => sink.zero(offset, length),
    },
    todo,
    copied: (offset, length) => {
      disk.view.release(offset, length)
      job.advance(length, left())
      job.describe({ scratchPeak: disk.view.scratchPeak, scratchSaved: disk.view.savedBytes })
      return undefined
    },
  })
  await copier.pass()
  // Nothing re-marks a backup's to-do set: one pass is all, and what it left would be missing from the backup.
  if (todo.count !== 0) throw new BlockError('io', `${disk.name}: ${todo.bytes} bytes were not copied`)
  return copier.readBytes
}

/**
 * The view, of which a range that cannot be read is read again when the job's policy says so: what is stored has to come in order, so
 * nothing goes past it. Scratch that is used up is the end of a view, which no room mends.
 */
function mendedSource(job: Job, view: BackupView): CopySource {
  return {
    read: async (offset, length, into, at) => {
      for (;;) {
        try {
          return await view.read(offset, length, into, at)
        } catch (error) {
          if (isBlockError(error, 'no-space')) throw error
          await mend(job, error)
        }
      }
    },
    extents: (offset, length, visit) => view.extents(offset, length, visit),
  }
}
