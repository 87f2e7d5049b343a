// Backup: copies a point in time of one or more disks into a repository while the guests write. The moment is already taken
// when this runs: each disk comes as a view with the granules that it needs. What is copied is released from the view at
// once, so that scratch stays small. Which bits are kept or returned afterwards is the engine's.

import type { Bitmap } from '../bitmap/bitmap.ts'
import type { Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { BackupInfo, BackupWriter } from '../repository/repository.ts'
import { Copier, type CopySource } from './copier.ts'
import type { Job } from './job.ts'
import { allocatedGranules } from './restore.ts'

/** A disk as it was at the moment, in this thread or in another one. */
export interface BackupView extends CopySource {
  /** Bytes. */
  readonly size: number
  /** Bytes that were saved for it in all, and the most that scratch held at one time. */
  readonly savedBytes: number
  readonly scratchPeak: number
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
    const total = todos.reduce((sum, todo) => sum + todo.bytes, 0)
    job.setProgress(0, total)
    let readBytes = 0
    for (const [index, disk] of disks.entries()) {
      const before = todos.slice(index + 1).reduce((sum, todo) => sum + todo.bytes, 0)
      readBytes += await copyDisk(job, disk, todos[index] as Bitmap, writer, index, total - before)
    }
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

/** `soFar` is the progress when this disk is done. */
async function copyDisk(
  job: Job,
  disk: BackupDisk,
  todo: Bitmap,
  writer: BackupWriter,
  index: number,
  soFar: number,
): Promise<number> {
  const sink = writer.disk(index)
  const copier = new Copier({
    job,
    source: disk.view,
    target: {
      write: (offset, length, from, at) => sink.write(offset, length, from, at),
      zero: (offset, length) => sink.zero(offset, length),
    },
    todo,
    copied: (offset, length) => {
      disk.view.release(offset, length)
      job.setProgress(soFar - todo.bytes, job.status.total)
      job.describe({ scratchPeak: disk.view.scratchPeak, scratchSaved: disk.view.savedBytes })
      return undefined
    },
  })
  await copier.pass()
  // Nothing re-marks a backup's to-do set: one pass is all, and what it left would be missing from the backup.
  if (todo.count !== 0) throw new BlockError('io', `${disk.name}: ${todo.bytes} bytes were not copied`)
  return copier.readBytes
}
