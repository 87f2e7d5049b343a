// What the control plane and a shard may ask of each other. All of it is plain data.

import type { DiskPlan, Outcome, PlanRequest } from '../engine/backup-party.ts'
import type { TurnWish } from '../engine/backup-queue.ts'
import type { CatalogChange } from '../engine/catalog.ts'
import type { IncomingReply, IncomingRequest, IncomingStep } from '../engine/peers.ts'
import type { EngineService } from '../engine/service.ts'
import type { FrozenDisk } from '../engine/snapshot-party.ts'
import type { JobStatus } from '../job/job.ts'
import type { GuestSample } from './far-guests.ts'
import type { AnyRecord } from './catalog-mirror.ts'

/** The number of the shard that backs up the machines in QEMUs of their own. */
export const MACHINES_SEAT = 0

/** What a shard is started with. */
export interface ShardStart {
  readonly number: number
  /** The home's folder. */
  readonly home: string
  /** Ids of the disks that are this shard's. */
  readonly disks: readonly string[]
  /** All records of the catalog. */
  readonly records: readonly AnyRecord[]
  readonly scratchBytes: number | undefined
  /** Cells that all threads share: the host's budgets of scratch and of its memory, and what its backups may copy in a second. */
  readonly scratch: Int32Array
  readonly scratchMemory: Int32Array
  readonly bandwidth: Int32Array
  /** This shard's part of the memory for the maps of qcow2 images, in bytes. */
  readonly metadataCacheBytes: number
  /** Requests that this shard may have in the process's thread pool at once. */
  readonly poolLanes: number
}

/** The moment of a disk for a backup that another shard makes. */
export interface RemoteCapture {
  /** Where the view is an NBD export; a TRIM there says that the range has been read. */
  readonly socket: string
  /** Bytes of the disk. */
  readonly size: number
  /** The bits of the changed granules; undefined for a full. */
  readonly changed: Uint8Array | undefined
}

/** What the repository has of a backup that another shard makes: all of a disk of `size` bytes but the bits of `rest`. */
export interface RemotePart {
  readonly bitmap: string
  readonly backup: string
  readonly part: string
  readonly size: number
  readonly rest: Uint8Array
}

export interface ViewStats {
  readonly savedBytes: number
  readonly scratchPeak: number
}

/** A disk's side of a backup that another shard makes; each names the disk, `freeze` also the shard that asks. */
export type PartyFunctions = {
  partyPlan(disk: string, request: PlanRequest): Promise<DiskPlan>
  partyFreeze(disk: string, asker: number): Promise<void>
  partyCapture(disk: string, plan: DiskPlan, backup: string): Promise<RemoteCapture>
  partyDurable(disk: string): Promise<void>
  partyThaw(disk: string): Promise<void>
  partyRestrict(disk: string, needed: Uint8Array): void
  partyStats(disk: string): ViewStats
  partyKeepPart(disk: string, kept: RemotePart): Promise<void>
  partyDistrust(disk: string, bitmap: string, backup: string, reason: string): Promise<void>
  partySettle(disk: string, bitmap: string, backup: string, outcome: Outcome): Promise<void>
}

/** What the guests of a disk wait for, asked by a shard of that number whose job makes way for them. */
export type GuestFunctions = {
  guestsHear(disk: string, asker: number): GuestSample
  guestsLeave(disk: string, asker: number): void
}

/** What the control plane asks of a shard. */
export type ShardFunctions = PartyFunctions &
  GuestFunctions &
  Omit<EngineService, 'watchJob' | 'close' | 'releaseDisk' | 'machines' | 'vms' | 'host' | 'queueBackups'> & {
    /** Opens its disks. */
    open(): Promise<void>
    /** See Engine.settleBackups; of the backups of another shard's disks when those are given. */
    settleBackups(ofDisks: readonly string[] | undefined): Promise<void>
    resumeJobs(): Promise<void>
    /** Queued backups of its disks, of which the catalog knows by now, wait for their turns. */
    launchQueued(ids: readonly string[]): JobStatus[]
    /** What a backup hears of its turn; see TurnEvents. */
    turnWaits(id: string, reason: string | undefined): void
    turnOver(id: string, message: string): void
    /** A disk's side of a snapshot of disks in several shards; see SnapshotParty. */
    snapshotPrepare(disk: string, name: string): Promise<void>
    snapshotFreeze(disk: string): Promise<FrozenDisk>
    snapshotApply(disk: string): Promise<void>
    snapshotUndo(disk: string): Promise<void>
    /** What another shard committed. */
    apply(changes: readonly CatalogChange[]): void
    watchJob(id: string): void
    unwatchJob(id: string): void
    /** Another shard died: what it asked of this one for its backup ends. */
    askerDied(asker: number): Promise<void>
    stopJobs(): Promise<void>
    close(): Promise<void>
  }

/** What a shard asks of the control plane; of the party functions those of other shards' disks. */
export type ControlFunctions = PartyFunctions &
  GuestFunctions & {
    commit(changes: readonly CatalogChange[]): Promise<void>
    report(message: string, details?: Record<string, unknown>): void
    /** A watched job changed. */
    jobChanged(id: string, status: JobStatus): void
    /** See Turn. */
    takeTurn(wish: TurnWish): Promise<void>
    giveTurn(id: string): void
    /** See GuestHold. */
    freezeGuest(machine: string): Promise<void>
    thawGuest(machine: string): Promise<number | undefined>
    /** See Peers and PeerCalls. */
    peerPrepare(to: string, request: IncomingRequest): Promise<IncomingReply>
    peerStep(to: string, token: string, step: IncomingStep): Promise<IncomingReply>
    peerSocket(to: string, token: string): Promise<string>
  }
