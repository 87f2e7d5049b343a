// Live backups: full or incremental and why, the moment, and what becomes of the bits. The copying is job/backup.ts.
//
// Each disk has one recording bitmap per repository, which says what changed since the last backup there. At the moment,
// under a drain of all disks of the backup:
//
//   backup:R  ##.#..        ->  backup:R:captured  ##.#..   (what this backup copies)
//                               backup:R           ......   (records what changes from now on)
//
// When the backup is durable the captured bits are dropped; if it fails they are put back. A crash in between is settled when
// the daemon opens: by whether the backup became visible in the repository.

import path from 'node:path'
import { Bitmap } from '../bitmap/bitmap.ts'
import { BlockError } from '../block/error.ts'
import type { Disk } from '../chain/disk.ts'
import { PointInTime } from '../chain/point-in-time.ts'
import { Scratch, ScratchBudget } from '../chain/scratch.ts'
import type { BitmapChange } from '../dirtylog/dirty-log.ts'
import { GRANULE } from '../base/limits.ts'
import { type BackupDisk, type BackupResult, runBackup } from '../job/backup.ts'
import { Job } from '../job/job.ts'
import type { BackupInfo, BackupWriter, Repository } from '../repository/repository.ts'
import type { BackupSpec, DiskRecord, JobRecord } from './catalog.ts'
import { type EngineContext, findDisk, type ManagedDisk } from './context.ts'
import { JobTable } from './job-table.ts'

export interface BackupRequest {
  readonly disks: readonly string[]
  readonly repository: string
  readonly full: boolean
  readonly speed: number
}

/** How one disk is backed up, and why not by its changes alone. */
interface DiskPlan {
  readonly managed: ManagedDisk
  readonly bitmap: string
  /** The backup that the bitmap's bits are relative to; undefined for a full. */
  readonly parent: string | undefined
  readonly reason: string
}

/** Meta of the recording bitmap: the backup it counts from, or the one being written that it will count from. */
interface RecordingMeta {
  readonly last?: string | undefined
  readonly pending?: string | undefined
}

/** Takes the moment and begins to copy, as a job. Resolves when the moment is taken. */
export async function startBackup(context: EngineContext, request: BackupRequest): Promise<Job> {
  const { disks, repository, full, speed } = request
  for (const name of disks) findDisk(context, name)
  if (disks.length === 0) throw new BlockError('invalid-argument', 'a backup needs at least one disk')
  if (new Set(disks).size < disks.length) throw new BlockError('invalid-argument', 'a backup has each disk once')
  const row: JobRecord = {
    id: JobTable.newId('backup'),
    spec: { kind: 'backup', disks, repository, full, speed },
    total: 0,
    paused: false,
    startedMs: Date.now(),
  }
  const { job, taken } = launchBackup(context, row, await context.openRepository(repository))
  await taken
  if (job.error !== undefined) throw job.error
  if (job.state === 'created') context.jobs.checkRunning()
  return job
}

/**
 * Backups that a restart found. One that had become visible is settled as done; the others' bits come back and each is
 * begun again with a new moment, behind the queue: this resolves when all are settled, not when they are done.
 */
export async function resumeBackups(context: EngineContext, rows: readonly JobRecord[]): Promise<void> {
  const again: { readonly row: JobRecord; readonly repository: Repository }[] = []
  const done: JobRecord[] = []
  for (const row of rows) {
    const spec = row.spec as BackupSpec
    try {
      const repository = await context.openRepository(spec.repository)
      const visible = (await repository.backups()).some(({ id }) => id === row.backup)
      if (visible) {
        done.push(row)
        await repository.close()
      } else again.push({ row, repository })
    } catch (error) {
      // Not silently: the history has it as a failed job.
      context.jobs.launch(newJob(row, {}), row, () => Promise.reject(error))
    }
  }
  await settleAll(context, new Set(done.map(({ backup }) => backup)))
  for (const row of done) {
    const job = newJob(row, { backup: row.backup })
    context.jobs.launch(job, row, async () => job.move('finalizing'))
  }
  for (const { row, repository } of again) launchBackup(context, row, repository)
}

/** Puts captured bits back wherever a crash left some; those of a backup that is whole and visible are dropped. */
async function settleAll(context: EngineContext, visible: ReadonlySet<string | undefined>): Promise<void> {
  for (const { disk } of context.disks.values()) {
    for (const [name, bitmap] of disk.log.bitmaps) {
      if (!name.startsWith('backup:') || isCaptured(name)) continue
      const { pending } = JSON.parse(bitmap.meta) as RecordingMeta
      if (pending === undefined) continue
      await disk.log.edit(visible.has(pending) ? keepChanges(disk, name, pending) : returnChanges(disk, name))
    }
  }
}

/**
 * A job in the table at once, which waits for its turn, takes the moment and copies. `taken` resolves when the moment is taken,
 * or the job ended before.
 */
function launchBackup(
  context: EngineContext,
  row: JobRecord,
  repository: Repository,
): { readonly job: Job; readonly taken: Promise<unknown> } {
  const spec = row.spec as BackupSpec
  const job = newJob(row, { repository: path.basename(spec.repository) })
  const moment = Promise.withResolvers<void>()
  const whole = async (): Promise<void> => {
    const running = await begin(context, job, row, repository)
    moment.resolve()
    await work(job, running)
  }
  context.jobs.launch(job, row, whole, context.backupQueue)
  const ended = context.jobs.ended(job.id)
  ended
    .then(() => repository.close())
    .catch((error: unknown) => context.report(`${job.id}: closing the repository: ${(error as Error).message}`))
  return { job, taken: Promise.race([moment.promise, ended]) }
}

async function begin(context: EngineContext, job: Job, row: JobRecord, repository: Repository): Promise<Running> {
  const spec = row.spec as BackupSpec
  const plans = await makePlans(context, spec, repository)
  const writer = await repository.begin({
    machine: spec.disks.join('+'),
    moment: Date.now(),
    kind: plans.every((plan) => plan.parent !== undefined) ? 'incremental' : 'full',
    disks: plans.map(({ managed, parent }) => ({
      name: managed.record.name,
      size: managed.disk.size,
      ...(parent === undefined ? {} : { parent: { backup: parent, disk: managed.record.name } }),
    })),
  })
  context.catalog.commit([
    { put: 'job', record: { ...(context.catalog.get('job', row.id) ?? row), backup: writer.id } },
  ])
  const { disks, durable } = await takeMoment(context, plans, writer)
  job.describe({
    backup: writer.id,
    disks: plans.map((plan) => ({ name: plan.managed.record.name, kind: kindOf(plan), reason: plan.reason })),
  })
  return { plans, disks, durable, writer }
}

function newJob(row: JobRecord, details: Record<string, unknown>): Job {
  const spec = row.spec as BackupSpec
  return new Job({ id: row.id, kind: 'backup', subject: spec.disks.join('+'), speed: spec.speed, details })
}

function kindOf(plan: DiskPlan): 'full' | 'incremental' {
  return plan.parent === undefined ? 'full' : 'incremental'
}

/** A backup whose moment is taken. */
interface Running {
  readonly plans: readonly DiskPlan[]
  readonly disks: readonly BackupDisk[]
  /** Resolves when the swapped bitmaps are durable. */
  readonly durable: Promise<unknown>
  readonly writer: BackupWriter
}

async function work(job: Job, running: Running): Promise<void> {
  const { plans, disks, durable, writer } = running
  let result: BackupResult | undefined
  try {
    await durable
    result = await runBackup(job, disks, writer)
    job.describe({ readBytes: result.readBytes, storedBytes: result.info.storedBytes })
  } finally {
    for (const { view } of disks) await view.close()
    // A suspended job's bits are settled when the daemon opens again, as after a crash.
    if (!job.suspended || result !== undefined) {
      for (const { managed, bitmap } of plans) {
        const { disk } = managed
        await disk.log.edit(result === undefined ? returnChanges(disk, bitmap) : keepChanges(disk, bitmap, writer.id))
      }
    }
  }
}

/** Incremental whenever it can be; else a full, with the reason. */
async function makePlans(context: EngineContext, spec: BackupSpec, repository: Repository): Promise<DiskPlan[]> {
  const backups = new Map((await repository.backups()).map((info) => [info.id, info]))
  return spec.disks.map((name) => {
    const managed = findDisk(context, name)
    const bitmap = `backup:${repository.id}`
    const { parent, reason } = findParent(managed, bitmap, backups, spec.full)
    return { managed, bitmap, parent, reason }
  })
}

function findParent(
  { disk, record }: ManagedDisk,
  name: string,
  backups: ReadonlyMap<string, BackupInfo>,
  full: boolean,
): { parent: string | undefined; reason: string } {
  const no = (reason: string): { parent: undefined; reason: string } => ({ parent: undefined, reason })
  if (full) return no('asked for')
  const bitmap = disk.log.bitmaps.get(name)
  if (bitmap === undefined) return no(whyNoBitmap(record, backups))
  if (bitmap.state === 'void') return no('its bitmap is void')
  const { last } = JSON.parse(bitmap.meta) as RecordingMeta
  if (last === undefined) return no('the earlier backup was not finished')
  const info = backups.get(last)
  if (info === undefined) return no(`the earlier backup ${last} is no longer in the repository`)
  const before = info.disks.find((other) => other.name === disk.name)
  if (before?.size !== disk.size) return no(`the disk's size changed since ${last}`)
  return { parent: last, reason: `changes since ${last}` }
}

function whyNoBitmap({ name, bitmapsLost }: DiskRecord, backups: ReadonlyMap<string, BackupInfo>): string {
  const isOlder = (info: BackupInfo, atMs: number): boolean =>
    info.moment < atMs && info.disks.some((disk) => disk.name === name)
  if (bitmapsLost !== undefined && [...backups.values()].some((info) => isOlder(info, bitmapsLost.atMs)))
    return bitmapsLost.reason
  return 'no earlier backup of this disk in this repository is known'
}

/** Drains all disks, freezes a view of each and swaps its bitmaps, and lets the guests go on. */
async function takeMoment(
  context: EngineContext,
  plans: readonly DiskPlan[],
  writer: BackupWriter,
): Promise<{ disks: BackupDisk[]; durable: Promise<unknown> }> {
  const scratches: Scratch[] = []
  for (const { managed } of plans) scratches.push(await makeScratch(context, managed))
  const drained: Disk[] = []
  const views: PointInTime[] = []
  const edits: Promise<void>[] = []
  try {
    for (const { managed } of plans) {
      await managed.disk.drain()
      drained.push(managed.disk)
    }
    const disks = plans.map((plan, index) => {
      const { disk } = plan.managed
      const changed = plan.parent === undefined ? undefined : capturedBits(disk, plan.bitmap)
      const needed = changed?.copy() ?? everything(disk)
      const view = new PointInTime(disk, scratches[index] as Scratch, needed)
      views.push(view)
      edits.push(disk.log.edit(captureChanges(disk, plan, writer.id)))
      return { name: disk.name, view, changed, flush: () => disk.flush() }
    })
    return { disks, durable: Promise.all(edits) }
  } catch (error) {
    for (const view of views) await view.close()
    for (const scratch of scratches.slice(views.length)) await scratch.close()
    await Promise.allSettled(edits)
    for (const { disk } of plans.slice(0, views.length).map(({ managed }) => managed)) {
      for (const { bitmap } of plans) if (disk.log.bitmaps.has(bitmap)) await disk.log.edit(returnChanges(disk, bitmap))
    }
    await writer.abort()
    throw error
  } finally {
    for (const disk of drained) disk.undrain()
  }
}

async function makeScratch(context: EngineContext, managed: ManagedDisk): Promise<Scratch> {
  const file = path.join(context.home.diskFolder(managed.record.id), 'scratch')
  await context.host.unlink(file)
  const opened = await context.host.open(file, { write: true, create: 'exclusive' })
  // Unlinked while open: whatever happens to the daemon, the space comes back.
  await context.host.unlink(file)
  return new Scratch(opened, GRANULE, [new ScratchBudget(context.scratchBytes), context.scratchBudget])
}

function everything(disk: Disk): Bitmap {
  const bitmap = new Bitmap(disk.size)
  bitmap.setAll()
  return bitmap
}

function isCaptured(name: string): boolean {
  return name.endsWith(':captured')
}

function capturedName(bitmap: string): string {
  return `${bitmap}:captured`
}

function capturedBits(disk: Disk, bitmap: string): Bitmap {
  const found = disk.log.bitmaps.get(bitmap)
  if (found === undefined) throw new BlockError('not-found', `${disk.name}: bitmap ${bitmap} is gone`)
  return found.bits.copy()
}

/** At the moment: the bits so far are set aside, and a new empty bitmap records from now on. */
function captureChanges(disk: Disk, plan: DiskPlan, backup: string): BitmapChange[] {
  const { bitmap } = plan
  const old = disk.log.bitmaps.get(bitmap)
  const { last } = JSON.parse(old?.meta ?? '{}') as RecordingMeta
  const meta = JSON.stringify({ last, pending: backup } satisfies RecordingMeta)
  const fresh: BitmapChange = { kind: 'add', name: bitmap, granule: GRANULE, recording: true, fill: 'none', meta }
  if (old === undefined) return [fresh]
  if (last === undefined || old.state === 'void') return [{ kind: 'remove', name: bitmap }, fresh]
  // Also when a full is asked for: should it fail, the next one is an incremental as before.
  const captured = capturedName(bitmap)
  return [{ kind: 'rename', name: bitmap, to: captured }, { kind: 'record', name: captured, on: false }, fresh]
}

/** The backup is durable: the recording bitmap counts from it. */
function keepChanges(disk: Disk, bitmap: string, backup: string): BitmapChange[] {
  const captured = capturedName(bitmap)
  const meta = JSON.stringify({ last: backup } satisfies RecordingMeta)
  const kept: BitmapChange = { kind: 'meta', name: bitmap, meta }
  return disk.log.bitmaps.has(captured) ? [{ kind: 'remove', name: captured }, kept] : [kept]
}

/** The backup failed: what was set aside comes back, or there is no bitmap when there was none to count from. */
function returnChanges(disk: Disk, bitmap: string): BitmapChange[] {
  const captured = capturedName(bitmap)
  const { last } = JSON.parse(disk.log.bitmaps.get(bitmap)?.meta ?? '{}') as RecordingMeta
  if (last === undefined || !disk.log.bitmaps.has(captured)) return [{ kind: 'remove', name: bitmap }]
  return [
    { kind: 'merge', from: captured, into: bitmap },
    { kind: 'remove', name: captured },
    { kind: 'meta', name: bitmap, meta: JSON.stringify({ last } satisfies RecordingMeta) },
  ]
}
