// The jobs of an engine: those that run, with their rows in the catalog so that they go on after a restart, and the
// history of those that ended.

import { randomBytes } from 'node:crypto'
import { JOBS_KEPT } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import type { Job, JobStatus } from '../job/job.ts'
import type { Catalog, JobRecord } from './catalog.ts'

export class JobTable {
  readonly #catalog: Catalog
  readonly #running = new Map<
    string,
    { readonly job: Job; readonly record: () => JobRecord; readonly ended: Promise<void> }
  >()

  constructor(catalog: Catalog) {
    this.#catalog = catalog
  }

  static newId(kind: string): string {
    return `${kind}-${randomBytes(4).toString('hex')}`
  }

  /** Running jobs first, then ended ones, newest first. */
  list(): JobStatus[] {
    const running = [...this.#running.values()].map(({ job }) => job.status)
    const ended = this.#catalog.list('history').map((record) => record.status as JobStatus)
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

  /** The job that works on a disk in the given way, if any. */
  find(test: (record: JobRecord) => boolean): Job | undefined {
    return [...this.#running.values()].find(({ record }) => test(record()))?.job
  }

  /** Resolves when the job is no longer running. */
  async ended(id: string): Promise<JobStatus> {
    await this.#running.get(id)?.ended
    return this.status(id)
  }

  /** Says a verb to a job and keeps what must outlive a restart. */
  say(id: string, verb: 'pause' | 'resume' | 'cancel'): JobStatus {
    const job = this.running(id)
    job[verb]()
    const record = this.#catalog.get('job', id)
    if (record !== undefined && verb !== 'cancel') {
      this.#catalog.commit([{ put: 'job', record: { ...record, paused: verb === 'pause' } }])
    }
    return job.status
  }

  /**
   * Runs `work` as a job whose row is already in the catalog. When it ends, the row goes and the history has it; when
   * it is suspended, the row stays.
   */
  launch(job: Job, record: JobRecord, work: () => Promise<void>): void {
    const run = async (): Promise<void> => {
      try {
        job.move('running')
        if (record.paused) job.pause()
        await work()
        job.move('concluded')
      } catch (error) {
        if (job.suspended) return
        job.fail(error)
        job.move('concluded')
      } finally {
        this.#end(job)
      }
    }
    // The table knows the job before the work begins.
    const ended = Promise.resolve().then(run)
    this.#running.set(job.id, { job, record: () => this.#catalog.get('job', record.id) ?? record, ended })
  }

  /** Ends all jobs at their next pause point, to go on after a restart. */
  async suspendAll(): Promise<void> {
    const all = [...this.#running.values()]
    for (const { job } of all) job.suspend()
    await Promise.all(all.map(({ ended }) => ended))
  }

  #end(job: Job): void {
    this.#running.delete(job.id)
    if (job.suspended && job.state !== 'concluded') return
    const old = this.#catalog.list('history')
    this.#catalog.commit([
      { remove: 'job', id: job.id },
      { put: 'history', record: { id: job.id, status: job.status } },
      ...old
        .slice(0, Math.max(0, old.length + 1 - JOBS_KEPT))
        .map((record) => ({ remove: 'history' as const, id: record.id })),
    ])
  }
}
