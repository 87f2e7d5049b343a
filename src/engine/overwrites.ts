// Restores onto a disk that is there: it becomes what it was in a backup, of which only what differs is read and written. Nobody may use the
// disk meanwhile, so its export is withdrawn, and it is served again when all of it is right. What it was stays as a snapshot unless that is not
// wanted: then a restore that is cancelled goes back to it, and one without it leaves the disk withdrawn until another restore is whole.
//
//   withdraw -> snapshot -> { overwriting, job } in the catalog -> compare and write -> bitmaps -> { neither } in the catalog -> serve
//
// What may differ is told by the disk's bitmap and the maps of two backups, without reading data, wherever the bitmap counts from a backup that
// is still there; else all of it is compared. A crash anywhere goes on: what is copied twice is the same.

import { GRANULE, RESTORE_LANES } from '../base/limits.ts'
import type { Bitmap } from '../bitmap/bitmap.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { DifferingFilter } from '../filter/differing.ts'
import { PaddedFilter } from '../filter/padded.ts'
import { copyFrozen } from '../job/frozen-copy.ts'
import type { Job } from '../job/job.ts'
import { whileMendable } from '../job/mend.ts'
import type { JobTerms } from '../job/terms.ts'
import { countedFrom, countingFrom } from './backup-party.ts'
import type { DiskRecord, JobRecord, OverwritingMark } from './catalog.ts'
import { todoName } from './commits.ts'
import { refuseConflict } from './conflicts.ts'
import type { EngineContext, ManagedDisk } from './context.ts'
import { serveManaged } from './disk-opener.ts'
import { type HeldBackup, letGoOf, openHeld } from './held-backup.ts'
import { JobTable } from './job-table.ts'
import { revertTo } from './reverts.ts'
import { LocalSnapshotParty, snapshotTogether } from './snapshot-party.ts'

export interface OverwriteRequest extends JobTerms {
  readonly repository: string
  readonly backup: string
  /** Which disk of the backup; the only one unless told. */
  readonly disk?: string | undefined
  /** The snapshot that the present state becomes; without it that is lost. */
  readonly keep?: string | undefined
}

/** Withdraws the disk and begins to restore it, as a job. Kinds 'busy', 'exists' for the snapshot, 'invalid-argument' for a backup that is larger. */
export async function startOverwrite(
  context: EngineContext,
  managed: ManagedDisk,
  request: OverwriteRequest,
): Promise<Job> {
  const { repository, backup } = request
  const { name, overwriting: before } = managed.record
  // What an earlier restore has left half done is nothing to keep.
  const keep = before === undefined ? request.keep : undefined
  refuseConflict(context, name, 'restore onto')
  const row = JobTable.newRow({ kind: 'overwrite', disk: name }, request)
  const held = await openHeld(context, request)
  const mark: OverwritingMark = { repository, backup, disk: held.disk, size: held.size, hold: held.hold, keep }
  try {
    if (held.size > managed.disk.size) {
      const message = `disk ${name} has ${managed.disk.size} bytes, and ${held.size} in ${backup}: varve disk resize makes it larger`
      throw new BlockError('invalid-argument', message, { device: name })
    }
    const served = managed.served
    managed.served = undefined
    await served?.close()
    if (keep !== undefined) {
      const party = new LocalSnapshotParty(context, managed)
      await snapshotTogether([party], keep, (changes) => context.catalog.commit(changes))
    }
    return await managed.control.run(async () => {
      refuseConflict(context, name, 'restore onto')
      const next: DiskRecord = { ...managed.record, overwriting: mark }
      await context.catalog.commit([
        { put: 'disk', record: next },
        { put: 'job', record: row },
      ])
      managed.record = next
      if (before !== undefined) await letGoOf(context, before)
      return launchOverwrite(context, managed, row)
    })
  } catch (error) {
    await serveAgain(context, managed)
    await letGoOf(context, mark)
    throw error
  } finally {
    await held.close()
  }
}

/** Runs one whose row is in the catalog: a new one, or one that a restart found. */
export function launchOverwrite(context: EngineContext, managed: ManagedDisk, row: JobRecord): Job {
  const { overwriting } = managed.record
  const job = JobTable.jobOf(row, { backup: overwriting?.backup, disk: overwriting?.disk, snapshot: overwriting?.keep })
  context.jobs.launch(job, row, () => work(context, managed, row, job))
  return job
}

async function work(context: EngineContext, managed: ManagedDisk, row: JobRecord, job: Job): Promise<void> {
  const { overwriting: mark } = managed.record
  if (mark === undefined) return job.move('finalizing')
  const { disk } = managed
  const bitmap = todoName(row.id)
  try {
    const repositoryId = await whileMendable(job, () => copy(context, managed, mark, job, bitmap))
    while (!(await job.mayTakeEffect())) continue
    job.move('finalizing')
    await countAnew(managed, mark, repositoryId, bitmap)
    await takeMarkOff(context, managed, row)
  } catch (error) {
    if (job.suspended) throw error
    if (disk.log.bitmaps.has(bitmap)) await disk.log.edit([{ kind: 'remove', name: bitmap }])
    // Without what it was, the disk stays withdrawn: it is neither that nor the backup.
    if (mark.keep !== undefined) {
      await revertTo(context, managed, mark.keep)
      await takeMarkOff(context, managed, row)
      await serveAgain(context, managed)
      await letGoOf(context, mark)
    }
    throw error
  }
  await serveAgain(context, managed)
  await letGoOf(context, mark)
}

/** Makes the disk what the backup shows, flushed; returns the repository's identity. */
async function copy(
  context: EngineContext,
  managed: ManagedDisk,
  mark: OverwritingMark,
  job: Job,
  bitmap: string,
): Promise<string> {
  const { disk } = managed
  const held = await openHeld(context, mark)
  try {
    const target = new DifferingFilter(disk)
    const source = held.besides(disk)
    try {
      await copyFrozen({
        job,
        disk,
        bitmap,
        view: new PaddedFilter(source, disk.size),
        target,
        lanes: RESTORE_LANES,
        pace: context.mirrorPace,
        scan: async (todo) => job.describe({ reason: await findDifferences(held, managed, mark, todo) }),
      })
    } finally {
      const { comparedBytes, changedBytes } = target
      job.describe({ comparedBytes, fetchedBytes: source.fetchedBytes, changedBytes })
    }
    return held.repositoryId
  } finally {
    await held.close()
  }
}

/** Sets what may differ; returns how that is known. */
async function findDifferences(
  held: HeldBackup,
  { disk }: ManagedDisk,
  { backup, disk: name }: OverwritingMark,
  todo: Bitmap,
): Promise<string> {
  const counted = countedFrom(disk, `backup:${held.repositoryId}`)
  if (counted === undefined) {
    todo.setAll()
    return 'all of it is compared: what changed since a backup is not known'
  }
  const { last, bits } = counted
  try {
    if (last.backup !== backup || last.disk !== name) {
      await held.differences(last, (offset, length) => todo.set(offset, Math.min(length, disk.size - offset)))
    }
    const granules = bits.inGranules(GRANULE)
    granules.runs(0, disk.size, disk.size, (offset, length) => {
      todo.set(offset, Math.min(length, disk.size - offset))
      return true
    })
    return last.backup === backup
      ? `what changed since ${backup}`
      : `what changed since ${last.backup}, and what changed between that and ${backup}`
  } catch (error) {
    if (!isBlockError(error)) throw error
    todo.setAll()
    return `all of it is compared: ${error.message}`
  }
}

/** From now on the bitmap counts from this backup: the disk is what it was then, also past its end. The to-do set goes. */
async function countAnew(
  { disk }: ManagedDisk,
  { backup, disk: name }: OverwritingMark,
  repositoryId: string,
  todo: string,
): Promise<void> {
  const bitmap = `backup:${repositoryId}`
  const before = disk.log.bitmaps.get(bitmap)
  await disk.log.edit([
    { kind: 'remove', name: todo },
    ...(before === undefined ? [] : [{ kind: 'remove' as const, name: bitmap }]),
    {
      kind: 'add',
      name: bitmap,
      granule: before?.bits.granule ?? GRANULE,
      recording: true,
      fill: 'none',
      meta: countingFrom(backup, name),
    },
  ])
}

async function takeMarkOff(context: EngineContext, managed: ManagedDisk, row: JobRecord): Promise<void> {
  const { overwriting: _over, ...next } = managed.record
  await context.catalog.commit([
    { put: 'disk', record: next },
    { remove: 'job', id: row.id },
  ])
  managed.record = next
}

async function serveAgain(context: EngineContext, managed: ManagedDisk): Promise<void> {
  if (managed.served !== undefined || managed.record.overwriting !== undefined) return
  managed.served = (await serveManaged(context, managed.disk, managed.record)).served
}
