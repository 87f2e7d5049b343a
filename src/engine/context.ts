// What the parts of the engine share: the host, the catalog, the open disks, the jobs and the budgets.

import type { Mutex } from '../base/mutex.ts'
import type { BackupParty } from './backup-party.ts'
import type { Bitmap } from '../bitmap/bitmap.ts'
import type { BlockDevice } from '../block/device.ts'
import type { Disk } from '../chain/disk.ts'
import type { ScratchBudget } from '../chain/scratch-budget.ts'
import { BlockError } from '../block/error.ts'
import { withCacheMode } from '../host/cache-mode.ts'
import type { Host } from '../host/host.ts'
import type { PartPace } from '../job/backup.ts'
import type { Bandwidth } from '../job/bandwidth.ts'
import type { MirrorPace } from '../job/mirror.ts'
import type { MergePaces } from '../job/settler.ts'
import type { Repository } from '../repository/repository.ts'
import { refuseAway } from './authority.ts'
import type { Turn } from './backup-queue.ts'
import type { Catalog, DiskRecord } from './catalog.ts'
import type { GuestHold } from './guest-freezer.ts'
import type { Home } from './home.ts'
import type { LimitDefaults } from './host-limits.ts'
import type { JobTable } from './job-table.ts'
import type { Peers } from './peers.ts'
import type { OpenView } from './views.ts'

/** A disk's export while it is served. */
export interface Served {
  /** Where a guest attaches. */
  readonly uri: string
  /** Answers what is in flight, then hangs up. */
  close(): Promise<void>
  /** Hangs up at once, without an answer to what is in flight: a client that reconnects asks again. */
  sever(): void
}

/** Serves a disk under its name, or another one. */
export type ServeDisk = (disk: Disk, socket: string, name?: string) => Promise<Served>

/** Serves a device under its own name: for reading only, unless a view's reader may say by TRIM what it has read. */
export type ServeView = (device: BlockDevice, socket: string, how?: ViewServing) => Promise<Served>

/** What a view has besides its device. */
export interface ViewServing {
  /** The name of the bitmap that says what changed, and the bits. */
  readonly changed?: { readonly name: string; readonly bits: Bitmap } | undefined
  /** A reader came, or went. */
  readonly opened: () => void
  readonly closed: () => void
}

/** An open disk. */
export interface ManagedDisk {
  readonly disk: Disk
  /** Its guests' export; undefined while it is not ours. */
  served: Served | undefined
  /** What the daemon has of it that it comes, or came, from. */
  peerServed: Served | undefined
  /** The snapshots that are served, by name. */
  readonly exports: Map<string, Served>
  /** Held by whatever changes the chain or the catalog's record of it. */
  readonly control: Mutex
  /** Held from where a backup's moment is prepared until it is taken, and while a revert changes what the disk shows. */
  readonly moment: Mutex
  /** The catalog's record, as last committed. */
  record: DiskRecord
}

/** A disk of the catalog that could not be opened, and why. */
export interface FailedDisk {
  readonly record: DiskRecord
  readonly error: BlockError
}

export interface EngineContext {
  readonly host: Host
  readonly home: Home
  readonly catalog: Catalog
  readonly jobs: JobTable
  readonly disks: Map<string, ManagedDisk>
  readonly failed: Map<string, FailedDisk>
  readonly serve: ServeDisk
  readonly serveView: ServeView
  readonly openRepository: (location: string) => Promise<Repository>
  readonly peers: Peers
  /** Tokens of migrations whose disks an operator takes back without the target's word. */
  readonly takenBack: Set<string>
  /** Those of the host's limits that the daemon was started with. */
  readonly limitDefaults: LimitDefaults
  readonly mirrorPace: MirrorPace
  readonly mergePaces: MergePaces
  /** Those that can be read, by their jobs' ids. */
  readonly views: Map<string, OpenView>
  /** As of an engine's options. */
  readonly partPace: PartPace | undefined
  readonly scratchBudget: ScratchBudget
  readonly scratchMemory: ScratchBudget
  /** What all backups of the host may copy in a second. */
  readonly bandwidth: Bandwidth
  /** Who freezes guests for a moment. */
  readonly guests: GuestHold
  /** Whose turn it is to be backed up. */
  readonly backupTurn: Turn
  /** Who answers for a disk in a backup; kind 'not-found' when there is no such disk. */
  readonly partyOf: (disk: string) => BackupParty
  /** Tells the operator, through the daemon's log. */
  readonly report: (message: string, details?: Record<string, unknown>) => void
}

/** The host as the images of a disk are opened on it. */
export function imageHost(context: EngineContext, record: DiskRecord): Host {
  return withCacheMode(context.host, record.cache ?? 'writeback')
}

/** A disk that is ours. Kind 'not-found' when there is no such disk, 'busy' when it is not, or not yet; the reason when it could not be opened. */
export function findDisk(context: EngineContext, name: string): ManagedDisk {
  const managed = findAny(context, name)
  refuseAway(managed.record)
  return managed
}

/** A disk that is open, whoever has the authority over it. */
export function findAny(context: EngineContext, name: string): ManagedDisk {
  const managed = context.disks.get(name)
  if (managed !== undefined) return managed
  const failed = context.failed.get(name)
  if (failed !== undefined) {
    const message = `disk ${name} is not open: ${failed.error.message}`
    throw new BlockError(failed.error.kind, message, failed.error.place, failed.error)
  }
  throw new BlockError('not-found', `there is no disk ${name}: varve disk list shows those there are`)
}

/** Kind 'invalid-argument' unless the word can be a name: in messages, file names and URIs alike. */
export function checkName(what: string, name: string): void {
  if (/^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/.test(name)) return
  const message = `${what} name ${JSON.stringify(name)}: use 1 to 64 letters, digits, '.', '_' and '-', first a letter or digit`
  throw new BlockError('invalid-argument', message)
}
