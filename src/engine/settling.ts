// Disks whose authority is elsewhere, or not known, when the daemon starts or an operator asks: those that were handed over are asked about,
// those that moved are passed on, and what `varve migrate DISK --settle` does on either side. Who may write when is in
// docs/internals/migration.md.

import { Mutex } from '../base/mutex.ts'
import { BlockError } from '../block/error.ts'
import { Chain } from '../chain/chain.ts'
import { Disk } from '../chain/disk.ts'
import { authorityOf, migrationNote } from './authority.ts'
import type { DiskRecord, JobRecord } from './catalog.ts'
import { type EngineContext, findAny, type ManagedDisk } from './context.ts'
import { makeLogAnew, openManagedDisk, serveManaged } from './disk-opener.ts'
import { ForwardLayer } from './forward-layer.ts'
import { askOnce, askWhoHasIt, forwardOptions, neverTaken } from './hand-over.ts'
import type { Incoming } from './incoming.ts'
import { JobTable } from './job-table.ts'
import { launchMigration } from './migrations.ts'

/** Opens a disk that moved and is passed on. Its bitmaps are the target's affair now. */
export async function openForwarded(context: EngineContext, record: DiskRecord): Promise<ManagedDisk> {
  const { name, away } = record
  if (away?.state !== 'moved' || !away.forward) throw new BlockError('busy', migrationNote(record) ?? '')
  const layer = new ForwardLayer(forwardOptions(context, name, away))
  const log = await makeLogAnew(context, record, away.size)
  try {
    const disk = new Disk(name, new Chain(name, [layer]), log)
    const serving = await serveManaged(context, disk, record)
    return { disk, ...serving, exports: new Map(), control: new Mutex(), moment: new Mutex(), record }
  } catch (error) {
    await layer.close()
    await log.abandon()
    throw error
  }
}

/** Lets a migration go on that a restart found: its copying, or its question who has the disk. */
export function resumeMigration(context: EngineContext, row: JobRecord): void {
  const { spec } = row
  if (spec.kind !== 'migrate') return
  const record = context.catalog.list('disk').find(({ name }) => name === spec.disk)
  if (record?.away === undefined) launchMigration(context, findAny(context, spec.disk), row)
  else launchSettling(context, record, row)
}

function launchSettling(context: EngineContext, record: DiskRecord, row: JobRecord): void {
  const { away, ...here } = record
  if (away === undefined) return
  const job = JobTable.jobOf(row, { target: away.to })
  context.jobs.launch(job, { ...row, paused: false }, async () => {
    job.move('finalizing')
    const isTaken = await askWhoHasIt(context, job, away)
    const next: DiskRecord = isTaken ? { ...here, away: { ...away, state: 'moved' } } : here
    await context.catalog.commit([
      { put: 'disk', record: next },
      { remove: 'job', id: row.id },
    ])
    await reopen(context, next)
    if (!isTaken) throw neverTaken(away)
    job.describe({ holds: away.forward ? 'the disk; its guests are passed on' : 'the disk' })
  })
}

/** Opens a disk that was not open, as its record says now; what keeps it from that is its state. */
async function reopen(context: EngineContext, record: DiskRecord): Promise<void> {
  const { name } = record
  try {
    const open = record.away === undefined ? openManagedDisk : openForwarded
    context.disks.set(name, await open(context, record))
    context.failed.delete(name)
  } catch (error) {
    const failure = error instanceof BlockError ? error : new BlockError('io', (error as Error).message, {}, error)
    context.failed.set(name, { record, error: failure })
  }
}

/**
 * Ends whatever a migration left of a disk, by asking the other side; with `force` without its word. Kinds 'invalid-argument' when there is
 * nothing to end, 'busy' when only the other side, or force, can end it; else why the other side does not answer.
 */
export async function settleDisk(
  context: EngineContext,
  incoming: Incoming,
  name: string,
  force: boolean,
): Promise<void> {
  const record = context.disks.get(name)?.record ?? context.failed.get(name)?.record
  if (record === undefined) throw findAnyError(context, name)
  const authority = authorityOf(record)
  switch (authority.state) {
    case 'here':
      return settleHere(context, incoming, record, force)
    case 'moved':
      throw new BlockError('invalid-argument', `disk ${name}: ${migrationNote(record)}: there is nothing to settle`)
    case 'handed-over': {
      const job = context.jobs.find(({ spec }) => spec.kind === 'migrate' && spec.disk === name)
      if (job === undefined) throw new BlockError('busy', `disk ${name} is about to be settled: ask again`)
      if (force) context.takenBack.add(authority.mark.token)
      else await askOnce(context, authority.mark)
      job.nudge()
      await context.jobs.ended(job.id)
      return
    }
    case 'incoming':
      if (!authority.mark.sealed || !force) throw new BlockError('busy', `disk ${name}: ${migrationNote(record)}`)
      return incoming.take(findAny(context, name))
  }
}

/** A job that waits goes on; and a disk that arrived forgets where it came from, when that host is given up for lost. */
async function settleHere(
  context: EngineContext,
  incoming: Incoming,
  record: DiskRecord,
  force: boolean,
): Promise<void> {
  const { name } = record
  const job = context.jobs.find(({ spec }) => spec.kind === 'migrate' && spec.disk === name)
  if (job !== undefined) {
    if (job.state === 'paused' || job.state === 'standby') await context.jobs.say(job.id, 'resume')
    return
  }
  if (record.arrival === undefined)
    throw new BlockError('invalid-argument', `disk ${name} is here, and no migration of it is under way`)
  if (!force) throw new BlockError('busy', `disk ${name}: ${migrationNote(record)}; with --force it ends here`)
  await incoming.release(findAny(context, name))
}

function findAnyError(context: EngineContext, name: string): unknown {
  try {
    findAny(context, name)
  } catch (error) {
    return error
  }
  return new BlockError('not-found', `there is no disk ${name}`)
}
