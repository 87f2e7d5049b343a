// The engine: sole owner of disks, exports and jobs. Opens what the catalog has, finishes what a crash left, lets jobs go
// on, and does what the API asks. Its parts: disk-opener, snapshots, commits, backups, job-table.

import path from 'node:path'
import { randomBytes } from 'node:crypto'
import { Mutex } from '../base/mutex.ts'
import { SCRATCH_BYTES, SCRATCH_HOST_BYTES } from '../base/limits.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import { ScratchBudget } from '../chain/scratch.ts'
import { type Format, openChain } from '../chain/open.ts'
import { createQcow2 } from '../format/qcow2/create.ts'
import { createRaw } from '../format/raw/raw.ts'
import type { Host, HostFile } from '../host/host.ts'
import type { JobStatus } from '../job/job.ts'
import type { Repository } from '../repository/repository.ts'
import { type BackupRequest, resumeBackups, startBackup } from './backups.ts'
import type { Catalog, DiskRecord, LayerRecord } from './catalog.ts'
import { launchCommit, planCommit, planSnapshotDelete, startCommit } from './commits.ts'
import { checkName, type EngineContext, findDisk, type ServeDisk } from './context.ts'
import { closeManagedDisk, openManagedDisk } from './disk-opener.ts'
import { checkSocketPath } from '../nbd/uri.ts'
import type { Home } from './home.ts'
import { JobTable } from './job-table.ts'
import { createSnapshot, listSnapshots, type SnapshotInfo } from './snapshots.ts'

export interface EngineOptions {
  readonly host: Host
  readonly home: Home
  readonly catalog: Catalog
  readonly serve: ServeDisk
  readonly openRepository: (location: string) => Promise<Repository>
  readonly report: (message: string, details?: Record<string, unknown>) => void
  /** Copy space of one backup and of all together, in bytes. */
  readonly scratchBytes?: number
  readonly scratchHostBytes?: number
}

export interface BitmapStatus {
  readonly name: string
  readonly granule: number
  readonly recording: boolean
  readonly state: 'valid' | 'void'
  /** Bytes that the set granules cover. */
  readonly dirtyBytes: number
}

export interface DiskStatus {
  readonly name: string
  readonly state: 'open' | 'failed'
  readonly error: string | undefined
  /** Bytes; 0 when the disk is not open. */
  readonly size: number
  readonly uri: string | undefined
  /** From base to active. */
  readonly layers: readonly LayerRecord[]
  readonly bitmaps: readonly BitmapStatus[]
}

export class Engine {
  readonly #context: EngineContext
  readonly #lock: HostFile
  readonly #control = new Mutex()

  private constructor(context: EngineContext, lock: HostFile) {
    this.#context = context
    this.#lock = lock
  }

  /** Opens the home. Kind 'busy' when another daemon has it. A disk that cannot be opened does not stop the others. */
  static async open(options: EngineOptions): Promise<Engine> {
    const { host, home, catalog } = options
    const lock = await host.open(home.lock, { write: true, create: 'if-missing', lock: 'write' })
    const context: EngineContext = {
      host,
      home,
      catalog,
      jobs: new JobTable(catalog),
      disks: new Map(),
      failed: new Map(),
      serve: options.serve,
      openRepository: options.openRepository,
      scratchBytes: options.scratchBytes ?? SCRATCH_BYTES,
      scratchBudget: new ScratchBudget(options.scratchHostBytes ?? SCRATCH_HOST_BYTES),
      backupQueue: new Mutex(),
      report: options.report,
    }
    const engine = new Engine(context, lock)
    for (const record of catalog.list('disk')) await engine.#openRecord(record)
    await engine.#resumeJobs()
    return engine
  }

  listDisks(): DiskStatus[] {
    return this.#context.catalog.list('disk').map((record) => this.showDisk(record.name))
  }

  /** Kind 'not-found' when there is no such disk. */
  showDisk(name: string): DiskStatus {
    const failed = this.#context.failed.get(name)
    if (failed !== undefined) {
      const { layers } = failed.record
      return { name, state: 'failed', error: failed.error.message, size: 0, uri: undefined, layers, bitmaps: [] }
    }
    const { disk, record, served } = findDisk(this.#context, name)
    const bitmaps = [...disk.log.bitmaps.values()].map(({ name: bitmap, bits, recording, state }) => ({
      name: bitmap,
      granule: bits.granule,
      recording,
      state,
      dirtyBytes: bits.bytes,
    }))
    return { name, state: 'open', error: undefined, size: disk.size, uri: served.uri, layers: record.layers, bitmaps }
  }

  /** Takes an image into the catalog and serves it. Nothing is changed when that fails. */
  addDisk(name: string, image: string, format: Format): Promise<DiskStatus> {
    return this.#control.run(async () => {
      await this.#checkNewDisk(name)
      const layers = await this.#readLayers(name, image, format)
      this.#refuseSharedLayers(name, layers)
      const id = randomBytes(8).toString('hex')
      const record: DiskRecord = { id, name, layers, addedMs: Date.now(), nextOverlay: 1 }
      const managed = await openManagedDisk(this.#context, record)
      this.#context.catalog.commit([{ put: 'disk', record }])
      this.#context.disks.set(name, managed)
      return this.showDisk(name)
    })
  }

  /** Makes an image and adds it. Kind 'exists' when there is something at the path. */
  async createDisk(name: string, image: string, format: Format, size: number): Promise<DiskStatus> {
    await this.#checkNewDisk(name)
    const { host } = this.#context
    if (format === 'raw') await createRaw(host, image, size)
    else await createQcow2(host, image, { size })
    try {
      return await this.addDisk(name, image, format)
    } catch (error) {
      await host.unlink(image)
      throw error
    }
  }

  /** Takes a disk out of the catalog. Its images stay where they are, clean for any other program. */
  removeDisk(name: string): Promise<void> {
    return this.#control.run(async () => {
      const context = this.#context
      const failed = context.failed.get(name)
      const record = failed?.record ?? findDisk(context, name).record
      const job = context.jobs.find(({ spec }) =>
        spec.kind === 'commit' ? spec.disk === name : spec.disks.includes(name),
      )
      if (job !== undefined)
        throw new BlockError('busy', `disk ${name} is in use by job ${job.id}: varve job cancel ${job.id}`)
      const managed = context.disks.get(name)
      if (managed !== undefined) await closeManagedDisk(context, managed)
      context.disks.delete(name)
      context.failed.delete(name)
      const garbage = context.catalog.list('garbage').filter(({ disk }) => disk === record.id)
      context.catalog.commit([
        { remove: 'disk', id: record.id },
        ...garbage.map(({ id }) => ({ remove: 'garbage' as const, id })),
      ])
      const folder = context.home.diskFolder(record.id)
      for (const file of await context.host.list(folder)) await context.host.unlink(path.join(folder, file))
    })
  }

  createSnapshot(disk: string, name: string): Promise<SnapshotInfo> {
    return createSnapshot(this.#context, findDisk(this.#context, disk), name)
  }

  listSnapshots(disk: string): SnapshotInfo[] {
    return listSnapshots(findDisk(this.#context, disk))
  }

  /** Merges the layer above a snapshot into it. */
  async deleteSnapshot(disk: string, snapshot: string, speed: number): Promise<JobStatus> {
    const managed = findDisk(this.#context, disk)
    return (await startCommit(this.#context, managed, planSnapshotDelete(managed, snapshot), speed)).status
  }

  /** The snapshots that a commit would end. */
  planCommit(disk: string, from?: string, to?: string): readonly string[] {
    return planCommit(findDisk(this.#context, disk), from, to).ends
  }

  async commit(disk: string, from: string | undefined, to: string | undefined, speed: number): Promise<JobStatus> {
    const managed = findDisk(this.#context, disk)
    return (await startCommit(this.#context, managed, planCommit(managed, from, to), speed)).status
  }

  /** Resolves when the backup's moment is taken; the copying goes on as a job. */
  async backup(request: BackupRequest): Promise<JobStatus> {
    return (await startBackup(this.#context, request)).status
  }

  listJobs(): JobStatus[] {
    return this.#context.jobs.list()
  }

  showJob(id: string): JobStatus {
    return this.#context.jobs.status(id)
  }

  /** Calls back on every change of a running job; returns how to stop that. */
  watchJob(id: string, listener: (status: JobStatus) => void): () => void {
    return this.#context.jobs.running(id).watch((job) => listener(job.status))
  }

  jobEnded(id: string): Promise<JobStatus> {
    return this.#context.jobs.ended(id)
  }

  sayToJob(id: string, verb: 'pause' | 'resume' | 'cancel'): JobStatus {
    return this.#context.jobs.say(id, verb)
  }

  setJobSpeed(id: string, bytesPerSecond: number): JobStatus {
    const job = this.#context.jobs.running(id)
    job.setSpeed(bytesPerSecond)
    return job.status
  }

  /** Suspends the jobs, stops serving and leaves every image clean. */
  async close(): Promise<void> {
    await this.#context.jobs.suspendAll()
    for (const managed of this.#context.disks.values()) {
      try {
        await closeManagedDisk(this.#context, managed)
      } catch (error) {
        this.#context.report(`${managed.record.name}: closing failed: ${(error as Error).message}`)
      }
    }
    this.#context.catalog.close()
    await this.#lock.close()
  }

  async #openRecord(record: DiskRecord): Promise<void> {
    try {
      this.#context.disks.set(record.name, await openManagedDisk(this.#context, record))
    } catch (error) {
      const failure = toBlockError(error, `disk ${record.name}`)
      this.#context.failed.set(record.name, { record, error: failure })
      this.#context.report(`disk ${record.name} cannot be opened: ${failure.message}`)
    }
  }

  async #resumeJobs(): Promise<void> {
    const context = this.#context
    const rows = context.catalog.list('job')
    await resumeBackups(
      context,
      rows.filter(({ spec }) => spec.kind === 'backup'),
    )
    for (const row of rows) {
      if (row.spec.kind !== 'commit') continue
      try {
        launchCommit(context, findDisk(context, row.spec.disk), row)
      } catch (error) {
        // A disk that is missing today may be back tomorrow: the row stays.
        context.report(`job ${row.id} cannot go on now: ${(error as Error).message}`)
      }
    }
  }

  async #checkNewDisk(name: string): Promise<void> {
    checkName('disk', name)
    checkSocketPath(this.#context.home.nbdSocket(name))
    if (!this.#context.catalog.list('disk').some((record) => record.name === name)) return
    throw new BlockError('exists', `there is a disk ${name} already: varve disk show ${name}`)
  }

  /** The chain of an image as the catalog will have it. Checks all that opening it checks, and closes it again. */
  async #readLayers(name: string, image: string, format: Format): Promise<LayerRecord[]> {
    const layers = await openChain({ host: this.#context.host, path: path.resolve(image), format, name })
    const records = layers.map((layer) => ({ path: layer.path, format: layer.format }))
    for (const layer of layers.toReversed()) await layer.close()
    return records
  }

  #refuseSharedLayers(name: string, layers: readonly LayerRecord[]): void {
    for (const record of this.#context.catalog.list('disk')) {
      const shared = record.layers.find((layer) => layers.some(({ path: other }) => other === layer.path))
      if (shared === undefined) continue
      const message = `disk ${name}: ${shared.path} belongs to disk ${record.name} already: varve disk show ${record.name}`
      throw new BlockError('exists', message)
    }
  }
}
