// A disk as the API shows it: plain data, made from the catalog's record and, when the disk is open, from the disk itself.

import type { Pauses } from '../chain/disk.ts'
import type { CacheMode } from '../host/cache-mode.ts'
import type { LayerRecord } from './catalog.ts'
import type { FailedDisk, ManagedDisk } from './context.ts'

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
  readonly cache: CacheMode
  /** How long the guest was held for snapshots, moments and pivots; undefined when the disk is not open. */
  readonly pauses?: Pauses
  /** Why it is not served on TCP. */
  readonly held?: string
  /** What is worth knowing of a disk that was added just now. */
  readonly note?: string
}

export function statusOf({ disk, record, served }: ManagedDisk): DiskStatus {
  const bitmaps = [...disk.log.bitmaps.values()].map(({ name, bits, recording, state }) => ({
    name,
    granule: bits.granule,
    recording,
    state,
    dirtyBytes: bits.bytes,
  }))
  const { name, layers, cache = 'writeback' } = record
  const { pauses } = disk
  return { name, state: 'open', error: undefined, size: disk.size, uri: served.uri, layers, bitmaps, cache, pauses }
}

export function statusOfFailed({ record, error }: FailedDisk): DiskStatus {
  const { name, layers, cache = 'writeback' } = record
  return { name, state: 'failed', error: error.message, size: 0, uri: undefined, layers, bitmaps: [], cache }
}
