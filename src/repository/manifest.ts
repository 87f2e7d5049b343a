// What a repository and a backup say of themselves: `config` and the manifests, as sealed JSON, each field checked
// before anything believes it.

import crypto from 'node:crypto'
import { BlockError } from '../block/error.ts'
import { seal, unseal } from './sealed.ts'
import { BACKUPS, CHUNK_BYTES, CONFIG_KEY, FANOUT, FORMAT_VERSION, GRANULE_BYTES } from './spec.ts'
import { DISK_BYTES_MAX, levelsFor } from './tree.ts'

/** What `config` holds: the version and the sizes of the format, and who this repository is. */
export interface RepositoryConfig {
  readonly format: typeof FORMAT_VERSION
  readonly id: string
  readonly createdMs: number
  readonly granule: number
  readonly chunk: number
  readonly fanout: number
  readonly digest: string
  readonly compression: string
}

/** One disk in a backup. */
export interface BackupDiskInfo {
  readonly name: string
  /** Bytes. */
  readonly size: number
  /** Level of the root of its map. */
  readonly levels: number
  /** Id of the root in hexadecimal; null when all of the disk reads as zeros. */
  readonly root: string | null
  /** What this is an incremental of. */
  readonly parent?: { readonly backup: string; readonly disk: string }
  /** What the writer was told to be new, zeros included, in bytes. */
  readonly changedBytes: number
  /** What the repository grew by for this disk, in bytes, without directories and indexes. */
  readonly storedBytes: number
  readonly labels: Readonly<Record<string, string>>
}

/** One backup: what it is of, when, and how much it holds. */
export interface BackupInfo {
  readonly format: typeof FORMAT_VERSION
  readonly id: string
  readonly repository: string
  readonly machine: string
  /** When the disks were so, in milliseconds since 1970. */
  readonly moment: number
  readonly kind: 'full' | 'incremental'
  readonly tool: string
  readonly startedMs: number
  readonly finishedMs: number
  /** What the repository grew by, in bytes, but for the manifest. */
  readonly storedBytes: number
  readonly labels: Readonly<Record<string, string>>
  readonly disks: readonly BackupDiskInfo[]
}

type Check = (value: unknown) => boolean
/** One check for each field of T: a field that is added to T does not compile without one. */
type Shape<T> = { readonly [field in keyof Required<T>]: Check }

const isText: Check = (value) => typeof value === 'string' && value !== ''
const isCount: Check = (value) => Number.isSafeInteger(value) && (value as number) >= 0
const matches =
  (pattern: RegExp): Check =>
  (value) =>
    typeof value === 'string' && pattern.test(value)
const isOneOf =
  (...values: readonly unknown[]): Check =>
  (value) =>
    values.includes(value)
const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value)
const isLabels: Check = (value) => isObject(value) && Object.values(value).every((each) => typeof each === 'string')
const isUuid = matches(/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/)
const isId = matches(/^\d{8}T\d{9}Z-[0-9a-f]{8}$/)

const CONFIG: Shape<RepositoryConfig> = {
  format: isOneOf(FORMAT_VERSION),
  id: isUuid,
  createdMs: isCount,
  granule: isOneOf(GRANULE_BYTES),
  chunk: isOneOf(CHUNK_BYTES),
  fanout: isOneOf(FANOUT),
  digest: isOneOf('sha256'),
  compression: isOneOf('zstd'),
}

const DISK: Shape<BackupDiskInfo> = {
  name: isText,
  size: (value) => isCount(value) && (value as number) <= DISK_BYTES_MAX,
  levels: isCount,
  root: (value) => value === null || matches(/^[0-9a-f]{64}$/)(value),
  parent: (value) => value === undefined || (isObject(value) && isId(value['backup']) && isText(value['disk'])),
  changedBytes: isCount,
  storedBytes: isCount,
  labels: isLabels,
}

const MANIFEST: Shape<BackupInfo> = {
  format: isOneOf(FORMAT_VERSION),
  id: isId,
  repository: isUuid,
  machine: isText,
  moment: isCount,
  kind: isOneOf('full', 'incremental'),
  tool: isText,
  startedMs: isCount,
  finishedMs: isCount,
  storedBytes: isCount,
  labels: isLabels,
  disks: (value) => Array.isArray(value) && value.every((disk) => misfit(DISK, disk) === undefined),
}

/** The first field that does not fit, or undefined when all do. */
function misfit<T>(shape: Shape<T>, value: unknown): string | undefined {
  if (!isObject(value)) return 'the whole'
  return Object.entries<Check>(shape).find(([field, check]) => !check(value[field]))?.[0]
}

export function newConfig(nowMs: number): RepositoryConfig {
  return {
    format: FORMAT_VERSION,
    id: crypto.randomUUID(),
    createdMs: nowMs,
    granule: GRANULE_BYTES,
    chunk: CHUNK_BYTES,
    fanout: FANOUT,
    digest: 'sha256',
    compression: 'zstd',
  }
}

export const encodeConfig = (config: RepositoryConfig): Uint8Array => seal(config)
export const encodeManifest = (manifest: BackupInfo): Uint8Array => seal(manifest)

/** Kind 'corrupt', or 'invalid-format' for what this Varve does not read. */
export function decodeConfig(content: Uint8Array, store: string): RepositoryConfig {
  return decode(CONFIG, content, `${store}: ${CONFIG_KEY}`)
}

/** As decodeConfig; the manifest must also be the one that its key says. */
export function decodeManifest(content: Uint8Array, id: string, store: string): BackupInfo {
  const where = `${store}: ${BACKUPS}${id}`
  const manifest = decode(MANIFEST, content, where)
  const wrongDisk = manifest.disks.find((disk) => disk.levels !== levelsFor(disk.size))
  if (manifest.id !== id || wrongDisk !== undefined) {
    const what = wrongDisk === undefined ? `calls itself ${manifest.id}` : `has wrong levels for disk ${wrongDisk.name}`
    throw new BlockError('corrupt', `${where} ${what}`, { path: where })
  }
  return manifest
}

function decode<T>(shape: Shape<T>, content: Uint8Array, where: string): T {
  const value = unseal(content, where)
  const format = (value as { format?: unknown } | null)?.format
  if (format !== FORMAT_VERSION) {
    const message = `${where} has format version ${String(format)}; this Varve reads version ${FORMAT_VERSION}: use a newer one`
    throw new BlockError('invalid-format', message, { path: where })
  }
  const field = misfit(shape, value)
  if (field === undefined) return value as T
  throw new BlockError('invalid-format', `${where} is not as this Varve expects it: see "${field}"`, { path: where })
}

/** Ids sort by moment. */
export function newBackupId(moment: number): string {
  const time = new Date(moment).toISOString().replaceAll(/[-:.]/g, '')
  return `${time}-${crypto.randomBytes(4).toString('hex')}`
}

export function isBackupId(id: string): boolean {
  return isId(id)
}
