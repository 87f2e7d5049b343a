// The moment of disks exported over NBD, for any client to back up: a *view*. It is a job that waits until its reader says that it
// has all of it (finalize) or that it gives up (cancel), and it has a lease: without a reader for so long, it ends by itself. Only
// finalize drops the bits that the view showed; any other end puts them back, also that of the daemon, which no view outlives.
//
//   open: freeze all, capture, export, thaw -> pending --finalize--> finalizing: bits count from the moment
//                                                \\--cancel, lease over, scratch full, restart--> bits come back

import { VIEW_LEASE_MAX_MS, VIEW_LEASE_MS, VIEW_LOOK_MS } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import type { BackupDisk } from '../job/backup.ts'
import type { Job } from '../job/job.ts'
import { ViewDevice } from '../job/view-device.ts'
import { checkSocketPath } from '../nbd/uri.ts'
import { isTaken, type Moment, type Part, settleParts, takeFrozenMoment } from './backups.ts'
import { disksOf, type JobRecord, type ViewSpec } from './catalog.ts'
import type { EngineContext, Served } from './context.ts'
import { JobTable } from './job-table.ts'

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
  /** Milliseconds without a reader, after which the view ends; ten minutes unless told. */
  readonly leaseMs?: number | undefined
}

/**
 * Takes the moment and exports it. Resolves when readers may come; the job's details say where. Kinds: 'not-found' for a disk or bitmap
 * that is not there, 'busy' while one of the disks has a view.
 */
export async function openView(context: EngineContext, request: ViewRequest): Promise<Job> {
  const { disks, machine, bitmap, since, leaseMs = VIEW_LEASE_MS } = request
  for (const name of disks) context.partyOf(name)
  if (new Set(disks).size < disks.length) throw new BlockError('invalid-argument', 'a view has each disk once')
  if (bitmap !== undefined && since !== undefined)
    throw new BlockError('invalid-argument', 'say --bitmap or --since, not both')
  if ((bitmap ?? since)?.includes(':') === true)
    throw new BlockError(
      'invalid-argument',
      `bitmap ${bitmap ?? since} is Varve's own: copy it with varve bitmap add --from`,
    )
  if (leaseMs < 1 || leaseMs > VIEW_LEASE_MAX_MS)
    throw new BlockError('invalid-argument', `a lease of ${leaseMs} ms: up to ${VIEW_LEASE_MAX_MS} ms`)
  refuseSecond(context, disks)
  const row = JobTable.newRow(
    { kind: 'view', disks, ...(machine === undefined ? {} : { machine }) },
    { finalize: 'manual' },
  )
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
    if (!isTaken(row)) throw new BlockError('closed', message)
    job.move('finalizing')
  })
}

function refuseSecond({ catalog }: EngineContext, disks: readonly string[]): void {
  for (const { id, spec } of catalog.list('job')) {
    const disk = spec.kind === 'view' ? disks.find((name) => disksOf(spec).includes(name)) : undefined
    if (disk !== undefined)
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
  const moment = await takeFrozenMoment(context, row.spec as ViewSpec, parts, job.id)
  const served: Served[] = []
  const lease = new Lease(request.leaseMs ?? VIEW_LEASE_MS, moment.disks, (error) => job.giveUp(error))
  let isDone = false
  try {
    await moment.durable
    for (const disk of moment.disks) served.push(await serve(context, job, disk, request, lease))
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
    await end(job, moment, served, isDone)
  }
}

/** Each disk by its bitmap; without one it is a full. */
function plan(context: EngineContext, spec: ViewSpec, { bitmap, since, whole = false }: ViewRequest): Promise<Part[]> {
  const name = bitmap ?? since
  return Promise.all(
    spec.disks.map(async (disk) => {
      const party = context.partyOf(disk)
      const found = await party.plan({ bitmap: name ?? '', full: name === undefined, backups: undefined })
      if (since !== undefined && found.parent === undefined)
        throw new BlockError(
          'not-found',
          `disk ${disk} has no bitmap ${since} that says what changed: varve bitmap list ${disk}`,
        )
      return { party, plan: { ...found, bitmap: name, moves: bitmap !== undefined, whole } }
    }),
  )
}

async function serve(
  context: EngineContext,
  job: Job,
  { name, view, changed }: BackupDisk,
  { bitmap, since, acknowledge = false }: ViewRequest,
  lease: Lease,
): Promise<Served> {
  const device = new ViewDevice(`${name}@${job.id}`, view, acknowledge)
  const socket = context.home.nbdSocket(device.name)
  checkSocketPath(socket)
  const shows = changed && { name: bitmap ?? since ?? '', bits: changed }
  return context.serveView(device, socket, { changed: shows, opened: () => lease.enter(), closed: () => lease.leave() })
}

function shown({ name, view, changed }: BackupDisk, { plan: { reason } }: Part, { uri }: Served): unknown {
  const kind = changed === undefined ? 'full' : 'incremental'
  return { disk: name, uri, kind, reason, size: view.size, changedBytes: changed?.bytes }
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

async function end(job: Job, { parts, disks }: Moment, served: readonly Served[], isDone: boolean): Promise<void> {
  job.describe({
    scratchPeak: disks.reduce((sum, { view }) => sum + view.scratchPeak, 0),
    scratchSaved: disks.reduce((sum, { view }) => sum + view.savedBytes, 0),
  })
  for (const one of served) await one.close()
  for (const { view } of disks) await view.close()
  // A suspended job's bits are settled when the daemon opens again, as after a crash.
  if (!job.suspended || isDone) await settleParts(parts, job.id, isDone ? 'kept' : 'returned')
}

/** Ends a view that has no reader for too long, or that broke. */
class Lease {
  readonly #ms: number
  readonly #disks: readonly BackupDisk[]
  readonly #giveUp: (error: BlockError) => void
  #readers = 0
  #over: NodeJS.Timeout | undefined
  #look: NodeJS.Timeout | undefined

  constructor(ms: number, disks: readonly BackupDisk[], giveUp: (error: BlockError) => void) {
    this.#ms = ms
    this.#disks = disks
    this.#giveUp = giveUp
  }

  begin(): void {
    this.#look = setInterval(() => {
      const broken = this.#disks.find(({ view }) => view.broken !== undefined)?.view.broken
      if (broken !== undefined) this.#giveUp(broken)
    }, VIEW_LOOK_MS).unref()
    if (this.#readers === 0) this.#start()
  }

  enter(): void {
    this.#readers++
    clearTimeout(this.#over)
  }

  leave(): void {
    if (--this.#readers === 0 && this.#look !== undefined) this.#start()
  }

  end(): void {
    clearInterval(this.#look)
    clearTimeout(this.#over)
    this.#look = undefined
  }

  #start(): void {
    const message = `nobody read the view for ${this.#ms} ms: it has ended and its bits are back`
    this.#over = setTimeout(() => this.#giveUp(new BlockError('timeout', message)), this.#ms).unref()
  }
}
