// The engine: sole owner of disks, exports and jobs, of all of a home or of those of one shard. Opens what the catalog has,
// finishes what a crash left, lets jobs go on, and does what the API asks. Its parts: disk-opener, snapshots, clones, claims, bitmaps,
// internal-bitmaps, reverts, branches, commits, streams, restores, overwrites, mirrors, migrations, incoming, settling, deletion, conflicts, backups, backup-party, views, job-table.

import { randomBytes } from 'node:crypto'
import { Mutex } from '../base/mutex.ts'
import { COPY_PIECE, MIRROR_SETTLE_BYTES } from '../base/limits.ts'
import { toBlockError } from '../block/error.ts'
import type { Disk } from '../chain/disk.ts'
import type { Format } from '../chain/open.ts'
import { warningOf } from '../host/cache-mode.ts'
import type { HostFile } from '../host/host.ts'
import type { JobStatus, PlainVerb } from '../job/job.ts'
import type { MirrorFinish, MirrorMode } from '../job/mirror.ts'
import { MERGE_PACES } from '../job/settler.ts'
import type { JobTerms } from '../job/terms.ts'
import { type BackupParty, LocalParty } from './backup-party.ts'
import { diskOfToken, ensureIdentity } from './authority.ts'
import { sideOf } from './branches.ts'
import { type BitmapComparison, type BitmapEdit, compareBitmaps, editBitmaps } from './bitmaps.ts'
import { type BackupRequest, launchQueued, settleBackups, startBackup } from './backups.ts'
import { type CatalogChange, type DiskRecord, disksOf, type JobRecord, type LayerRecord } from './catalog.ts'
import { prepareClone } from './clones.ts'
import { planCommit, startCommit } from './commits.ts'
import { refuseConflict } from './conflicts.ts'
import { type EngineContext, findAny, findDisk, type ManagedDisk } from './context.ts'
import { type Direction, startDeletion } from './deletion.ts'
import { closeManagedDisk, letGo, openManagedDisk, type Opening } from './disk-opener.ts'
import { type DiskStatus, statusOf, statusOfFailed } from './disk-status.ts'
import type { EngineOptions, EngineShard } from './engine-options.ts'
import { lockHome } from './home.ts'
import { hostOf } from './host-desk.ts'
import { limitDefaultsOf } from './host-limits.ts'
import { checkIncoming, Incoming } from './incoming.ts'
import { depositBitmaps } from './internal-bitmaps.ts'
import { JobTable } from './job-table.ts'
import { type MigrateRequest, startMigration } from './migrations.ts'
import { completeMirror, type MirrorRequest, startMirror } from './mirrors.ts'
import { checkNewDisk, type DiskTerms, makeImage, noteOnImage, readLayers } from './new-disk.ts'
import { type IncomingReply, type IncomingRequest, type IncomingStep, noPeers } from './peers.ts'
import { removeDisk, removeFolder } from './removal.ts'
import { resizeDisk } from './resize.ts'
import { type OverwriteRequest, startOverwrite } from './overwrites.ts'
import { type RestoreRequest, startRestore } from './restores.ts'
import { resumeRows } from './resume.ts'
import { dropSideSnapshot, revertDisk } from './reverts.ts'
import { openForwarded, settleDisk } from './settling.ts'
import { LocalSnapshotParty, type NewSnapshot, type SnapshotParty, snapshotTogether } from './snapshot-party.ts'
import { listSnapshots, removeGarbage, type SnapshotInfo } from './snapshots.ts'
import { exportSnapshot, unexportSnapshot } from './snapshot-exports.ts'
import { planStream, startStream } from './streams.ts'
import { openView, stepView, type ViewRequest, type ViewStep } from './views.ts'
import { startVmJob, type VmJobRequest } from './vm-jobs.ts'

export class Engine {
  readonly #context: EngineContext
  readonly #lock: HostFile | undefined
  readonly #shard: EngineShard | undefined
  readonly #control = new Mutex()
  readonly #incoming: Incoming

  private constructor(context: EngineContext, lock: HostFile | undefined, shard: EngineShard | undefined) {
    this.#context = context
    this.#lock = lock
    this.#shard = shard
    this.#incoming = new Incoming(context, (name) => this.removeDisk(name))
  }

  /** Opens the home. Kind 'busy' when another daemon has it. A disk that cannot be opened does not stop the others. */
  static async open(options: EngineOptions): Promise<Engine> {
    const { host, home, shard } = options
    const lock = shard === undefined ? await lockHome(host, home) : undefined
    try {
      const engine = await Engine.#openLocked(options, lock)
      if (shard !== undefined) return engine
      await engine.settleBackups()
      await engine.resumeJobs()
      return engine
    } catch (error) {
      await lock?.close()
      throw error
    }
  }

  static async #openLocked(options: EngineOptions, lock: HostFile | undefined): Promise<Engine> {
    const { host, home, shard } = options
    const catalog = options.openCatalog()
    const disks = new Map<string, ManagedDisk>()
    const limitDefaults = limitDefaultsOf(options)
    const own = shard ?? hostOf(catalog, limitDefaults, options.report)
    // Of several engines in one home the control plane sees to it.
    if (shard === undefined) await ensureIdentity(catalog)
    const context: EngineContext = {
      host,
      home,
      catalog,
      jobs: new JobTable(catalog, disks, options.report, shard?.farEar),
      disks,
      failed: new Map(),
      serve: options.serve,
      serveView: options.serveView,
      openRepository: options.openRepository,
      peers: options.peers ?? noPeers,
      takenBack: new Set(),
      limitDefaults,
      mergePaces: options.mergePaces ?? MERGE_PACES,
      partPace: options.partPace,
      views: new Map(),
      mirrorPace: options.mirrorPace ?? { piece: COPY_PIECE, settleBytes: MIRROR_SETTLE_BYTES },
      scratchBudget: own.scratch,
      scratchMemory: own.scratchMemory,
      bandwidth: own.bandwidth,
      backupTurn: own.backupTurn,
      guests: own.guests,
      partyOf: (disk) => engine.#partyOf(disk),
      report: options.report,
    }
    const engine = new Engine(context, lock, shard)
    try {
      for (const record of catalog.list('disk')) if (engine.#owns(record)) await engine.#openRecord(record)
    } catch (error) {
      catalog.close()
      throw error
    }
    return engine
  }

  listDisks(): DiskStatus[] {
    const records = this.#context.catalog.list('disk').filter((record) => this.#owns(record))
    return records.map((record) => this.showDisk(record.name))
  }

  /** Kind 'not-found' when there is no such disk. */
  showDisk(name: string): DiskStatus {
    const failed = this.#context.failed.get(name)
    return failed === undefined ? statusOf(findAny(this.#context, name)) : statusOfFailed(failed)
  }

  /** Takes an image into the catalog and serves it. Nothing is changed when that fails. */
  addDisk(name: string, image: string, format: Format, ...terms: DiskTerms): Promise<DiskStatus> {
    return this.#add(name, image, format, terms, {})
  }

  #add(
    name: string,
    image: string,
    format: Format,
    [cache = 'writeback', durability = 'host']: DiskTerms,
    by: { readonly made?: true },
  ): Promise<DiskStatus> {
    return this.#control.run(async () => {
      checkNewDisk(this.#context, name)
      const layers = (await readLayers(this.#context, name, image, format)).map((layer) => ({ ...layer, ...by }))
      const id = randomBytes(8).toString('hex')
      const record: DiskRecord = { id, name, layers, addedMs: Date.now(), nextOverlay: 1, cache, durability }
      try {
        await this.#openNew(record)
      } catch (error) {
        await removeFolder(this.#context, record)
        throw error
      }
      const note = warningOf(cache) ?? (await noteOnImage(this.#context, image, format))
      return { ...this.showDisk(name), ...(note === undefined ? {} : { note }) }
    })
  }

  /** Makes an image and adds it. Kind 'exists' when there is something at the path. */
  async createDisk(
    name: string,
    image: string,
    format: Format,
    size: number,
    ...terms: DiskTerms
  ): Promise<DiskStatus> {
    checkNewDisk(this.#context, name)
    await makeImage(this.#context, image, format, size)
    try {
      return await this.#add(name, image, format, terms, { made: true })
    } catch (error) {
      await this.#context.host.unlink(image)
      throw error
    }
  }

  /** Makes a disk larger; see `resizeDisk`. */
  async resizeDisk(name: string, size: number): Promise<DiskStatus> {
    await resizeDisk(this.#context, findDisk(this.#context, name), size)
    return this.showDisk(name)
  }

  async editBitmaps(name: string, edits: readonly BitmapEdit[]): Promise<DiskStatus> {
    await editBitmaps(findDisk(this.#context, name), edits)
    return this.showDisk(name)
  }

  /** See `depositBitmaps`. */
  async saveBitmaps(name: string, bitmap?: string): Promise<DiskStatus> {
    await depositBitmaps(findDisk(this.#context, name), bitmap)
    return this.showDisk(name)
  }

  compareBitmaps(disk: string, first: string, second: string): BitmapComparison {
    return compareBitmaps(findDisk(this.#context, disk), first, second)
  }

  /** Makes a new disk over a snapshot of another one, whose layers they then share; see `prepareClone`. */
  clone(disk: string, snapshot: string, name: string, image?: string): Promise<DiskStatus> {
    return this.#control.run(async () => {
      checkNewDisk(this.#context, name)
      const context = this.#context
      const origin = findDisk(context, disk)
      return origin.control.run(async () => {
        refuseConflict(context, disk, 'clone')
        const record = await prepareClone(context, origin, snapshot, name, image)
        const { path: file } = record.layers.at(-1) as LayerRecord
        try {
          await this.#openNew(record, [{ remove: 'garbage', id: file }])
        } catch (error) {
          await removeFolder(this.#context, record)
          await removeGarbage(context, file)
          throw error
        }
        return this.showDisk(name)
      })
    })
  }

  /** See `removeDisk`. */
  removeDisk(name: string): Promise<void> {
    return this.#control.run(() => removeDisk(this.#context, name))
  }

  /** Freezes the disk's present state under a name. Kinds 'exists' for a name in use, 'busy' while layers are merged. */
  async createSnapshot(disk: string, name: string): Promise<NewSnapshot> {
    return (await this.createSnapshots([disk], name))[0] as NewSnapshot
  }

  /** The same of several disks at one moment, of all or of none. */
  async createSnapshots(disks: readonly string[], name: string): Promise<NewSnapshot[]> {
    const parties = disks.map((disk) => this.snapshotPartyOf(disk))
    return snapshotTogether(parties, name, (changes) => this.#context.catalog.commit(changes))
  }

  /** A disk's side of a snapshot that several engines take. */
  snapshotPartyOf(disk: string): SnapshotParty {
    return new LocalSnapshotParty(this.#context, findDisk(this.#context, disk))
  }

  /** Serves a snapshot for reading only, over restarts too; returns its URI. */
  exportSnapshot(disk: string, snapshot: string): Promise<string> {
    return exportSnapshot(this.#context, findDisk(this.#context, disk), snapshot)
  }

  unexportSnapshot(disk: string, snapshot: string): Promise<void> {
    return unexportSnapshot(this.#context, findDisk(this.#context, disk), snapshot)
  }

  listSnapshots(disk: string): SnapshotInfo[] {
    return listSnapshots(findDisk(this.#context, disk))
  }

  /** See `revertDisk`. */
  revert(disk: string, snapshot: string, keep?: string): Promise<void> {
    return revertDisk(this.#context, findDisk(this.#context, disk), snapshot, keep)
  }

  /** Merges the layer of a snapshot with the one above it, in the cheaper direction unless told; of one beside the chain, takes its name away, and its file if nothing needs it. */
  async deleteSnapshot(
    disk: string,
    snapshot: string,
    direction: Direction = 'auto',
    terms: JobTerms = {},
  ): Promise<JobStatus> {
    const managed = findDisk(this.#context, disk)
    if (sideOf(managed.record).some((layer) => layer.snapshot?.name === snapshot)) {
      return (await dropSideSnapshot(this.#context, managed, snapshot)).status
    }
    return (await startDeletion(this.#context, managed, snapshot, direction, terms)).status
  }

  /** The snapshots that a commit would end. */
  planCommit(disk: string, from?: string, to?: string): readonly string[] {
    return planCommit(findDisk(this.#context, disk), from, to).ends
  }

  async commit(disk: string, from?: string, to?: string, terms: JobTerms = {}): Promise<JobStatus> {
    const managed = findDisk(this.#context, disk)
    return (await startCommit(this.#context, managed, () => planCommit(managed, from, to), terms)).status
  }

  /** The snapshots that a stream would end. */
  planStream(disk: string, base?: string, to?: string): readonly string[] {
    return planStream(findDisk(this.#context, disk), base, to).ends
  }

  async stream(disk: string, base?: string, to?: string, terms: JobTerms = {}): Promise<JobStatus> {
    const managed = findDisk(this.#context, disk)
    return (await startStream(this.#context, managed, () => planStream(managed, base, to), terms)).status
  }

  /** Makes a disk over a backup, which is served when this resolves; the rest comes as a job. */
  restore(request: RestoreRequest): Promise<JobStatus> {
    return this.#control.run(async () => {
      checkNewDisk(this.#context, request.name)
      const job = await startRestore(this.#context, request, (...made) => this.#openNew(...made))
      return job.status
    })
  }

  /** Makes a disk what it was in a backup; it is withdrawn when this resolves, and served again when the job is done. */
  async restoreOnto(disk: string, request: OverwriteRequest): Promise<JobStatus> {
    return (await startOverwrite(this.#context, findDisk(this.#context, disk), request)).status
  }

  async mirror(disk: string, request: MirrorRequest): Promise<JobStatus> {
    return (await startMirror(this.#context, findDisk(this.#context, disk), request)).status
  }

  /** Resolves when the target has agreed; the copying goes on as a job. */
  async migrate(disk: string, request: MigrateRequest): Promise<JobStatus> {
    return (await startMigration(this.#context, findDisk(this.#context, disk), request)).status
  }

  /** See `settleDisk`. */
  async settleDisk(name: string, force: boolean): Promise<DiskStatus> {
    await settleDisk(this.#context, this.#incoming, name, force)
    return this.showDisk(name)
  }

  /** Makes a disk that is to be copied to here; see docs/internals/migration.md. Nothing is left when that fails. */
  prepareIncoming(request: IncomingRequest): Promise<IncomingReply> {
    return this.#control.run(async () => {
      checkIncoming(this.#context, request)
      checkNewDisk(this.#context, request.disk)
      const record = await this.#incoming.make(request, (made, besides) => this.#openNew(made, besides))
      return this.#incoming.reply(record)
    })
  }

  /** Does what the source of a disk asks by its token; one that no disk has is answered so. */
  async stepIncoming(token: string, step: IncomingStep): Promise<IncomingReply> {
    const record = diskOfToken(this.#context.catalog, token)
    return record === undefined ? this.#incoming.reply(undefined) : this.#incoming.step(record, token, step)
  }

  completeJob(id: string, finish: MirrorFinish): Promise<JobStatus> {
    return completeMirror(this.#context, id, finish)
  }

  setMirrorMode(id: string, mode: MirrorMode): Promise<JobStatus> {
    return this.#context.jobs.setMode(id, mode)
  }

  /** Resolves when the backup's moment is taken; the copying goes on as a job. */
  async backup(request: BackupRequest): Promise<JobStatus> {
    return (await startBackup(this.#context, request)).status
  }

  /** Lets queued backups wait for their turns, whose rows are in the catalog. */
  launchQueued(ids: readonly string[]): JobStatus[] {
    const rows = ids.flatMap((id) => this.#context.catalog.get('job', id) ?? [])
    return launchQueued(
      this.#context,
      rows.filter((row) => this.#ownsJob(row)),
    )
  }

  /** See vm-jobs.ts. */
  readonly vmJob = (request: VmJobRequest): Promise<JobStatus> => startVmJob(this.#context, request)

  /** See views.ts. */
  readonly openView = async (request: ViewRequest): Promise<JobStatus> =>
    (await openView(this.#context, request)).status
  readonly stepView = (view: string, step: ViewStep): Promise<void> => stepView(this.#context, view, step)

  listJobs(): JobStatus[] {
    return this.#context.jobs.list()
  }

  showJob(id: string): JobStatus {
    return this.#context.jobs.status(id)
  }

  /** Calls back on every change of a running job; returns how to stop that. */
  watchJob(id: string, listener: (status: JobStatus) => void): () => void {
    return this.#context.jobs.watch(id, listener)
  }

  jobEnded(id: string): Promise<JobStatus> {
    return this.#context.jobs.ended(id)
  }

  sayToJob(id: string, verb: PlainVerb): Promise<JobStatus> {
    return this.#context.jobs.say(id, verb)
  }

  /** Marks an ended job as seen: only the history has it from then on. */
  dismissJob(id: string): Promise<void> {
    return this.#context.jobs.dismiss(id)
  }

  setJobSpeed(id: string, bytesPerSecond: number): Promise<JobStatus> {
    return this.#context.jobs.setSpeed(id, bytesPerSecond)
  }

  /** Suspends the jobs, to go on after a restart; resolves when none runs any more, and none begins. */
  async stopJobs(): Promise<void> {
    this.#context.jobs.stop()
    // A job may wait for a guest's write, and that for a repository.
    for (const managed of this.#context.disks.values()) letGo(managed)
    await this.#context.jobs.allEnded()
  }

  /** Suspends the jobs, stops serving and leaves every image clean. Nothing can be asked of the engine afterwards. */
  async close(): Promise<void> {
    await this.stopJobs()
    // What was asked for and has not begun ends here: nobody gets this lock after.
    await this.#control.acquire()
    await this.#context.jobs.allEnded()
    for (const managed of this.#context.disks.values()) {
      try {
        await closeManagedDisk(this.#context, managed)
      } catch (error) {
        this.#context.report(`${managed.record.name}: closing failed: ${(error as Error).message}`)
      }
    }
    this.#context.catalog.close()
    await this.#lock?.close()
  }

  /** A disk of this engine, for jobs elsewhere that make way for its guests. Kind 'not-found'. */
  diskNamed(name: string): Disk {
    return findDisk(this.#context, name).disk
  }

  /** This engine's side of a backup, for one that runs in another shard too. */
  partyOf(disk: string): BackupParty {
    return new LocalParty(this.#context, findDisk(this.#context, disk))
  }

  /**
   * Settles the bits that backups left pending on this engine's disks: of all, or of those whose jobs `of` says. Of jobs that still
   * run they must not be. Before `resumeJobs`, and where there are several engines, of all of them before that of any.
   */
  async settleBackups(of?: (row: JobRecord) => boolean): Promise<void> {
    const rows = this.#context.catalog.list('job').filter(({ spec }) => 'disks' in spec)
    await settleBackups(this.#context, of === undefined ? { rows, all: true } : { rows: rows.filter(of), all: false })
  }

  /** Opens and serves a new disk, and takes it into the catalog, with other changes; all of it or nothing. */
  async #openNew(record: DiskRecord, besides: readonly CatalogChange[] = [], opening: Opening = {}): Promise<void> {
    const managed = await openManagedDisk(this.#context, record, opening)
    try {
      await this.#context.catalog.commit([{ put: 'disk', record }, ...besides])
    } catch (error) {
      await closeManagedDisk(this.#context, managed)
      throw error
    }
    this.#context.disks.set(record.name, managed)
  }

  async #openRecord(record: DiskRecord): Promise<void> {
    try {
      const open = record.away === undefined ? openManagedDisk : openForwarded
      this.#context.disks.set(record.name, await open(this.#context, record))
    } catch (error) {
      const failure = toBlockError(error, `disk ${record.name}`)
      this.#context.failed.set(record.name, { record, error: failure })
      this.#context.report(
        record.away === undefined
          ? `disk ${record.name} cannot be opened: ${failure.message}`
          : `disk ${record.name}: ${failure.message}`,
      )
    }
  }

  #owns(record: DiskRecord): boolean {
    return this.#shard?.owns(record.id) ?? true
  }

  /** A backup is the affair of its first disk's engine. */
  #ownsJob({ spec }: JobRecord): boolean {
    const [name] = disksOf(spec)
    if (name === undefined) return this.#shard?.hasMachines ?? true
    const record = this.#context.catalog.list('disk').find((disk) => disk.name === name)
    return record === undefined ? this.#shard === undefined : this.#owns(record)
  }

  #partyOf(disk: string): BackupParty {
    const record = this.#context.catalog.list('disk').find(({ name }) => name === disk)
    const isForeign = record !== undefined && !this.#owns(record)
    return isForeign && this.#shard !== undefined ? this.#shard.partyOf(disk) : this.partyOf(disk)
  }

  /** Lets the jobs go on that a restart found. */
  resumeJobs(): Promise<void> {
    const rows = this.#context.catalog.list('job').filter((row) => this.#ownsJob(row))
    return resumeRows(this.#context, rows)
  }
}
