// The catalog: what exists. Disks with their chains, machines, jobs, and files that are to be removed. One transaction changes any of it,
// durably, or none. The catalog's record of a chain is the one truth about which layer is active. What is too large or
// too hot for it (bitmaps, a job's progress) is in the disk's dirty log.

import type { Format } from '../chain/open.ts'
import type { Durability } from '../dirtylog/dirty-log.ts'
import type { GuestHooks } from '../guest/guest-hooks.ts'
import type { CacheMode } from '../host/cache-mode.ts'
import type { MirrorFinish, MirrorMode } from '../job/mirror.ts'
import type { ProofWish } from '../job/proof.ts'
import type { JobTerms, VmJobKind } from '../job/terms.ts'
import type { DomainPlace } from '../source/libvirt/virsh.ts'
import type { CheckpointWish } from './checkpoints.ts'
import type { AwayMark, IncomingMark } from './authority.ts'
import type { WhenAway } from './backup-layer.ts'
import type { HostLimits } from './host-limits.ts'

/** One layer of a chain. */
export interface LayerRecord {
  readonly path: string
  readonly format: string
  /** The snapshot that this layer, frozen, is; undefined for the active layer and for layers without a name. */
  readonly snapshot?: { readonly name: string; readonly createdMs: number } | undefined
  /** Set when Varve made the file: it goes when it leaves the chain. */
  readonly made?: true
  /** For a layer of a clone that belongs to another disk: that disk's name. */
  readonly of?: string
}

/** A layer beside the chain: a revert left it. `on` is the path of the layer that it lies on. */
export interface SideLayer extends LayerRecord {
  readonly on: string
}

export interface DiskRecord {
  readonly id: string
  readonly name: string
  /** From base to active. */
  readonly layers: readonly LayerRecord[]
  /** Layers that snapshots beside the chain need; each of them lies on one of the chain or on another of these. */
  readonly side?: readonly SideLayer[]
  readonly addedMs: number
  /** Number of the next overlay that Varve makes for it. */
  readonly nextOverlay: number
  /** How much of the page cache its images have; writeback when it is not said. */
  readonly cache?: CacheMode
  /** What the bitmaps that its backups count by outlive, and those of users unless told otherwise; 'host' when it is not said. */
  readonly durability?: Durability
  /** The size in bytes that a resize was giving it; a crash came between when the disk is opened with it. */
  readonly growTo?: number
  /** Names of its snapshots that are exported read-only. */
  readonly exports?: readonly string[]
  /** When and why its bitmaps were given up last: what a backup that must be a full for that says. */
  readonly bitmapsLost?: { readonly atMs: number; readonly reason: string }
  /** Another daemon's disk that is being copied to here: it is not ours yet. */
  readonly incoming?: IncomingMark
  /** It came from another daemon, which may still ask about this token or pass guests on by it. */
  readonly arrival?: { readonly token: string; readonly from: string }
  /** All of it is not here yet: the lowest layer is a backup. */
  readonly restoring?: RestoringMark
  /** It is being made what it was in a backup, and nobody may use it. */
  readonly overwriting?: OverwritingMark
  /** It was handed over to another daemon. */
  readonly away?: AwayMark
}

/** Where the rest is of a disk that is being restored. */
export interface RestoringMark {
  /** Of the repository. */
  readonly repository: string
  readonly backup: string
  /** Its name in the backup, and its bytes. */
  readonly disk: string
  readonly size: number
  /** What keeps the backup from being pruned. */
  readonly hold: string
  readonly whenAway: WhenAway
}

/** The backup that a disk is being made equal to. */
export interface OverwritingMark extends Omit<RestoringMark, 'whenAway'> {
  /** The snapshot that holds what the disk was; undefined when that is gone. */
  readonly keep: string | undefined
}

/** Makes a disk what it was in a backup. */
export interface OverwriteSpec {
  readonly kind: 'overwrite'
  readonly disk: string
}

export interface CommitSpec {
  readonly kind: 'commit'
  readonly disk: string
  /** Paths of the highest layer that goes down and of the one that takes all. */
  readonly from: string
  readonly to: string
}

export interface StreamSpec {
  readonly kind: 'stream'
  readonly disk: string
  /** Paths of the layer that stays below, null for none, and of the one that takes what lies between. */
  readonly base: string | null
  readonly to: string
}

/** Brings the rest of a disk that is being restored: a stream of all that lies below. */
export interface RestoreSpec {
  readonly kind: 'restore'
  readonly disk: string
  readonly base: null
  readonly to: string
}

export interface MirrorSpec {
  readonly kind: 'mirror'
  readonly disk: string
  /** An image's path with its format, or an NBD URI. */
  readonly target: string
  readonly format?: Format
  readonly sync: MirrorSync
  /** Of the disk's, for sync 'bitmap'. */
  readonly bitmap?: string
  readonly mode: MirrorMode
  /** How it is to end, once that was asked for. */
  readonly finish?: MirrorFinish
  /** The target was made for it, and read as zeros at first. */
  readonly made: boolean
  /** The to-do set was once whole: the target may hold anything since. */
  readonly begun: boolean
}

/** What a mirror copies at first: all that is allocated, what the active layer owns, nothing, or what a bitmap says. */
export const MIRROR_SYNCS = ['full', 'top', 'none', 'bitmap'] as const
export type MirrorSync = (typeof MIRROR_SYNCS)[number]

export interface MigrateSpec {
  readonly kind: 'migrate'
  readonly disk: string
  /** The URI of the target's API. */
  readonly to: string
  readonly token: string
  /** Identity of the target's home, once it has answered. */
  readonly home?: string
  readonly mode: MirrorMode
  /** 'pivot' once it is to switch over as soon as it can. */
  readonly finish?: MirrorFinish
  /** Guests are passed on afterwards. */
  readonly forward: boolean
  /** The to-do set of the present state was once whole. */
  readonly begun: boolean
}

export interface BackupSpec extends CheckpointWish {
  readonly kind: 'backup'
  readonly disks: readonly string[]
  /** The machine that the disks are; undefined for disks that were named one by one. */
  readonly machine?: string
  readonly repository: string
  readonly full: boolean
  /** Its place among the queued, a number that grows: it begins within a window of the host, in this order. */
  readonly queued?: number
  readonly proof?: ProofWish
}

/** Moments of disks that somebody reads over NBD; it lives no longer than the daemon. */
export interface ViewSpec {
  readonly kind: 'view'
  readonly disks: readonly string[]
  /** The machine that the disks are. */
  readonly machine?: string
  /** What its client calls the moment; its captured bits are known by that, else by the job's id. */
  readonly moment?: string
}

/** A job of QEMU's own at a disk of a machine in a QEMU of its own. */
export interface VmJobSpec {
  readonly kind: VmJobKind
  /** None of Varve's. */
  readonly disks: readonly string[]
  readonly machine: string
  /** As the machine calls it. */
  readonly disk: string
  /** Of a mirror. */
  readonly target?: { readonly file: string; readonly format: Format }
}

export type JobSpec =
  | CommitSpec
  | StreamSpec
  | RestoreSpec
  | OverwriteSpec
  | MirrorSpec
  | MigrateSpec
  | BackupSpec
  | ViewSpec
  | VmJobSpec

/** The disks that a job works on. */
export function disksOf(spec: JobSpec): readonly string[] {
  return 'disks' in spec ? spec.disks : [spec.disk]
}

/** How its user calls what a job works on: a machine, or its disks. */
export function subjectOf(spec: JobSpec): string {
  return ('machine' in spec ? spec.machine : undefined) ?? disksOf(spec).join('+')
}

/** A job that goes on when the daemon starts again; its row is removed when it ends, and `history` remembers. */
export interface JobRecord {
  readonly id: string
  readonly spec: JobSpec
  readonly terms: JobTerms
  /** Bytes to do when it was first begun; 0 while not known. */
  readonly total: number
  /** Set when the job was paused by the user: it stays so over a restart. */
  readonly paused: boolean
  /** Its user let the result take effect: that need not be said again after a restart. */
  readonly finalized?: true
  /** The backup that the job is writing: a restart looks whether it became visible. Of a view its own id, once its reader has all of it. */
  readonly backup?: string | undefined
  readonly startedMs: number
}

/** A file that a disk no longer uses, to be removed. `id` is its path, unless the file stays. */
export interface GarbageRecord {
  readonly id: string
  readonly disk: string
  /**
   * The file's path, when it has left the chain and stays where it is: Varve did not make it or another disk lies on it. Several disks
   * may leave it at once, so the row's id is their own.
   */
  readonly keep?: string
}

/** The row for a layer that leaves a disk. */
export function garbageRow(disk: DiskRecord, { path, made }: LayerRecord): GarbageRecord {
  if (made === true) return { id: path, disk: disk.id }
  return { id: `${disk.id}:${path}`, disk: disk.id, keep: path }
}

/** An ended job, as its status was. */
export interface HistoryRecord {
  readonly id: string
  readonly status: unknown
}

/** A disk that a client on TCP used, until its next clean close (distant-guests.ts). */
export interface GuestRecord {
  /** The disk's. */
  readonly id: string
  /** Of the host, when the client came. */
  readonly bootId: string
  /** Since when it is not served on TCP, because the host stopped uncleanly. */
  readonly heldMs?: number
}

/** Which home this is, among all that there are. */
export interface IdentityRecord {
  /** Always the same: there is one. */
  readonly id: string
  readonly identity: string
  readonly createdMs: number
}

/** Disks that are snapshot and backed up at one moment, with one outcome. A disk of no machine is one by itself, without a record. */
export interface MachineRecord {
  /** Its name, which no disk has. */
  readonly id: string
  /** Names of its disks; each is of one machine at most. */
  readonly disks: readonly string[]
  /** How its guest is frozen for a moment. */
  readonly hooks?: GuestHooks
  /** It runs in a QEMU of its own, which has its disks. */
  readonly qemu?: MonitorPlace | DomainPlace
}

/** A QEMU that is reached by its monitor: the path of its socket, and what distinguishes the machine's nodes there. */
export interface MonitorPlace {
  readonly qmp: string
  readonly tag: string
}

/** A machine whose guest is frozen, or is to be thawed. */
export interface FrozenRecord {
  /** The machine's name. */
  readonly id: string
  readonly hooks: GuestHooks
  readonly sinceMs: number
}

/** What was said of the host's limits (host-limits.ts); what is absent is as the daemon was started. */
export interface HostRecord extends Partial<HostLimits> {
  /** Always the same: there is one. */
  readonly id: string
}

/** What was learned from a machine's backups (forecast.ts); rates in bytes per second. */
export interface ForecastRecord {
  /** The machine's name. */
  readonly id: string
  readonly momentMs: number
  readonly writeRate: number
  readonly copyRate: number
  readonly fullBytes: number
}

export interface Records {
  disk: DiskRecord
  machine: MachineRecord
  host: HostRecord
  forecast: ForecastRecord
  frozen: FrozenRecord
  guest: GuestRecord
  job: JobRecord
  garbage: GarbageRecord
  history: HistoryRecord
  identity: IdentityRecord
}

export type RecordKind = keyof Records

const KINDS: Record<RecordKind, true> = {
  identity: true,
  host: true,
  disk: true,
  machine: true,
  forecast: true,
  frozen: true,
  guest: true,
  job: true,
  garbage: true,
  history: true,
}
export const RECORD_KINDS = Object.keys(KINDS) as readonly RecordKind[]

export type CatalogChange =
  | { [K in RecordKind]: { readonly put: K; readonly record: Records[K] } }[RecordKind]
  | { readonly remove: RecordKind; readonly id: string }

export interface Catalog {
  /** All records of a kind, in the order in which they were first put. */
  list<K extends RecordKind>(kind: K): Records[K][]
  get<K extends RecordKind>(kind: K, id: string): Records[K] | undefined
  /** All changes or none, durable when it resolves; `list` and `get` may show them before. Commits are made in the order of the calls. */
  commit(changes: readonly CatalogChange[]): Promise<void>
  close(): void
}

/** The catalog's twin for tests: in memory, with a hook that sees every commit before it is made and may throw. */
export class MemoryCatalog implements Catalog {
  readonly #records = new Map<string, { kind: RecordKind; record: Records[RecordKind] }>()
  beforeCommit: ((changes: readonly CatalogChange[]) => void) | undefined

  list<K extends RecordKind>(kind: K): Records[K][] {
    return [...this.#records.values()].filter((row) => row.kind === kind).map((row) => row.record as Records[K])
  }

  get<K extends RecordKind>(kind: K, id: string): Records[K] | undefined {
    return this.#records.get(`${kind}/${id}`)?.record as Records[K] | undefined
  }

  async commit(changes: readonly CatalogChange[]): Promise<void> {
    this.beforeCommit?.(changes)
    for (const change of changes) {
      if ('put' in change)
        this.#records.set(`${change.put}/${change.record.id}`, { kind: change.put, record: change.record })
      else this.#records.delete(`${change.remove}/${change.id}`)
    }
  }

  /** What a crash at this moment leaves. */
  clone(): MemoryCatalog {
    const other = new MemoryCatalog()
    for (const [key, row] of this.#records) other.#records.set(key, row)
    return other
  }

  close(): void {}
}
