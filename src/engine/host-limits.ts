// What the backups of a host may take: how many machines at a time, scratch, bandwidth, and at what times of the day. Kept in the catalog
// as far as somebody set it; the rest is as the daemon was started, or as the limits file has it.

import {
  BACKUP_MACHINES_MAX,
  HOST_BANDWIDTH_MIN,
  SCRATCH_BYTES,
  SCRATCH_HOST_BYTES,
  SCRATCH_MEMORY_BYTES,
} from '../base/limits.ts'
import { DailyWindows } from '../base/daily-windows.ts'
import { BlockError } from '../block/error.ts'
import type { Catalog, CatalogChange, HostRecord } from './catalog.ts'
import type { EngineContext } from './context.ts'

/** What becomes of queued backups that run when their window closes. */
export const WINDOW_ENDS = ['finish', 'break'] as const
export type WindowEnd = (typeof WINDOW_ENDS)[number]

export interface HostLimits {
  /** Machines that are backed up at a time. */
  readonly machines: number
  /** Copy space in bytes: of one disk, and of all together. */
  readonly scratchBytes: number
  readonly scratchHostBytes: number
  /** How much of that is memory at most. */
  readonly scratchMemoryBytes: number
  /** Bytes per second of all backups together; 0 is no limit. */
  readonly bandwidth: number
  /** When queued backups begin, such as "22:00-06:00" in local time; at any time when there are none. */
  readonly windows: readonly string[]
  readonly windowEnd: WindowEnd
}

/** Null is as the daemon was started. */
export type HostChange = { readonly [K in keyof HostLimits]?: HostLimits[K] | null | undefined }

export type LimitDefaults = Pick<HostLimits, 'scratchBytes' | 'scratchHostBytes' | 'scratchMemoryBytes'>

/** What the daemon was started with. */
export function limitDefaultsOf(said: Partial<LimitDefaults>): LimitDefaults {
  return {
    scratchBytes: said.scratchBytes ?? SCRATCH_BYTES,
    scratchHostBytes: said.scratchHostBytes ?? SCRATCH_HOST_BYTES,
    scratchMemoryBytes: said.scratchMemoryBytes ?? SCRATCH_MEMORY_BYTES,
  }
}

/** The row; there is one at most. */
const ID = 'host'

/** The limits that hold now. */
export function hostLimits(catalog: Pick<Catalog, 'get'>, defaults: LimitDefaults): HostLimits {
  const { id: _id, ...said } = catalog.get('host', ID) ?? { id: ID }
  return { machines: 1, bandwidth: 0, windows: [], windowEnd: 'finish', ...defaults, ...said }
}

export function limitsOf({ catalog, limitDefaults }: Pick<EngineContext, 'catalog' | 'limitDefaults'>): HostLimits {
  return hostLimits(catalog, limitDefaults)
}

/** What the catalog is to hold after a change. Kind 'invalid-argument' for what cannot be. */
export function changeLimits(catalog: Pick<Catalog, 'get'>, change: HostChange): CatalogChange {
  const { machines, windows } = change
  if (
    typeof machines === 'number' &&
    (!Number.isSafeInteger(machines) || machines < 1 || machines > BACKUP_MACHINES_MAX)
  )
    throw new BlockError('invalid-argument', `${machines} machines at a time: 1 to ${BACKUP_MACHINES_MAX}`)
  for (const name of ['scratchBytes', 'scratchHostBytes', 'scratchMemoryBytes', 'bandwidth'] as const) {
    const value = change[name]
    if (typeof value === 'number' && (!Number.isSafeInteger(value) || value < 0))
      throw new BlockError('invalid-argument', `${value} is no number of bytes`)
  }
  const { bandwidth } = change
  if (typeof bandwidth === 'number' && bandwidth > 0 && bandwidth < HOST_BANDWIDTH_MIN)
    throw new BlockError(
      'invalid-argument',
      `a bandwidth of ${bandwidth} bytes a second: ${HOST_BANDWIDTH_MIN} or more, or 0`,
    )
  const wrong = windows?.find((text) => DailyWindows.parse([text]) === undefined)
  if (wrong !== undefined)
    throw new BlockError('invalid-argument', `${JSON.stringify(wrong)} is no window: write 22:00-06:00, in local time`)
  const said = Object.entries({ ...catalog.get('host', ID), ...definedOf(change) })
  const record = Object.fromEntries(said.filter(([, value]) => value !== null)) as unknown as HostRecord
  return { put: 'host', record: { ...record, id: ID } }
}

function definedOf(change: HostChange): object {
  return Object.fromEntries(Object.entries(change).filter(([, value]) => value !== undefined))
}
