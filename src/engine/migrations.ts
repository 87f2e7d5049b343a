// The source's side of a migration: what is asked for and refused, the copying (snapshots from the bottom up, then the present state by
// job/mirror.ts), and how it goes on after a restart or when the target was away. The switch-over is hand-over.ts,
// the target's side incoming.ts; docs/internals/migration.md has the whole.

import { randomBytes } from 'node:crypto'
import { MIGRATE_LANES } from '../base/limits.ts'
import type { Bitmap } from '../bitmap/bitmap.ts'
import type { Layer } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { Format } from '../chain/open.ts'
import { copyFrozen } from '../job/frozen-copy.ts'
import type { Job } from '../job/job.ts'
import { mend } from '../job/mend.ts'
import { addHidden, addOwned } from '../job/merge.ts'
import { type MirrorMode, runMirror } from '../job/mirror.ts'
import { allocatedGranules } from '../job/restore.ts'
import type { JobTerms } from '../job/terms.ts'
import { identityOf } from './authority.ts'
import { sideOf } from './branches.ts'
import { type JobRecord, type LayerRecord, type MigrateSpec } from './catalog.ts'
import { todoName } from './commits.ts'
import { refuseConflict } from './conflicts.ts'
import type { EngineContext, ManagedDisk } from './context.ts'
import { formatOf } from './disk-opener.ts'
import { askTarget, connectTarget, HandOver } from './hand-over.ts'
import { JobTable } from './job-table.ts'
import { type IncomingReply, type IncomingStep, MIGRATION_PROTOCOL, type PeerLink } from './peers.ts'

export interface MigrateRequest extends JobTerms {
  /** The URI of the target's API. */
  readonly target: string
  /** The disk's name there; its own unless told. */
  readonly name?: string | undefined
  /** Of the image that is made there; that of the disk's base unless told. */
  readonly format?: Format | undefined
  /** Where it is made, there. */
  readonly image?: string | undefined
  readonly mode: MirrorMode
  /** Switches over as soon as it can; else when the job is completed. */
  readonly complete: boolean
  /** Passes the guests on afterwards. */
  readonly forward: boolean
}

/** Begins a migration as a job. What the target refuses is said before anything is copied, and nothing is left of it. */
export function startMigration(context: EngineContext, managed: ManagedDisk, request: MigrateRequest): Promise<Job> {
  return managed.control.run(async () => {
    const { record, disk } = managed
    refuseConflict(context, record.name, 'migrate')
    refuseUnmovable(context, managed)
    const { target: to, mode, forward, complete } = request
    const token = randomBytes(16).toString('hex')
    const ends = complete ? { finish: 'pivot' as const } : {}
    const spec = { kind: 'migrate' as const, disk: record.name, to, token, mode, forward, begun: false, ...ends }
    const row = JobTable.newRow(spec, request)
    await context.catalog.commit([{ put: 'job', record: row }])
    try {
      const [bottom] = snapshotsOf(managed)
      const base = record.layers[0] as LayerRecord
      const { home } = await context.peers.prepare(to, {
        protocol: MIGRATION_PROTOCOL,
        token,
        disk: request.name ?? record.name,
        size: bottom?.view.size ?? disk.size,
        format: request.format ?? formatOf(base),
        image: request.image,
        cache: record.cache ?? 'writeback',
        home: identityOf(context.catalog),
        from: context.home.folder,
      })
      const answered = { ...row, spec: { ...row.spec, home } as MigrateSpec }
      await context.catalog.commit([{ put: 'job', record: answered }])
      return launchMigration(context, managed, answered)
    } catch (error) {
      // Its answer may have been lost: then it has a copy of nothing.
      await context.peers.step(to, token, { step: 'refuse' }).catch(() => undefined)
      await context.catalog.commit([{ remove: 'job', id: row.id }])
      throw error
    }
  })
}

/** Kind 'busy' for what a migration would leave behind, or has to wait for. */
function refuseUnmovable({ catalog }: EngineContext, { record, disk }: ManagedDisk): void {
  const beside = sideOf(record).flatMap(({ snapshot }) => (snapshot === undefined ? [] : [snapshot.name]))
  if (beside.length > 0) {
    const message = `disk ${record.name} has snapshots beside its chain, which cannot go along: ${beside.join(', ')}. Delete them first`
    throw new BlockError('busy', message)
  }
  // That of another thread is in the catalog only.
  const backup = catalog.list('job').find(({ spec }) => 'disks' in spec && spec.disks.includes(record.name))
  if (backup !== undefined)
    throw new BlockError('busy', `migrate has to wait: job ${backup.id} is at work on disk ${record.name}`)
  const larger = disk.chain.layers.find(({ size }) => size > disk.size)
  if (larger === undefined) return
  const message = `disk ${record.name} lies on ${larger.path}, which is larger than the disk: varve stream ${record.name} first`
  throw new BlockError('unsupported', message)
}

/** A snapshot of the chain, and the layers that only it and those above it show. */
interface FrozenState {
  readonly name: string
  readonly createdMs: number
  readonly view: Layer
  /** Indexes of its layers: all above the snapshot before it, up to its own. */
  readonly from: number
  readonly to: number
}

function snapshotsOf({ record, disk }: ManagedDisk): FrozenState[] {
  let from = 0
  return record.layers.flatMap(({ snapshot }, to) => {
    if (snapshot === undefined) return []
    const state = { ...snapshot, view: disk.chain.viewAt(to), from, to }
    from = to + 1
    return [state]
  })
}

/** Runs a migration whose row is in the catalog: a new one, or one that a restart found before it had handed over. */
export function launchMigration(context: EngineContext, managed: ManagedDisk, row: JobRecord): Job {
  const spec = row.spec as MigrateSpec
  const job = JobTable.jobOf(row, { target: spec.to, wanted: spec.mode })
  context.jobs.launch(job, row, () => new Migration(context, managed, row, job).run())
  return job
}

class Migration {
  readonly #context: EngineContext
  readonly #managed: ManagedDisk
  readonly #row: JobRecord
  readonly #job: Job

  constructor(context: EngineContext, managed: ManagedDisk, row: JobRecord, job: Job) {
    this.#context = context
    this.#managed = managed
    this.#row = row
    this.#job = job
  }

  /** Runs until the disk is at the target; when that is away, the job waits for the user, and goes on when it is back. */
  async run(): Promise<void> {
    const job = this.#job
    try {
      for (;;) {
        let link: PeerLink | undefined
        try {
          await this.#copySnapshots()
          link = await connectTarget(this.#context, this.#spec)
          await this.#mirror(link)
          return
        } catch (error) {
          if (this.#managed.record.away !== undefined) throw error
          await link?.device.close().catch(() => undefined)
          await mend(job, error)
        }
      }
    } catch (error) {
      if (!job.suspended) await this.#undo()
      throw error
    }
  }

  get #record(): JobRecord {
    return this.#context.catalog.get('job', this.#row.id) ?? this.#row
  }

  get #spec(): MigrateSpec {
    return this.#record.spec as MigrateSpec
  }

  /** Those that the target does not have yet, each with all that it adds to the one below. */
  async #copySnapshots(): Promise<void> {
    const { disk } = this.#managed
    const states = snapshotsOf(this.#managed)
    const { snapshots, state, home } = await this.#step({ step: 'state' })
    if (state === 'unknown') {
      const message = `the target ${this.#spec.to} does not know this migration any more, and deleted its copy: begin anew`
      throw new BlockError('corrupt', message)
    }
    // A crash came between its answer and our record of it.
    if (this.#spec.home === undefined) await this.#note(home)
    for (const [index, frozen] of states.entries()) {
      if (snapshots[index] === frozen.name) continue
      this.#job.describe({ copies: `snapshot ${frozen.name}` })
      const link = await connectTarget(this.#context, this.#spec)
      const bitmap = `${todoName(this.#row.id)}:${index}`
      try {
        await copyFrozen({
          job: this.#job,
          disk,
          bitmap,
          view: frozen.view,
          target: link.device,
          lanes: MIGRATE_LANES,
          pace: this.#context.mirrorPace,
          scan: (todo) => this.#scanLayers(frozen.from, frozen.to, todo),
        })
      } finally {
        await link.device.close().catch(() => undefined)
      }
      const size = states[index + 1]?.view.size ?? disk.size
      const { name: snapshot, createdMs } = frozen
      await this.#step({ step: 'freeze', snapshot, createdMs, size })
      await disk.log.edit([{ kind: 'remove', name: bitmap }])
    }
    this.#job.describe({ copies: 'the present state' })
  }

  #note(home: string): Promise<void> {
    const record = this.#record
    return this.#context.catalog.commit([{ put: 'job', record: { ...record, spec: { ...this.#spec, home } } }])
  }

  /** Sets what these layers may show otherwise than what lies below them. */
  async #scanLayers(from: number, to: number, todo: Bitmap): Promise<void> {
    const { layers } = this.#managed.disk.chain
    for (let index = from; index <= to; index++) {
      const layer = layers[index] as Layer
      const below = layers[index - 1]
      await addOwned(layer, todo)
      if (below !== undefined) await addHidden(layer, below, todo)
    }
  }

  async #mirror(link: PeerLink): Promise<void> {
    const context = this.#context
    const { disk } = this.#managed
    const states = snapshotsOf(this.#managed)
    const handOver = new HandOver(context, this.#managed, this.#job, () => this.#record)
    await runMirror({
      job: this.#job,
      disk,
      target: link.device,
      bitmap: todoName(this.#row.id),
      pace: context.mirrorPace,
      lanes: MIGRATE_LANES,
      total: this.#record.total,
      scan: async (todo) => {
        const above = (states.at(-1)?.to ?? -1) + 1
        if (this.#spec.begun) todo.setAll()
        else if (above === 0) todo.or(await allocatedGranules(disk.chain))
        else await this.#scanLayers(above, disk.chain.layers.length - 1, todo)
      },
      began: (total) => {
        const record = { ...this.#record, total, spec: { ...this.#spec, begun: true } }
        return context.catalog.commit([{ put: 'job', record }])
      },
      mode: () => this.#spec.mode,
      // However it is asked to end, there is one end.
      finish: () => (this.#spec.finish === undefined ? undefined : 'pivot'),
      approach: () => handOver.approach(),
      seal: () => handOver.seal(),
      copied: async () => undefined,
      pivot: () => handOver.run(link),
    })
    await handOver.finish()
  }

  #step(step: IncomingStep): Promise<IncomingReply> {
    return askTarget(this.#context, this.#spec, step)
  }

  /** Ends a migration that failed or was cancelled: the disk is here as before, and the target deletes its copy. */
  async #undo(): Promise<void> {
    const { disk, record } = this.#managed
    if (record.away !== undefined) return
    const mine = todoName(this.#row.id)
    const sets = [...disk.log.bitmaps.keys()].filter((name) => name === mine || name.startsWith(`${mine}:`))
    if (sets.length > 0) await disk.log.edit(sets.map((name) => ({ kind: 'remove', name })))
    const { to } = this.#spec
    try {
      await this.#step({ step: 'refuse' })
    } catch (error) {
      const left = `an incomplete copy may be left at ${to}: varve disk remove there deletes it`
      this.#job.describe({ left })
      this.#context.report(`${record.name}: ${left} (${(error as Error).message})`)
    }
  }
}
