// The jobs of an engine: those that run, with their rows in the catalog so that they go on after a restart, and the
// history of those that ended.

import { randomBytes } from 'node:crypto'
import { COURTESY_BACKUP_LEAST, COURTESY_RESTORE_RATIO, JOBS_KEPT } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import type { Disk } from '../chain/disk.ts'
import { Courtesy, type CourtesyWish } from '../job/courtesy.ts'
import { Job, type JobState, type JobStatus, type PlainVerb } from '../job/job.ts'
import type { MirrorFinish, MirrorMode } from '../job/mirror.ts'
import { checkTerms, type JobKind, type JobTerms } from '../job/terms.ts'
import {
  type Catalog,
  type CatalogChange,
  disksOf,
  type HistoryRecord,
  type JobRecord,
  type JobSpec,
  type MirrorSpec,
  subjectOf,
} from './catalog.ts'
import { type FarEar, NearGuests } from './guest-ears.ts'
import type { Turn, TurnWish } from './backup-queue.ts'

/** What of a verb outlives a restart. */
const KEPT: Record<PlainVerb, Partial<Pick<JobRecord, 'paused' | 'finalized'>>> = {
  pause: { paused: true },
  resume: { paused: false },
  finalize: { finalized: true },
  cancel: {},
}

/** Where a job waits for its turn. */
export interface Line {
  readonly turn: Turn
  readonly wish: TurnWish
  /** Begins the job of a row that takes the place of one that lost its turn before it was done. */
  readonly again: (row: JobRecord) => void
}

/** How jobs of a kind make way for guests, where that is not as all others do. */
const COURTESIES: Readonly<Partial<Record<JobKind, CourtesyWish>>> = {
  backup: { crowdedLeast: COURTESY_BACKUP_LEAST },
  restore: { ratio: COURTESY_RESTORE_RATIO },
}

export class JobTable {
  readonly #catalog: Catalog
  readonly #disks: ReadonlyMap<string, { readonly disk: Disk }>
  readonly #report: (message: string) => void
  readonly #farEar: FarEar
  #isStopped = false
  /** Has a job stop waiting for its turn. */
  readonly #waiting = new Map<string, () => void>()
  /** Jobs that lost their turn while they worked. */
  readonly #late = new Set<string>()
  readonly #running = new Map<
    string,
    { readonly job: Job; readonly record: () => JobRecord; readonly ended: Promise<void> }
  >()

  /** `disks` are those of this thread: a job makes way for the guests of these, and of those elsewhere of which `farEar` lets it hear. */
  constructor(
    catalog: Catalog,
    disks: ReadonlyMap<string, { readonly disk: Disk }>,
    report: (message: string) => void,
    farEar: FarEar = () => undefined,
  ) {
    this.#catalog = catalog
    this.#disks = disks
    this.#report = report
    this.#farEar = farEar
  }

  /** The row of a new job. Kind 'invalid-argument' for terms that a job of its kind cannot have. */
  static newRow(spec: JobSpec, { speed, onError, finalize, dismiss, guestLatency }: JobTerms = {}): JobRecord {
    const terms = { speed, onError, finalize, dismiss, guestLatency }
    checkTerms(spec.kind, terms)
    const id = `${spec.kind}-${randomBytes(4).toString('hex')}`
    return { id, spec, terms, total: 0, paused: false, startedMs: Date.now() }
  }

  /** The job of a row, new or found by a restart. */
  static jobOf({ id, spec, terms, finalized }: JobRecord, details: Readonly<Record<string, unknown>>): Job {
    return new Job({ id, kind: spec.kind, subject: subjectOf(spec), terms, finalized, details })
  }

  /** Running jobs first, then ended ones, newest first. */
  list(): JobStatus[] {
    const running = [...this.#running.values()].map(({ job }) => job.status)
    const ended = this.#catalog
      .list('history')
      .filter(({ id }) => !this.#running.has(id))
      .map((record) => record.status as JobStatus)
    return [...running, ...ended.toReversed()]
  }

  /** Kind 'not-found' when there is no such job. */
  status(id: string): JobStatus {
    const running = this.#running.get(id)
    if (running !== undefined) return running.job.status
    const ended = this.#catalog.get('history', id)
    if (ended !== undefined) return ended.status as JobStatus
    throw new BlockError('not-found', `there is no job ${id}: varve job list shows those there are`)
  }

  /** A job that has not ended. Kind 'not-found' when there is none, 'busy' when it ended. */
  running(id: string): Job {
    const running = this.#running.get(id)
    if (running !== undefined) return running.job
    throw new BlockError('busy', `job ${this.status(id).id} has ended`)
  }

  /** Calls back on every change of a job until it has ended; returns how to stop that. */
  watch(id: string, listener: (status: JobStatus) => void): () => void {
    return this.#running.get(id)?.job.watch((job) => listener(job.status)) ?? (() => {})
  }

  /** Whether the table has the job as one that has not ended. */
  has(id: string): boolean {
    return this.#running.has(id)
  }

  /** The job that works on a disk in the given way, if any; one that has concluded works on nothing, whatever the catalog says yet. */
  find(test: (record: JobRecord, state: JobState) => boolean): Job | undefined {
    const found = [...this.#running.values()].find(
      ({ job, record }) => job.state !== 'concluded' && test(record(), job.state),
    )
    return found?.job
  }

  /** Resolves when the job is no longer running; a job that the daemon's stop suspended has not ended then. */
  async ended(id: string): Promise<JobStatus> {
    const running = this.#running.get(id)
    if (running === undefined) return this.status(id)
    await running.ended
    return running.job.status
  }

  /** Says a verb to a job and keeps what must outlive a restart. */
  async say(id: string, verb: PlainVerb): Promise<JobStatus> {
    const job = this.running(id)
    job[verb]()
    const record = this.#catalog.get('job', id)
    if (record !== undefined && verb !== 'cancel')
      await this.#catalog.commit([{ put: 'job', record: { ...record, ...KEPT[verb] } }])
    return job.status
  }

  /** Has a job that is ready end, like that, also after a restart. Kind 'busy' unless it is ready. */
  async complete(id: string, finish: MirrorFinish): Promise<JobStatus> {
    this.running(id).complete()
    return this.#changeMirror(id, { finish })
  }

  /** Changes how a mirror copies, also for its runs after a restart. Kind 'unsupported' for other jobs. */
  async setMode(id: string, mode: MirrorMode): Promise<JobStatus> {
    const job = this.running(id)
    if (job.kind !== 'mirror' && job.kind !== 'migrate')
      throw new BlockError('unsupported', `job ${id} is a ${job.kind}: only a mirror or migration has a mode`)
    job.describe({ wanted: mode })
    return this.#changeMirror(id, { mode })
  }

  async #changeMirror(id: string, change: Partial<Pick<MirrorSpec, 'mode' | 'finish'>>): Promise<JobStatus> {
    const job = this.running(id)
    const record = this.#catalog.get('job', id)
    if (record?.spec.kind === 'mirror' || record?.spec.kind === 'migrate') {
      await this.#catalog.commit([{ put: 'job', record: { ...record, spec: { ...record.spec, ...change } } }])
    }
    job.nudge()
    return job.status
  }

  /** Marks an ended job as seen: only the history has it from then on. Kinds 'not-found', 'busy' for one that has not ended. */
  async dismiss(id: string): Promise<void> {
    const ended = this.#catalog.get('history', id)
    if (ended !== undefined) return this.#catalog.commit(dismissal(ended))
    throw new BlockError('busy', `job ${this.status(id).id} has not ended: varve job cancel ${id} ends it`)
  }

  /** Changes a job's speed limit, also for its runs after a restart. */
  async setSpeed(id: string, bytesPerSecond: number): Promise<JobStatus> {
    const job = this.running(id)
    job.setSpeed(bytesPerSecond)
    const record = this.#catalog.get('job', id)
    if (record !== undefined) {
      await this.#catalog.commit([
        { put: 'job', record: { ...record, terms: { ...record.terms, speed: bytesPerSecond } } },
      ])
    }
    return job.status
  }

  /**
   * Runs `work` as a job whose row is already in the catalog. When it ends, the row goes and the history has it; when
   * it is suspended, the row stays. With a `line` it waits for its turn there, known and not begun, and holds it while it works; one that
   * loses its turn ends, and another with its place is there from the moment that it has ended.
   */
  launch(job: Job, record: JobRecord, work: () => Promise<void>, line?: Line): void {
    const begin = async (): Promise<void> => {
      // It may have been cancelled, or the daemon told to stop, while it waited for its turn.
      await job.pausePoint(0)
      job.move('running')
      if (record.paused) job.pause()
      await this.#makingWay(job, record, work)
      job.move('concluded')
    }
    const run = async (): Promise<void> => {
      try {
        await (line === undefined ? begin() : this.#inTurn(job, line, begin))
      } catch (error) {
        if (job.suspended) return
        job.fail(error)
        job.move('concluded')
        this.#report(`job ${job.id} of ${job.subject} failed: ${job.error?.message}`)
      } finally {
        const next = this.#nextOf(job, record)
        if ((await this.#end(job, next)) && next !== undefined) line?.again(next)
      }
    }
    if (this.#isStopped) job.suspend()
    // The table knows the job before the work begins.
    const ended = Promise.resolve().then(run)
    this.#running.set(job.id, { job, record: () => this.#catalog.get('job', record.id) ?? record, ended })
  }

  /** One that is cancelled or suspended while it waits does not wait for its turn. */
  async #inTurn(job: Job, { turn, wish }: Line, begin: () => Promise<void>): Promise<void> {
    const giveBack = (): void => turn.give(job.id)
    const unwatch = job.watch(({ state }) => {
      if (state === 'aborting') giveBack()
    })
    this.#waiting.set(job.id, giveBack)
    const waits = (reason: string | undefined): void => job.describe({ waits: reason })
    const over = (error: BlockError): void => {
      this.#late.add(job.id)
      job.giveUp(error)
    }
    try {
      if (!job.suspended) await turn.take(wish, { waits, over })
      unwatch()
      this.#waiting.delete(job.id)
      await begin()
    } finally {
      unwatch()
      this.#waiting.delete(job.id)
      giveBack()
    }
  }

  async #makingWay(job: Job, { spec, terms: { guestLatency } }: JobRecord, work: () => Promise<void>): Promise<void> {
    if (guestLatency === 0) return work()
    const names = disksOf(spec)
    const near = names.flatMap((name) => this.#disks.get(name)?.disk ?? [])
    const far = names.flatMap((name) => (this.#disks.has(name) ? [] : (this.#farEar(name) ?? [])))
    const ears = [...(near.length === 0 ? [] : [new NearGuests(near)]), ...far]
    if (ears.length === 0) return work()
    job.makeWay(
      new Courtesy(
        ears.map(({ heard }) => heard),
        guestLatency,
        COURTESIES[spec.kind],
      ),
    )
    try {
      await work()
    } finally {
      for (const ear of ears) ear.close()
    }
  }

  /** The daemon stops: all jobs end at their next pause point, to go on after a restart, and no other begins. */
  stop(): void {
    this.#isStopped = true
    for (const { job } of this.#running.values()) job.suspend()
    for (const giveBack of this.#waiting.values()) giveBack()
  }

  /** Kind 'closed' when the daemon stops. */
  checkRunning(): void {
    if (this.#isStopped) throw new BlockError('closed', 'the daemon stops: ask again when it runs')
  }

  /** Resolves when none is running any more. */
  async allEnded(): Promise<void> {
    await Promise.all([...this.#running.values()].map(({ ended }) => ended))
  }

  /** What takes the place of a job that lost its turn; nothing when that was done in time, or its user gave it up. */
  #nextOf(job: Job, { spec, terms }: JobRecord): JobRecord | undefined {
    const isLate = this.#late.delete(job.id)
    if (!isLate || job.error === undefined || job.error.kind === 'cancelled') return undefined
    const next = JobTable.newRow(spec, terms)
    job.describe({ queuedAgain: next.id })
    return next
  }

  /** The table has the job until the history has it. True when the catalog knows that it has ended, and of what comes after it. */
  async #end(job: Job, next: JobRecord | undefined): Promise<boolean> {
    try {
      if (job.suspended && job.state !== 'concluded') return false
      // What was seen goes first.
      const old = this.#catalog.list('history').toSorted((a, b) => Number(isDismissed(b)) - Number(isDismissed(a)))
      await this.#catalog.commit([
        { remove: 'job', id: job.id },
        { put: 'history', record: { id: job.id, status: job.status } },
        ...(next === undefined ? [] : [{ put: 'job' as const, record: next }]),
        ...old
          .slice(0, Math.max(0, old.length + 1 - JOBS_KEPT))
          .map((record) => ({ remove: 'history' as const, id: record.id })),
      ])
      return true
    } catch (error) {
      // The row stays, and the next start finds the job done or lets it go on.
      this.#report(`job ${job.id} has ended, which the catalog does not know: ${(error as Error).message}`)
      return false
    } finally {
      this.#running.delete(job.id)
    }
  }
}

function isDismissed({ status }: HistoryRecord): boolean {
  return (status as JobStatus).dismissed
}

/** What marks an ended job as seen. */
export function dismissal(record: HistoryRecord): readonly CatalogChange[] {
  return [{ put: 'history', record: { ...record, status: { ...(record.status as JobStatus), dismissed: true } } }]
}
