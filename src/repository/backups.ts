// The backups of a repository: reads their manifests, and the small objects beside them that say which are forgotten and which
// have tags.
//
//   backups/ID      the manifest        forgotten/ID    it is no backup any more; a pruning takes it away
//   tags/ID.TAG     it has this tag

import { PART_KEPT_MS, STORE_REQUESTS } from '../base/limits.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import type { Core } from './core.ts'
import { type BackupInfo, decodeManifest, isBackupId, isPart } from './manifest.ts'
import { inParallel } from './parallel.ts'
import { sealFor } from './sealed.ts'
import { BACKUPS, FORGOTTEN, FORMAT_VERSION, TAGS } from './spec.ts'

/** All manifests: the readable in the order of their moments, newest last, and those that are damaged. */
export interface BackupList {
  readonly backups: readonly BackupInfo[]
  /** What is stored of backups in the making, or that broke: see PART_OF. */
  readonly parts: readonly BackupInfo[]
  readonly damaged: readonly { readonly id: string; readonly reason: string }[]
  /** By id of the backup; sorted. */
  readonly tags: ReadonlyMap<string, readonly string[]>
}

/** With all that a pruning needs: those that are forgotten too, and parts among the backups. */
export interface AllBackups extends Omit<BackupList, 'parts'> {
  readonly forgotten: ReadonlySet<string>
  /** Ids under which a session was given up. */
  readonly fences: readonly string[]
}

type Place = Pick<Core, 'store' | 'vault'>

/** A tag is of letters, digits, '_' and '-', at most 40. */
const TAG = /^[A-Za-z0-9_-]{1,40}$/

/** The backups that are not forgotten. */
export async function listBackups(place: Place): Promise<BackupList> {
  const { backups, damaged, forgotten, tags } = await readBackups(place)
  const visible = backups.filter(({ id }) => !forgotten.has(id))
  return {
    backups: visible.filter((info) => !isPart(info)),
    parts: visible.filter(isPart),
    damaged: damaged.filter(({ id }) => !forgotten.has(id)),
    tags,
  }
}

/** The parts that nobody goes on from: a later backup has all of their disks, or they are old. */
export function outdatedParts(visible: readonly BackupInfo[], nowMs: number): string[] {
  const whole = visible.filter((info) => !isPart(info))
  const covers = (info: BackupInfo, part: BackupInfo): boolean =>
    info.moment >= part.moment && part.disks.every(({ name }) => info.disks.some((disk) => disk.name === name))
  const parts = visible.filter(isPart)
  return parts
    .filter((part) => nowMs - part.finishedMs > PART_KEPT_MS || whole.some((info) => covers(info, part)))
    .map(({ id }) => id)
}

export async function readBackups({ store, vault }: Place): Promise<AllBackups> {
  const backups: BackupInfo[] = []
  const damaged: { id: string; reason: string }[] = []
  const fences: string[] = []
  // A note comes before its manifest goes: read in this order, what is forgotten never looks like a backup.
  const keys = await store.list(BACKUPS)
  const forgotten = new Set((await store.list(FORGOTTEN)).map((key) => key.slice(FORGOTTEN.length)))
  await inParallel(keys, STORE_REQUESTS, async (key) => {
    const id = key.slice(BACKUPS.length)
    try {
      const manifest = decodeManifest(vault, await store.get(key), id, store.name)
      if (manifest === undefined) fences.push(id)
      else backups.push(manifest)
    } catch (error) {
      // Removed since it was listed: then it is no backup any more.
      if (isBlockError(error, 'not-found')) return
      if (!isBlockError(error, 'corrupt') && !isBlockError(error, 'invalid-format')) throw error
      damaged.push({ id, reason: error.message })
    }
  })
  backups.sort((a, b) => a.moment - b.moment || (a.id < b.id ? -1 : 1))
  damaged.sort((a, b) => (a.id < b.id ? -1 : 1))
  return { backups, damaged, forgotten, fences, tags: tagsOf(await store.list(TAGS)) }
}

/** What one backup says of itself; one that is `held`, also when it is forgotten. Kind 'not-found', or 'corrupt'. */
export async function readBackup({ store, vault }: Place, id: string, isHeld = false): Promise<BackupInfo> {
  const missing = (cause?: BlockError): BlockError =>
    new BlockError(
      'not-found',
      `${store.name} has no backup ${id}: \`varve backups\` lists those that it has`,
      {},
      cause,
    )
  if (!isBackupId(id)) throw missing()
  // The note first: while there is none, nobody takes the manifest away from a session that names it.
  if (!isHeld && (await store.status(FORGOTTEN + id)) !== undefined) throw missing()
  try {
    const manifest = decodeManifest(vault, await store.get(BACKUPS + id), id, store.name)
    if (manifest !== undefined) return manifest
  } catch (error) {
    throw isBlockError(error, 'not-found') ? missing(error) : error
  }
  throw missing()
}

/**
 * The backup is none from now on, and the next pruning takes it away. A damaged one can be forgotten too. Kind 'not-found' when
 * there is none, or was forgotten.
 */
export async function forgetBackup(place: Place, id: string): Promise<void> {
  try {
    await readBackup(place, id)
  } catch (error) {
    if (!isBlockError(error, 'corrupt') && !isBlockError(error, 'invalid-format')) throw error
  }
  await putNote(place, FORGOTTEN + id)
}

/** Adds and removes tags of a backup. Kind 'invalid-argument' for a word that is no tag. */
export async function tagBackup(
  place: Place,
  id: string,
  { add = [], remove = [] }: { readonly add?: readonly string[]; readonly remove?: readonly string[] },
): Promise<void> {
  const bad = [...add, ...remove].find((tag) => !TAG.test(tag))
  if (bad !== undefined) {
    throw new BlockError('invalid-argument', `"${bad}" is no tag: use letters, digits, _ and -, at most 40`)
  }
  await readBackup(place, id)
  for (const tag of add) await putNote(place, `${TAGS}${id}.${tag}`)
  for (const tag of remove) await place.store.remove(`${TAGS}${id}.${tag}`)
}

async function putNote({ store, vault }: Place, key: string): Promise<void> {
  try {
    await store.put(key, [sealFor(vault, key, { format: FORMAT_VERSION })])
  } catch (error) {
    if (!isBlockError(error, 'exists')) throw error
  }
}

function tagsOf(keys: readonly string[]): Map<string, string[]> {
  const tags = new Map<string, string[]>()
  for (const key of keys) {
    const [id = '', tag = ''] = key.slice(TAGS.length).split('.')
    tags.set(id, [...(tags.get(id) ?? []), tag])
  }
  return tags
}
