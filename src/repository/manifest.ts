// What a repository and a backup say of themselves: `config` and the manifests, as sealed JSON, each field checked
// before anything believes it.

import crypto from 'node:crypto'
import { BlockError } from '../block/error.ts'
import { seal, sealFor, unseal, unsealFor } from './sealed.ts'
import {
  fitted,
  isCount,
  isId,
  isLabels,
  isListOf,
  isObject,
  isOneOf,
  isText,
  isUuid,
  matches,
  misfit,
  type Shape,
} from './shape.ts'
import { BACKUPS, CHUNK_BYTES, CONFIG_KEY, FANOUT, FORMAT_VERSION, GRANULE_BYTES } from './spec.ts'
import { DISK_BYTES_MAX, levelsFor } from './tree.ts'
import type { Vault } from './vault.ts'

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
  /** 'none', or the cipher: then the keys are behind those in `keys/`. */
  readonly encryption: 'none' | 'aes-256-gcm'
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
  /** What this is a copy of, when it came from another repository. */
  readonly origin?: { readonly repository: string; readonly backup: string }
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

const CONFIG: Shape<RepositoryConfig> = {
  format: isOneOf(FORMAT_VERSION),
  id: isUuid,
  createdMs: isCount,
  granule: isOneOf(GRANULE_BYTES),
  chunk: isOneOf(CHUNK_BYTES),
  fanout: isOneOf(FANOUT),
  digest: isOneOf('sha256'),
  compression: isOneOf('zstd'),
  encryption: isOneOf('none', 'aes-256-gcm'),
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
  origin: (value) => value === undefined || (isObject(value) && isUuid(value['repository']) && isId(value['backup'])),
  machine: isText,
  moment: isCount,
  kind: isOneOf('full', 'incremental'),
  tool: isText,
  startedMs: isCount,
  finishedMs: isCount,
  storedBytes: isCount,
  labels: isLabels,
  disks: isListOf((disk) => misfit(DISK, disk) === undefined),
}

/** In place of the manifest of a backup that was given up as dead: it can never become visible. */
interface Fence {
  readonly format: typeof FORMAT_VERSION
  readonly fenced: string
}

const FENCE: Shape<Fence> = { format: isOneOf(FORMAT_VERSION), fenced: isId }

export function newConfig(nowMs: number, encryption: RepositoryConfig['encryption']): RepositoryConfig {
  return {
    format: FORMAT_VERSION,
    id: crypto.randomUUID(),
    createdMs: nowMs,
    granule: GRANULE_BYTES,
    chunk: CHUNK_BYTES,
    fanout: FANOUT,
    digest: 'sha256',
    compression: 'zstd',
    encryption,
  }
}

export const encodeConfig = (config: RepositoryConfig): Uint8Array => seal(config)
export const encodeManifest = (vault: Vault, manifest: BackupInfo): Uint8Array =>
  sealFor(vault, BACKUPS + manifest.id, manifest)
export const encodeFence = (vault: Vault, id: string): Uint8Array =>
  sealFor(vault, BACKUPS + id, { format: FORMAT_VERSION, fenced: id } satisfies Fence)

/** Kind 'corrupt', or 'invalid-format' for what this Varve does not read. */
export function decodeConfig(content: Uint8Array, store: string): RepositoryConfig {
  const where = `${store}: ${CONFIG_KEY}`
  return fitted(CONFIG, unseal(content, where), where)
}

/** The manifest, which must be the one that its key says, or undefined for a fence in its place. As decodeConfig. */
export function decodeManifest(vault: Vault, content: Uint8Array, id: string, store: string): BackupInfo | undefined {
  const where = `${store}: ${BACKUPS}${id}`
  const value = unsealFor(vault, BACKUPS + id, content, where)
  if (isObject(value) && value['fenced'] === id && misfit(FENCE, value) === undefined) return undefined
  const manifest = fitted(MANIFEST, value, where)
  const wrongDisk = manifest.disks.find((disk) => disk.levels !== levelsFor(disk.size))
  if (manifest.id !== id || wrongDisk !== undefined) {
    const what = wrongDisk === undefined ? `calls itself ${manifest.id}` : `has wrong levels for disk ${wrongDisk.name}`
    throw new BlockError('corrupt', `${where} ${what}`, { path: where })
  }
  return manifest
}

/**
 * The label of a part: what is stored of a backup in the making, whose id it holds. One that breaks is gone on with from there. A part is
 * read, checked and kept like a backup, and listed nowhere.
 */
export const PART_OF = 'varve-part-of'

export function isPart({ labels }: Pick<BackupInfo, 'labels'>): boolean {
  return labels[PART_OF] !== undefined
}

/** Ids sort by moment. */
export function newBackupId(moment: number): string {
  const time = new Date(moment).toISOString().replaceAll(/[-:.]/g, '')
  return `${time}-${crypto.randomBytes(4).toString('hex')}`
}

export function isBackupId(id: string): boolean {
  return isId(id)
}

/** The id of the root of a disk's map. */
export function rootOf(disk: BackupDiskInfo): Uint8Array | undefined {
  return disk.root === null ? undefined : Buffer.from(disk.root, 'hex')
}
