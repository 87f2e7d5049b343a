// A disk as the API shows it: plain data, made from the catalog's record and, when the disk is open, from the disk itself.

import type { Layer } from '../block/device.ts'
import type { Pauses } from '../chain/disk.ts'
import type { Durability } from '../dirtylog/dirty-log.ts'
import type { CacheMode } from '../host/cache-mode.ts'
import { authorityOf, migrationNote } from './authority.ts'
import { BackupLayer } from './backup-layer.ts'
import { countsFrom, distrustOf } from './backup-party.ts'
import type { DiskRecord, LayerRecord } from './catalog.ts'
import type { FailedDisk, ManagedDisk } from './context.ts'

export interface BitmapStatus {
  readonly name: string
  readonly granule: number
  readonly recording: boolean
  readonly state: 'valid' | 'void'
  readonly durability: Durability
  /** The backup that it counts from, of one that a backup made. */
  readonly since?: string
  /** Bytes that the set granules cover. */
  readonly dirtyBytes: number
  /** Why its bits are not believed until a full by comparison is done. */
  readonly distrust?: string | undefined
}

export interface DiskStatus {
  readonly name: string
  /** 'open' is a disk that guests may use here; see docs/internals/migration.md for those that come from elsewhere, or went there. */
  readonly state: 'open' | 'failed' | 'incoming' | 'handed-over' | 'moved'
  readonly error: string | undefined
  /** Bytes; 0 when the disk is not open. */
  readonly size: number
  readonly uri: string | undefined
  /** From base to active. */
  readonly layers: readonly LayerRecord[]
  readonly bitmaps: readonly BitmapStatus[]
  readonly cache: CacheMode
  /** How long the guest was held for snapshots, moments and pivots; undefined when the disk is not open. */
  readonly pauses?: Pauses
  /** Where it is in a migration, and the command that ends that. */
  readonly migration?: string
  /** Where the rest of it is while it is restored, and why that cannot be read now. */
  readonly restoring?: RestoringStatus
  /** Why it is not served on TCP. */
  readonly held?: string
  /** What is worth knowing of a disk that was added just now. */
  readonly note?: string
}

export interface RestoringStatus {
  readonly repository: string
  readonly backup: string
  readonly disk: string
  readonly away?: string
}

export function statusOf({ disk, record, served }: ManagedDisk): DiskStatus {
  const bitmaps = [...disk.log.bitmaps.values()].map((bitmap) => {
    const { name, bits, recording, state, durability } = bitmap
    const distrust = distrustOf(bitmap)
    const since = countsFrom(bitmap)
    return {
      name,
      granule: bits.granule,
      recording,
      state,
      durability,
      dirtyBytes: bits.bytes,
      ...(distrust === undefined ? {} : { distrust }),
      ...(since === undefined ? {} : { since }),
    }
  })
  const { name, layers, cache = 'writeback' } = record
  const { state } = authorityOf(record)
  return {
    name,
    state: state === 'here' ? 'open' : state,
    error: undefined,
    size: disk.size,
    uri: served?.uri,
    layers,
    bitmaps: record.away === undefined ? bitmaps : [],
    cache,
    pauses: disk.pauses,
    ...noteOf(record),
    ...restoringOf(record, disk.chain.layers[0]),
  }
}

function restoringOf(
  { restoring, overwriting }: DiskRecord,
  bottom: Layer | undefined,
): { restoring?: RestoringStatus } {
  const mark = restoring ?? overwriting
  if (mark === undefined) return {}
  const { repository, backup, disk } = mark
  const away = bottom instanceof BackupLayer ? bottom.away : undefined
  return { restoring: { repository, backup, disk, ...(away === undefined ? {} : { away }) } }
}

export function statusOfFailed({ record, error }: FailedDisk): DiskStatus {
  const { name, layers, cache = 'writeback' } = record
  const { state } = authorityOf(record)
  const isGone = state === 'handed-over' || state === 'moved'
  return {
    name,
    state: isGone ? state : 'failed',
    error: isGone ? undefined : error.message,
    size: record.away?.size ?? 0,
    uri: undefined,
    layers,
    bitmaps: [],
    cache,
    ...noteOf(record),
  }
}

function noteOf(record: DiskRecord): Pick<DiskStatus, 'migration'> {
  const migration = migrationNote(record)
  return migration === undefined ? {} : { migration }
}
