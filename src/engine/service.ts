// What the API asks of the engine, whether that is an Engine in this thread or several of them in shards. Every answer is plain
// data, so that it can cross threads.

import type { Format } from '../chain/open.ts'
import type { Durability } from '../dirtylog/dirty-log.ts'
import type { CacheMode } from '../host/cache-mode.ts'
import type { JobStatus, PlainVerb } from '../job/job.ts'
import type { MirrorFinish, MirrorMode } from '../job/mirror.ts'
import type { JobTerms } from '../job/terms.ts'
import type { BackupRequest } from './backups.ts'
import type { QueueRequest } from './queued-backups.ts'
import type { BitmapComparison, BitmapEdit } from './bitmaps.ts'
import type { Direction } from './deletion.ts'
import type { DiskStatus } from './disk-status.ts'
import type { HostDesk } from './host-desk.ts'
import type { Machines } from './machines.ts'
import type { MigrateRequest } from './migrations.ts'
import type { MirrorRequest } from './mirrors.ts'
import type { IncomingReply, IncomingRequest, IncomingStep } from './peers.ts'
import type { OverwriteRequest } from './overwrites.ts'
import type { RestoreRequest } from './restores.ts'
import type { NewSnapshot } from './snapshot-party.ts'
import type { SnapshotInfo } from './snapshots.ts'
import type { ViewRequest, ViewStep } from './views.ts'
import type { VmJobRequest } from './vm-jobs.ts'
import type { Vms } from './vms.ts'

type Soon<T> = T | Promise<T>

export interface EngineService {
  readonly machines: Machines
  readonly vms: Vms
  readonly host: Pick<HostDesk, 'show' | 'set'>
  listDisks(): Soon<DiskStatus[]>
  showDisk(name: string): Soon<DiskStatus>
  /** `cache` is writeback unless told, and `durability` of its bitmaps host. */
  addDisk(name: string, image: string, format: Format, cache?: CacheMode, durability?: Durability): Promise<DiskStatus>
  createDisk(
    name: string,
    image: string,
    format: Format,
    size: number,
    cache?: CacheMode,
    durability?: Durability,
  ): Promise<DiskStatus>
  /** `image` is the clone's own; beside the origin's base unless told. */
  clone(disk: string, snapshot: string, name: string, image?: string): Promise<DiskStatus>
  resizeDisk(name: string, size: number): Promise<DiskStatus>
  removeDisk(name: string): Promise<void>
  /** At one moment, all or none. */
  editBitmaps(disk: string, edits: readonly BitmapEdit[]): Promise<DiskStatus>
  saveBitmaps(disk: string, bitmap?: string): Promise<DiskStatus>
  compareBitmaps(disk: string, first: string, second: string): Soon<BitmapComparison>
  /** Serves a disk on TCP again that is held since the host stopped uncleanly; kind 'invalid-argument' when it is not held. */
  releaseDisk(name: string): Promise<void>
  listSnapshots(disk: string): Soon<SnapshotInfo[]>
  createSnapshot(disk: string, name: string): Promise<NewSnapshot>
  /** Of all at one moment, or of none; a machine's name stands for its disks. */
  createSnapshots(disks: readonly string[], name: string): Promise<NewSnapshot[]>
  exportSnapshot(disk: string, snapshot: string): Promise<string>
  unexportSnapshot(disk: string, snapshot: string): Promise<void>
  revert(disk: string, snapshot: string, keep?: string): Promise<void>
  deleteSnapshot(disk: string, snapshot: string, direction?: Direction, terms?: JobTerms): Promise<JobStatus>
  planCommit(disk: string, from?: string, to?: string): Soon<readonly string[]>
  commit(disk: string, from?: string, to?: string, terms?: JobTerms): Promise<JobStatus>
  planStream(disk: string, base?: string, to?: string): Soon<readonly string[]>
  stream(disk: string, base?: string, to?: string, terms?: JobTerms): Promise<JobStatus>
  /** A new disk over a backup, served when it resolves; the job brings the rest. */
  restore(request: RestoreRequest): Promise<JobStatus>
  /** The disk is withdrawn when it resolves, and served again when the job is done. */
  restoreOnto(disk: string, request: OverwriteRequest): Promise<JobStatus>
  mirror(disk: string, request: MirrorRequest): Promise<JobStatus>
  migrate(disk: string, request: MigrateRequest): Promise<JobStatus>
  /** Ends what a migration left of a disk, by asking the other side, or by force without its word. */
  settleDisk(name: string, force: boolean): Promise<DiskStatus>
  /** What the source of a migration asks of its target. */
  prepareIncoming(request: IncomingRequest): Promise<IncomingReply>
  stepIncoming(token: string, step: IncomingStep): Promise<IncomingReply>
  completeJob(id: string, finish: MirrorFinish): Promise<JobStatus>
  setMirrorMode(id: string, mode: MirrorMode): Promise<JobStatus>
  backup(request: BackupRequest): Promise<JobStatus>
  /** Has each machine backed up when its turn comes; all of the home when none is named. Resolves when all of them are queued, or none. */
  queueBackups(request: QueueRequest): Promise<JobStatus[]>
  /** Has QEMU merge or copy a disk of a machine of its own; a job of that kind that is at it already is the answer. */
  vmJob(request: VmJobRequest): Promise<JobStatus>
  openView(request: ViewRequest): Promise<JobStatus>
  /** What a client says of a view that it reads. Kind 'closed' when that has ended. */
  stepView(view: string, step: ViewStep): Promise<void>
  listJobs(): Soon<JobStatus[]>
  showJob(id: string): Soon<JobStatus>
  sayToJob(id: string, verb: PlainVerb): Promise<JobStatus>
  dismissJob(id: string): Promise<void>
  setJobSpeed(id: string, bytesPerSecond: number): Promise<JobStatus>
  /** Calls back on changes of a running job, with how it is then; resolves when no further one is missed, with how to stop that. */
  watchJob(id: string, listener: (status: JobStatus) => void): Soon<() => void>
  /** Resolves when the job is no longer running. */
  jobEnded(id: string): Promise<JobStatus>
  close(): Promise<void>
}
