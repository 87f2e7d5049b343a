// Live backups: their turn, the moment of all their disks, the copying as a job (job/backup.ts), and what a restart finds. What
// happens at each disk is its party's affair (backup-party.ts). A crash leaves captured bits behind, which are settled when
// the daemon opens: by whether the backup became visible in the repository.

import path from 'node:path'
import { BlockError } from '../block/error.ts'
import { type BackupDisk, type BackupResult, runBackup } from '../job/backup.ts'
import type { Job, JobStatus } from '../job/job.ts'
import { mend } from '../job/mend.ts'
import { newProof } from '../job/proof.ts'
import type { JobTerms } from '../job/terms.ts'
import type { BackupInfo, BackupReader, BackupWriter, Repository } from '../repository/repository.ts'
import { forgetParts, keptParts } from './backup-parts.ts'
import type { TurnWish } from './backup-queue.ts'
import { type BackupParty, type DiskPlan, type Outcome, pendingBackups, settleBits } from './backup-party.ts'
import { checkpointWish } from './checkpoints.ts'
import { type BackupSpec, type JobRecord, subjectOf } from './catalog.ts'
import type { EngineContext } from './context.ts'
import { type BackupFigures, learn } from './forecast.ts'
import { whileFrozen } from './guest-freezer.ts'
import { JobTable } from './job-table.ts'
import { guestsOf } from './machines.ts'
import { vmOf } from './qemu-contact.ts'
import { openVmBackup, settleVm } from './vm-backup.ts'
import type { SkippedDisk } from './vm-disk-plans.ts'

export interface BackupRequest extends JobTerms {
  readonly disks: readonly string[]
  /** The machine that these are, if they are one. */
  readonly machine?: string | undefined
  readonly repository: string
  readonly full: boolean
  /** So many percent of what the bitmaps call unchanged is read too, and compared with the backup before. */
  readonly prove?: number | undefined
  /** As of a CheckpointWish. */
  readonly since?: string | undefined
  readonly checkpoint?: string | undefined
}

/** One disk of a backup or view: who answers for it, and how it is taken. */
export interface Part {
  readonly party: BackupParty
  readonly plan: DiskPlan
}

/** Takes the moment and begins to copy, as a job. Resolves when the moment is taken. */
export async function startBackup(context: EngineContext, request: BackupRequest): Promise<Job> {
  const { disks, machine, repository, full, prove } = request
  for (const name of disks) context.partyOf(name)
  if (disks.length === 0 && vmOf(context.catalog, machine) === undefined)
    throw new BlockError('invalid-argument', 'a backup needs at least one disk')
  if (new Set(disks).size < disks.length) throw new BlockError('invalid-argument', 'a backup has each disk once')
  const named = machine === undefined ? {} : { machine }
  const asked = { repository, full, ...newProof(prove), ...checkpointWish(request) }
  const row = JobTable.newRow({ kind: 'backup', disks, ...named, ...asked }, request)
  const { job, taken } = launchBackup(context, row, await context.openRepository(repository))
  await taken
  if (job.error !== undefined) throw job.error
  if (job.state === 'created') context.jobs.checkRunning()
  return job
}

/**
 * Backups that a restart found, their bits settled. One that had become visible is done; the others begin again with a new
 * moment, behind the queue: this resolves when all are launched.
 */
export async function resumeBackups(context: EngineContext, rows: readonly JobRecord[]): Promise<void> {
  for (const row of rows) {
    try {
      // One that never had its turn is in no repository; there may be many of them.
      const repository = row.backup === undefined ? undefined : await context.openRepository(repositoryOf(row))
      if (repository === undefined || !(await isVisible(repository, row))) {
        launchBackup(context, row, repository)
        continue
      }
      await repository.close()
      const job = JobTable.jobOf(row, { backup: row.backup })
      context.jobs.launch(job, row, async () => {
        // A QEMU that does not answer holds up this job, and nobody else.
        if (row.backup !== undefined) await settleVm(context, row, repository.id, row.backup)
        job.move('finalizing')
      })
    } catch (error) {
      // Not silently: the history has it as a failed job.
      context.jobs.launch(JobTable.jobOf(row, {}), row, () => Promise.reject(error))
    }
  }
}

/** Queued backups, new in the catalog, wait for their turns. One that was launched already stays as it is. */
export function launchQueued(context: EngineContext, rows: readonly JobRecord[]): JobStatus[] {
  return rows.map((row) => {
    if (context.jobs.has(row.id)) return context.jobs.status(row.id)
    return launchBackup(context, row, undefined).job.status
  })
}

/**
 * Puts captured bits back wherever a crash left some; those of a backup that is whole and visible are dropped. `rows` are the
 * backup jobs that may have left them, whichever engine's; with `all`, bits that none of them explains come back too.
 */
export async function settleBackups(
  context: EngineContext,
  { rows, all }: { readonly rows: readonly JobRecord[]; readonly all: boolean },
): Promise<void> {
  const known = new Map(rows.map((row) => [row.spec.kind === 'view' ? (row.spec.moment ?? row.id) : row.backup, row]))
  for (const { disk } of context.disks.values()) {
    for (const { bitmap, backup } of pendingBackups(disk)) {
      const row = known.get(backup)
      if (row === undefined && !all) continue
      await settleBits(
        disk,
        bitmap,
        backup,
        row !== undefined && (await becameVisible(context, row)) ? 'kept' : 'returned',
      )
    }
  }
}

/** Its reader said that it has what the view showed, and that is durable. */
export function isTaken({ id, backup }: JobRecord): boolean {
  return backup === id
}

function repositoryOf(row: JobRecord): string {
  return (row.spec as BackupSpec).repository
}

async function isVisible(repository: Repository, row: JobRecord): Promise<boolean> {
  return row.backup !== undefined && (await repository.backups()).some(({ id }) => id === row.backup)
}

/**
 * A repository that cannot be opened says nothing: then the bits come back, and some of them are copied again. What was read from a view
 * is where its reader says.
 */
async function becameVisible(context: EngineContext, row: JobRecord): Promise<boolean> {
  if (row.spec.kind === 'view') return isTaken(row)
  let repository: Repository | undefined
  try {
    repository = await context.openRepository(repositoryOf(row))
    return await isVisible(repository, row)
  } catch (error) {
    context.report(`${row.id}: whether its backup is there is not known: ${(error as Error).message}`)
    return false
  } finally {
    await repository?.close()
  }
}

/**
 * A job in the table at once, which waits for its turn, opens the repository unless it is open, takes the moment and copies. `taken` resolves
 * when the moment is taken, or the job ended before.
 */
function launchBackup(
  context: EngineContext,
  row: JobRecord,
  opened: Repository | undefined,
): { readonly job: Job; readonly taken: Promise<unknown> } {
  const spec = row.spec as BackupSpec
  const job = JobTable.jobOf(row, { repository: path.basename(spec.repository) })
  const moment = Promise.withResolvers<void>()
  let repository = opened
  const whole = async (): Promise<void> => {
    repository ??= await context.openRepository(spec.repository)
    const running = await begin(context, job, row, repository)
    moment.resolve()
    await work(context, job, spec, running)
  }
  job.shareLine(context.bandwidth.share())
  const again = (next: JobRecord): unknown => launchBackup(context, next, undefined)
  context.jobs.launch(job, row, whole, { turn: context.backupTurn, wish: wishOf(row, spec), again })
  const ended = context.jobs.ended(job.id)
  ended
    .then(() => repository?.close())
    .then(() => context.host.giveBackMemory?.())
    .catch((error: unknown) => context.report(`${job.id}: closing the repository: ${(error as Error).message}`))
  return { job, taken: Promise.race([moment.promise, ended]) }
}

function wishOf({ id, startedMs }: JobRecord, spec: BackupSpec): TurnWish {
  const { disks: own, full, queued } = spec
  const machine = subjectOf(spec)
  // A machine of QEMU's has no disk here: it is backed up once at a time by its own name.
  const disks = own.length === 0 ? [machine] : own
  return { id, machine, disks, full, place: queued ?? startedMs, queued: queued !== undefined }
}

async function begin(context: EngineContext, job: Job, row: JobRecord, repository: Repository): Promise<Running> {
  const spec = row.spec as BackupSpec
  const { parts, usedUp, skipped } = await makePlans(context, spec, repository)
  const request = {
    machine: subjectOf(spec),
    moment: Date.now(),
    kind: parts.every(({ plan }) => plan.kind === 'incremental') ? ('incremental' as const) : ('full' as const),
    disks: parts.map(({ party, plan: { size, parent, parentDisk, compared } }) => {
      const before = parent ?? compared
      const disk = (parent && parentDisk) ?? party.disk
      return { name: party.disk, size, ...(before && { parent: { backup: before, disk } }) }
    }),
  }
  const writer = await repository.begin(request, (error) => mend(job, error))
  const readers = new Map<string, BackupReader>()
  try {
    const record = { ...(context.catalog.get('job', row.id) ?? row), backup: writer.id }
    await context.catalog.commit([{ put: 'job', record }])
    // Opened first: what cannot be read of them is known before a guest waits.
    for (const { plan } of parts) {
      const before = plan.compared ?? (spec.proof === undefined ? undefined : plan.parent)
      if (before !== undefined && !readers.has(before)) readers.set(before, await repository.openBackup(before))
    }
    const moment = await takeFrozenMoment(context, parts, writer.id, spec.machine)
    const running = { ...moment, momentMs: Date.now(), writer, repository, readers, usedUp }
    job.describe({
      backup: writer.id,
      momentMs: running.momentMs,
      frozenMs: moment.frozenMs,
      disks: parts.map(({ party, plan }) => ({ name: party.disk, ...howOf(plan) })),
      ...(skipped.length === 0 ? {} : { skipped }),
    })
    return running
  } catch (error) {
    for (const reader of readers.values()) await reader.close()
    await writer.abort()
    throw error
  }
}

/** How a disk is backed up, for its user and for the record. */
function howOf({ kind, reason, compared }: DiskPlan): Record<string, string> {
  return { kind, reason, ...(compared && { compared }) }
}

/** Disks at their moment. */
export interface Moment {
  readonly parts: readonly Part[]
  readonly disks: readonly BackupDisk[]
  /** Resolves when the swapped bitmaps are durable. */
  readonly durable: Promise<unknown>
}

/** A backup whose moment is taken. */
interface Running extends Moment {
  readonly writer: BackupWriter
  readonly momentMs: number
  readonly repository: Repository
  /** The earlier backups that are read meanwhile, by id. */
  readonly readers: ReadonlyMap<string, BackupReader>
  /** Parts of broken backups that nobody needs once this one, or a part of it, is there. */
  readonly usedUp: readonly string[]
}

async function work(context: EngineContext, job: Job, spec: BackupSpec, running: Running): Promise<void> {
  const { parts, durable, writer, momentMs, repository, readers } = running
  let result: BackupResult | undefined
  const kept = keptParts(context, running)
  const isInQemu = vmOf(context.catalog, spec.machine) !== undefined
  const disks = running.disks.map((disk, index) => {
    const { compared, parent, parentDisk } = (parts[index] as Part).plan
    const called = (parent && parentDisk) ?? disk.name
    const before = readers.get(compared ?? parent ?? '')?.disks.find(({ name }) => name === called)?.device
    return { ...disk, before }
  })
  try {
    await durable
    result = await runBackup(job, {
      disks,
      writer,
      notes: { disks: parts.map(({ plan }) => howOf(plan)) },
      proof: spec.proof,
      distrust: async (index, reason) => {
        const { party, plan } = parts[index] as Part
        await party.distrust(plan.bitmap ?? '', writer.id, reason)
      },
      // One that was asked to be full begins anew: the bits from before it are worth more than what it has. So does one of QEMU's disks.
      parts: spec.full || isInQemu ? undefined : kept,
    })
    job.describe({ readBytes: result.readBytes, storedBytes: result.info.storedBytes })
  } finally {
    for (const reader of readers.values()) await reader.close()
    for (const { view } of disks) await view.close()
    // From here on nothing of it is in scratch.
    job.describe({ releasedMs: Date.now() })
    // A suspended job's bits are settled when the daemon opens again, as after a crash; a guest in QEMU goes on without us meanwhile.
    if (!job.suspended || result !== undefined || isInQemu)
      await settleParts(parts, writer.id, result === undefined ? 'returned' : 'kept')
  }
  await forgetParts(context, repository, kept.ids)
  await remember(context, subjectOf(spec), {
    momentMs,
    tookMs: Date.now() - momentMs,
    copiedBytes: job.status.done,
    savedBytes: disks.reduce((sum, { view }) => sum + view.savedBytes, 0),
    full: parts.some(({ plan }) => plan.parent === undefined),
  })
}

/** Learns for the next time; that this fails is no fault of the backup. */
async function remember(context: EngineContext, machine: string, figures: BackupFigures): Promise<void> {
  const record = learn(machine, context.catalog.get('forecast', machine), figures)
  try {
    await context.catalog.commit([{ put: 'forecast', record }])
  } catch (error) {
    context.report(`what the backup of ${machine} took was not noted: ${(error as Error).message}`)
  }
}

/** Every part is settled, also when one cannot be: that one's disk settles it when it opens again. */
export async function settleParts(parts: readonly Part[], backup: string, outcome: Outcome): Promise<void> {
  const settled = await Promise.allSettled(parts.map(({ party, plan }) => party.settle(plan.bitmap, backup, outcome)))
  const failed = settled.find((one) => one.status === 'rejected')
  if (failed !== undefined) throw failed.reason
}

async function makePlans(
  context: EngineContext,
  spec: BackupSpec,
  repository: Repository,
): Promise<{ readonly parts: Part[]; readonly usedUp: readonly string[]; readonly skipped: readonly SkippedDisk[] }> {
  const { backups: whole, parts: broken } = await repository.list()
  const backups = [...whole, ...broken]
  const bitmap = `backup:${repository.id}`
  const machine = vmOf(context.catalog, spec.machine)
  const inQemu = machine && (await openVmBackup(context, machine, repository.id, whole))
  const parties = inQemu?.parties ?? spec.disks.map((name) => context.partyOf(name))
  const parts = await Promise.all(
    parties.map(async (party) => {
      const plan = await party.plan({ bitmap, full: spec.full, backups, checkpoints: spec })
      // What a proof reads is chosen once the bits are there.
      return { party, plan: { ...plan, whole: spec.proof !== undefined } }
    }),
  )
  const isUsedUp = ({ id, disks }: BackupInfo): boolean =>
    parts.some(({ plan }) => plan.parent === id) && disks.every(({ name }) => spec.disks.includes(name))
  return { parts, usedUp: broken.filter(isUsedUp).map(({ id }) => id), skipped: inQemu?.skipped ?? [] }
}

/** The same, while the guests of machines that have hooks are frozen; with the milliseconds for which they were. */
export async function takeFrozenMoment(
  { catalog, guests }: EngineContext,
  parts: readonly Part[],
  id: string,
  machine?: string,
): Promise<Moment & { readonly frozenMs?: number }> {
  const disks = parts.map(({ party }) => party.disk)
  const machines = guestsOf(catalog, disks, machine)
  if (machines.length === 0) return takeMoment(parts, id)
  const { result, frozenMs } = await whileFrozen(guests, machines, () => takeMoment(parts, id))
  if (frozenMs !== undefined) return { ...result, frozenMs }
  for (const { view } of result.disks) await view.close()
  await settleParts(parts, id, 'returned')
  const names = machines.join(', ')
  throw new BlockError('timeout', `the guest of ${names} was let go before the moment was taken: its time was over`)
}

/** Freezes all disks, takes each one's moment for a backup or view of that id, and lets the guests go on. */
async function takeMoment(parts: readonly Part[], id: string): Promise<Moment> {
  try {
    for (const { party } of parts) await party.freeze()
    const captured = await Promise.all(parts.map(({ party, plan }) => party.capture(plan, id)))
    const disks = captured.map(({ view, changed }, index) => ({
      name: (parts[index] as Part).party.disk,
      view,
      changed,
    }))
    return { parts, disks, durable: Promise.all(captured.map(({ durable }) => durable)) }
  } catch (error) {
    await settleParts(parts, id, 'returned')
    throw error
  } finally {
    await Promise.all(parts.map(({ party }) => party.thaw()))
  }
}
