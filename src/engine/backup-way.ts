// Which way a disk is backed up, by what a repository has of it: by its changes, on from where a backup broke off, or all of it by comparison
// with the last one. Pure: who asks knows the bitmap, a daemon of its own disk or a client of a distant one.

import { type BackupInfo, PART_OF } from '../repository/repository.ts'
import { GRANULE_BYTES } from '../repository/spec.ts'

/** What of a repository's backups is needed to know. */
export type EarlierBackup = Pick<BackupInfo, 'id' | 'moment' | 'kind' | 'labels'> & {
  readonly disks: readonly { readonly name: string; readonly size: number }[]
}

export interface Way {
  /** The backup, or part of one, that the bitmap's bits are relative to; undefined when all is looked at. */
  readonly parent: string | undefined
  /** What the disk is called in the parent, where it is another name: it was restored from there. */
  readonly parentDisk?: string | undefined
  /** With all of this backup the disk is compared, so that only what differs is stored. */
  readonly compared?: string | undefined
  readonly kind: BackupInfo['kind']
  readonly reason: string
}

/** A disk as it is now, in bytes. */
export interface SizedDisk {
  readonly name: string
  readonly size: number
}

type Known = ReadonlyMap<string, EarlierBackup>

/** By the changes since `last`, if that is there and fits, where the disk may have another name; `backups` are by id, oldest first, parts too. */
export function wayFrom(disk: SizedDisk, backups: Known, last: string, parentDisk = disk.name): Way {
  const no = (reason: string): Way => wayByComparison(disk, backups, reason)
  const info = backups.get(last)
  if (info === undefined) return no(`the earlier backup ${last} is no longer in the repository`)
  const before = info.disks.find(({ name }) => name === parentDisk)
  if (before === undefined) return no(`the earlier backup ${last} does not have it`)
  if (before.size > disk.size) return no(`the disk is smaller than in ${last}`)
  const broken = info.labels[PART_OF]
  if (broken === undefined) return { parent: last, parentDisk, kind: 'incremental', reason: `changes since ${last}` }
  return { parent: last, kind: info.kind, reason: `goes on where ${broken} broke off` }
}

/** All of it, compared with the newest backup of the disk that can be, if there is one. */
export function wayByComparison(disk: SizedDisk, backups: Known | undefined, reason: string): Way {
  const whole = [...(backups?.values() ?? [])].filter(({ labels }) => labels[PART_OF] === undefined)
  const last = whole.findLast(({ disks }) => disks.some(({ name }) => name === disk.name))
  const size = last?.disks.find(({ name }) => name === disk.name)?.size ?? 0
  // The map of one that was larger is cut, which goes between granules only.
  const fits = size <= disk.size || disk.size % GRANULE_BYTES === 0
  return { parent: undefined, kind: 'full', reason, ...(last !== undefined && fits ? { compared: last.id } : {}) }
}
