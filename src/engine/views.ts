// The moment of disks exported over NBD, for any client to back up: a *view*. It is a job that waits until its reader says that it
// has all of it (finalize) or that it gives up (cancel), and it has a lease: without a reader for so long, it ends by itself. Only
// finalize drops the bits that the view showed; any other end puts them back, also that of the daemon, which no view outlives.
//
// A client that backs up to a target of its own has a bitmap for that, names the moment as it will know it, and says what of it is
// durable there so far: bits that are put back then count from that part, as they do for a backup of the daemon's own.
//
//   open: freeze all, capture, export, thaw -> pending --finalize--> finalizing: bits count from the moment
//                                                \\--cancel, lease over, scratch full, restart--> bits come back

import { VIEW_LEASE_MAX_MS, VIEW_LEASE_MS } from '../base/limits.ts'
import type { Bitmap } from '../bitmap/bitmap.ts'
import { BlockError } from '../block/error.ts'
import type { BackupDisk } from '../job/backup.ts'
import type { Job } from '../job/job.ts'
import { ViewDevice } from '../job/view-device.ts'
import { checkSocketPath } from '../nbd/uri.ts'
import { isTaken, type Moment, type Part, settleParts, takeFrozenMoment } from './backups.ts'
import { type Catalog, disksOf, type JobRecord, type ViewSpec } from './catalog.ts'
import { checkpointWish, isCheckpoint } from './checkpoints.ts'
import type { EngineContext, Served } from './context.ts'
import type { Home } from './home.ts'
import { JobTable } from './job-table.ts'
import { ViewLease } from './view-lease.ts'

export interface ViewRequest {
  readonly disks: readonly string[]
  /** The machine that these are, if they are one. */
  readonly machine?: string | undefined
  /** Shows what changed by this bitmap of each disk, which counts from the view's moment once that is finalized; made if there is none. */
  readonly bitmap?: string | undefined
  /** Shows what changed by this bitmap, which stays as it is. */
  readonly since?: string | undefined
  /** All of it can be read; else, with a bitmap, only what changed. */
  readonly whole?: boolean | undefined
  /** The reader says by TRIM what it has read: scratch of that is given back. */
  readonly acknowledge?: boolean | undefined
  /** Milliseconds without a request, after which the view ends; ten minutes unless told. */
  readonly leaseMs?: number | undefined
  /** In place of a bitmap: what a client backs up to. Of the disks that are named all is wanted, the others are shown by what changed. */
  readonly target?: ViewTarget | undefined
}

export interface ViewTarget {
  /** The same for each backup to the same place: a repository's id, for instance. */
  readonly name: string
  /** What the client calls this moment, and no other. */
  readonly moment: string
  readonly full: readonly string[]
  /** As of a CheckpointWish, for the disks of which not all is wanted. */
  readonly since?: string | undefined
  readonly checkpoint?: string | undefined
}

/** What a client says of a view that it reads. */
export type ViewStep =
  /** All that was acknowledged is durable in its target as this part. */
  | { readonly step: 'part'; readonly part: string }
  /** The bitmap of a disk is wrong: until a full is done it says nothing. */
  | { readonly step: 'distrust'; readonly disk: string; readonly reason: string }

/** A view that can be read. */
export interface OpenView {
  readonly target: ViewTarget | undefined
  readonly lease: ViewLease
  step(step: ViewStep): Promise<void>
}

/**
 * Takes the moment and exports it. Resolves when readers may come; the job's details say where. Kinds: 'not-found' for a disk or bitmap
 * that is not there, 'busy' while one of the disks has a view.
 */
export async function openView(context: EngineContext, request: ViewRequest): Promise<Job> {
  const { disks, machine, bitmap, since, target, leaseMs = VIEW_LEASE_MS } = request
  for (const name of disks) context.partyOf(name)
  if (new Set(disks).size < disks.length) throw new BlockError('invalid-argument', 'a view has each disk once')
  if ([bitmap, since, target].filter((one) => one !== undefined).length > 1)
    throw new BlockError('invalid-argument', 'say --bitmap or --since, not both')
  if (bitmap?.includes(':') === true || (since?.includes(':') === true && !isCheckpoint(since)))
    throw new BlockError(
      'invalid-argument',
      `bitmap ${bitmap ?? since} is Varve's own: copy it with varve bitmap add --from`,
    )
  if (leaseMs < 1 || leaseMs > VIEW_LEASE_MAX_MS)
    throw new BlockError('invalid-argument', `a lease of ${leaseMs} ms: up to ${VIEW_LEASE_MAX_MS} ms`)
  await refuseSecond(context, request)
  const named = { ...(machine && { machine }), ...(target && { moment: target.moment }) }
  const row = JobTable.newRow({ kind: 'view', disks, ...named }, { finalize: 'manual' })
  const job = JobTable.jobOf(row, {})
  const open = Promise.withResolvers<void>()
  await context.catalog.commit([{ put: 'job', record: row }])
  context.jobs.launch(job, row, () => run(context, job, row, request, open.resolve))
  await Promise.race([open.promise, context.jobs.ended(job.id)])
  if (job.error !== undefined) throw job.error
  return job
}

/** A view that a restart found: its reader gets nothing any more. One that was finalized is done. */
export function endView(context: EngineContext, row: JobRecord): void {
  const job = JobTable.jobOf(row, {})
  const message = `the daemon was restarted: view ${row.id} has ended and its bits are back; open another one`
  context.jobs.launch(job, row, async () => {
    // A daemon that was killed left these.
    for (const disk of disksOf(row.spec)) await context.host.unlink(context.home.nbdSocket(`${disk}@${row.id}`))
    if (!isTaken(row)) throw new BlockError('closed', message)
    job.move('finalizing')
  })
}

/** Says a step of a client to a view. Kind 'closed' when it has ended. */
export async function stepView(context: EngineContext, id: string, step: ViewStep): Promise<void> {
  const view = context.views.get(id)
  if (view === undefined) throw new BlockError('closed', `view ${id} has ended`)
  await view.step(step)
}

/** Where a disk of a view is exported. Kind 'not-found' when there is no such view, or it has ended. */
export function socketOfView(catalog: Pick<Catalog, 'get'>, home: Home, view: string, disk: string): string {
  const spec = catalog.get('job', view)?.spec
  if (spec?.kind === 'view' && spec.disks.includes(disk)) return home.nbdSocket(`${disk}@${view}`)
  throw new BlockError('not-found', `there is no view ${view} of a disk ${disk}, or it has ended`)
}

/** A view for the same target that nobody reads is one of a client that died, and begins anew: it ends. */
async function refuseSecond(context: EngineContext, { disks, target }: ViewRequest): Promise<void> {
  for (const { id, spec } of context.catalog.list('job')) {
    const disk = spec.kind === 'view' ? disks.find((name) => disksOf(spec).includes(name)) : undefined
    if (disk === undefined) continue
    const view = context.views.get(id)
    if (target !== undefined && view?.target?.name === target.name && !view.lease.isRead) {
      view.lease.giveUp(new BlockError('cancelled', 'its client began anew'))
      await context.jobs.ended(id)
    } else
      throw new BlockError(
        'busy',
        `disk ${disk} has a view already: varve job finalize ${id}, or varve job cancel ${id}`,
      )
  }
}

async function run(
  context: EngineContext,
  job: Job,
  row: JobRecord,
  request: ViewRequest,
  opened: () => void,
): Promise<void> {
  const parts = await plan(context, row.spec as ViewSpec, request)
  const id = idOf(row)
  const moment = await takeFrozenMoment(context, parts, id)
  const served: Served[] = []
  const lease = new ViewLease(request.leaseMs ?? VIEW_LEASE_MS, moment.disks, (error) => job.giveUp(error))
  let isDone = false
  try {
    await moment.durable
    const devices = moment.disks.map((disk, index) => deviceOf(job, disk, parts[index] as Part, request, lease))
    for (const [index, device] of devices.entries())
      served.push(await serve(context, device, moment.disks[index] as BackupDisk, parts[index] as Part, lease))
    context.views.set(job.id, { target: request.target, lease, step: (step) => take(step, id, parts, moment, devices) })
    job.describe({
      exports: moment.disks.map((disk, index) => shown(disk, parts[index] as Part, served[index] as Served)),
    })
    lease.begin()
    opened()
    while (!(await job.mayTakeEffect())) continue
    await job.pausePoint(0)
    job.move('finalizing')
    await finalize(context, row, moment)
    isDone = true
  } finally {
    lease.end()
    context.views.delete(job.id)
    await end(job, id, moment, served, isDone)
  }
}

/** By which its captured bits are known. */
export function idOf({ id, spec }: JobRecord): string {
  return (spec.kind === 'view' ? spec.moment : undefined) ?? id
}

async function take(
  step: ViewStep,
  id: string,
  parts: readonly Part[],
  { disks }: Moment,
  devices: readonly ViewDevice[],
): Promise<void> {
  if (step.step === 'distrust') {
    const part = parts.find(({ party }) => party.disk === step.disk)
    return part?.party.distrust(part.plan.bitmap ?? '', id, step.reason)
  }
  // As of the call: what is acknowledged from here on may not be in the part.
  const rest = devices.map(({ left }) => left.copy())
  for (const { view } of disks) await view.flushDisk()
  for (const [index, { party, plan }] of parts.entries())
    await party.keepPart(plan.bitmap ?? '', id, step.part, rest[index] as Bitmap)
}

/** Each disk by its bitmap; without one it is a full. */
function plan(context: EngineContext, spec: ViewSpec, request: ViewRequest): Promise<Part[]> {
  const { bitmap, since, target, whole = false } = request
  const name = bitmap ?? since ?? (target && `backup:${target.name}`)
  return Promise.all(
    spec.disks.map(async (disk) => {
      const party = context.partyOf(disk)
      const full = name === undefined || target?.full.includes(disk) === true
      const asked = checkpointWish({ ...target, full: false })
      const { since: _since, ...marked } = asked
      const checkpoints = full ? marked : asked
      const found = await party.plan({ bitmap: name ?? '', full, backups: undefined, checkpoints })
      if (since !== undefined && found.parent === undefined)
        throw new BlockError(
          'not-found',
          `disk ${disk} has no bitmap ${since} that says what changed: varve bitmap list ${disk}`,
        )
      return { party, plan: { ...found, bitmap: name, moves: since === undefined && name !== undefined, whole } }
    }),
  )
}

function deviceOf(
  job: Job,
  { name, view, changed }: BackupDisk,
  { plan }: Part,
  { acknowledge = false, target }: ViewRequest,
  lease: ViewLease,
): ViewDevice {
  return new ViewDevice(`${name}@${job.id}`, view, {
    acknowledges: acknowledge || target !== undefined,
    readable: plan.whole ? undefined : changed,
    touched: () => lease.touch(),
  })
}

async function serve(
  context: EngineContext,
  device: ViewDevice,
  { changed }: BackupDisk,
  { plan }: Part,
  lease: ViewLease,
): Promise<Served> {
  const socket = context.home.nbdSocket(device.name)
  checkSocketPath(socket)
  const shows = changed && { name: plan.bitmap ?? '', bits: changed }
  return context.serveView(device, socket, { changed: shows, opened: () => lease.enter(), closed: () => lease.leave() })
}

function shown({ name, view, changed }: BackupDisk, { plan }: Part, { uri }: Served): unknown {
  const { reason, bitmap, parent } = plan
  const kind = changed === undefined ? 'full' : 'incremental'
  return { disk: name, uri, kind, reason, bitmap, since: parent, size: view.size, changedBytes: changed?.bytes }
}

/** What the moment had is on stable storage before the bits that say so are dropped; of all disks or of none, by one durable mark. */
async function finalize(context: EngineContext, row: JobRecord, { disks }: Moment): Promise<void> {
  for (const { view } of disks) {
    if (view.broken !== undefined) throw view.broken
    await view.flushDisk()
  }
  const record = { ...(context.catalog.get('job', row.id) ?? row), backup: row.id }
  await context.catalog.commit([{ put: 'job', record }])
}

async function end(
  job: Job,
  id: string,
  { parts, disks }: Moment,
  served: readonly Served[],
  isDone: boolean,
): Promise<void> {
  job.describe({
    scratchPeak: disks.reduce((sum, { view }) => sum + view.scratchPeak, 0),
    scratchSaved: disks.reduce((sum, { view }) => sum + view.savedBytes, 0),
  })
  for (const one of served) await one.close()
  for (const { view } of disks) await view.close()
  // A suspended job's bits are settled when the daemon opens again, as after a crash.
  if (!job.suspended || isDone) await settleParts(parts, id, isDone ? 'kept' : 'returned')
}
