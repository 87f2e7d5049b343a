// What a repository and a backup say of themselves: `config` and the manifests, as sealed JSON, checked against their
// schema before anything believes them.

import crypto from 'node:crypto'
import { z } from 'zod'
import { BlockError } from '../block/error.ts'
import { seal, unseal } from './sealed.ts'
import { BACKUPS, CHUNK_BYTES, CONFIG_KEY, FANOUT, FORMAT_VERSION, GRANULE_BYTES, ID_BYTES, LEVEL_MAX } from './spec.ts'
import { levelsFor } from './tree.ts'

const hex = (bytes: number): z.ZodString => z.string().regex(new RegExp(`^[0-9a-f]{${bytes * 2}}$`))
const bytes = z.int().min(0)
const backupId = z.string().regex(/^\d{8}T\d{9}Z-[0-9a-f]{8}$/)
const labels = z.record(z.string(), z.string())

const configSchema = z.object({
  format: z.literal(FORMAT_VERSION),
  id: z.uuid(),
  createdMs: bytes,
  granule: z.literal(GRANULE_BYTES),
  chunk: z.literal(CHUNK_BYTES),
  fanout: z.literal(FANOUT),
  digest: z.literal('sha256'),
  compression: z.literal('zstd'),
})

const diskSchema = z.object({
  name: z.string().min(1),
  /** Bytes. */
  size: bytes,
  /** Level of the root of its map. */
  levels: z.int().min(0).max(LEVEL_MAX),
  /** Null when all of it reads as zeros. */
  root: hex(ID_BYTES).nullable(),
  parent: z.object({ backup: backupId, disk: z.string() }).optional(),
  /** What the writer was told to be new, zeros included, in bytes. */
  changedBytes: bytes,
  /** What the repository grew by for this disk, in bytes, without directories and indexes. */
  storedBytes: bytes,
  labels,
})

const manifestSchema = z.object({
  format: z.literal(FORMAT_VERSION),
  id: backupId,
  repository: z.uuid(),
  machine: z.string().min(1),
  /** When the disks were so, in milliseconds since 1970. */
  moment: bytes,
  kind: z.enum(['full', 'incremental']),
  tool: z.string(),
  startedMs: bytes,
  finishedMs: bytes,
  /** What the repository grew by, in bytes, but for the manifest. */
  storedBytes: bytes,
  labels,
  disks: z.array(diskSchema),
})

export type RepositoryConfig = z.infer<typeof configSchema>
/** One backup: what it is of, when, and how much it holds. */
export type BackupInfo = z.infer<typeof manifestSchema>
/** One disk in a backup. */
export type BackupDiskInfo = BackupInfo['disks'][number]

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
  return decode(configSchema, content, `${store}: ${CONFIG_KEY}`)
}

/** As decodeConfig; the manifest must also be the one that its key says. */
export function decodeManifest(content: Uint8Array, id: string, store: string): BackupInfo {
  const where = `${store}: ${BACKUPS}${id}`
  const manifest = decode(manifestSchema, content, where)
  const wrongDisk = manifest.disks.find((disk) => disk.levels !== levelsFor(disk.size))
  if (manifest.id !== id || wrongDisk !== undefined) {
    const what = wrongDisk === undefined ? `calls itself ${manifest.id}` : `has wrong levels for disk ${wrongDisk.name}`
    throw new BlockError('corrupt', `${where} ${what}`, { path: where })
  }
  return manifest
}

function decode<T>(schema: z.ZodType<T>, content: Uint8Array, where: string): T {
  const value = unseal(content, where)
  const format = (value as { format?: unknown } | null)?.format
  if (format !== FORMAT_VERSION) {
    const message = `${where} has format version ${String(format)}; this Varve reads version ${FORMAT_VERSION}: use a newer one`
    throw new BlockError('invalid-format', message, { path: where })
  }
  const result = schema.safeParse(value)
  if (result.success) return result.data
  const reason = z.prettifyError(result.error).replaceAll('\n', ' ')
  throw new BlockError('invalid-format', `${where} is not as this Varve expects it: ${reason}`, { path: where })
}

/** Ids sort by moment. */
export function newBackupId(moment: number): string {
  const time = new Date(moment).toISOString().replaceAll(/[-:.]/g, '')
  return `${time}-${crypto.randomBytes(4).toString('hex')}`
}

export function isBackupId(id: string): boolean {
  return backupId.safeParse(id).success
}
