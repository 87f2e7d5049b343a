// Live restores: a new disk over a backup, at once. Its image owns nothing at first; what a guest reads comes from the repository, what it
// writes stays here, and a job brings the rest (streams.ts), after which the disk needs no backup. A crash anywhere leaves a disk that goes
// on, or none.
//
//   vm1   image       . T . .        the guest's writes, and what was brought
//         backup      b b b b        in its repository, held there
//
// Its bitmap counts from the backup from the first write on, so that the next backup there is an incremental.

import { randomBytes } from 'node:crypto'
import path from 'node:path'
import { GRANULE } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import type { Disk } from '../chain/disk.ts'
import { createQcow2 } from '../format/qcow2/create.ts'
import type { CacheMode } from '../host/cache-mode.ts'
import type { Job } from '../job/job.ts'
import type { JobTerms } from '../job/terms.ts'
import { countingFrom } from './backup-party.ts'
import { BACKUP_FORMAT, type WhenAway } from './backup-layer.ts'
import type { CatalogChange, DiskRecord, RestoringMark } from './catalog.ts'
import { type EngineContext, findAny } from './context.ts'
import type { Opening } from './disk-opener.ts'
import { backupLayerOf, type HeldBackup, letGoOf, openHeld, placeOf } from './held-backup.ts'
import { JobTable } from './job-table.ts'
import { removeFolder } from './removal.ts'
import { removeGarbage } from './snapshots.ts'
import { launchStream } from './streams.ts'

export interface RestoreRequest extends JobTerms {
  /** Of the new disk. */
  readonly name: string
  readonly repository: string
  readonly backup: string
  /** Which one of the backup; the only one unless told. */
  readonly disk?: string | undefined
  /** Absolute path of its image, of format qcow2; in the home unless told. */
  readonly image?: string | undefined
  /** 'hold' unless told. */
  readonly whenAway?: WhenAway | undefined
  readonly cache?: CacheMode | undefined
}

/** Opens and serves a new disk, and takes it into the catalog, with other changes; all of it or nothing. */
type OpenNew = (record: DiskRecord, besides: readonly CatalogChange[], opening: Opening) => Promise<void>

/** Makes the disk, which is served when this resolves, and begins to bring what it lacks, as a job. Nobody else adds disks meanwhile. */
export async function startRestore(context: EngineContext, request: RestoreRequest, openNew: OpenNew): Promise<Job> {
  const { name, repository, backup, whenAway = 'hold' } = request
  const image = await freeImage(context, request)
  const row = JobTable.newRow({ kind: 'restore', disk: name, base: null, to: image }, request)
  const held = await openHeld(context, request)
  const mark: RestoringMark = { repository, backup, disk: held.disk, size: held.size, hold: held.hold, whenAway }
  const layers = [
    { path: placeOf(mark), format: BACKUP_FORMAT },
    { path: image, format: 'qcow2', made: true as const },
  ]
  const id = randomBytes(8).toString('hex')
  const cache = request.cache ?? 'writeback'
  const record: DiskRecord = { id, name, layers, addedMs: Date.now(), nextOverlay: 1, cache, restoring: mark }
  const bottom = backupLayerOf(context, name, mark, held)
  try {
    await context.catalog.commit([{ put: 'garbage', record: { id: image, disk: id } }])
    await createQcow2(context.host, image, { size: held.size, backing: { name: placeOf(mark), format: 'raw' } })
    await openNew(
      record,
      [
        { remove: 'garbage', id: image },
        { put: 'job', record: row },
      ],
      { bottom, beforeServing: (disk) => countFromBackup(disk, held, backup) },
    )
  } catch (error) {
    await bottom.close()
    await letGoOf(context, mark)
    await removeFolder(context, record)
    await removeGarbage(context, image)
    throw error
  }
  return launchStream(context, findAny(context, name), row)
}

/** The disk is the backup until its first write, so what is marked from then on is all in which it differs. */
async function countFromBackup(disk: Disk, { repositoryId, disk: name }: HeldBackup, backup: string): Promise<void> {
  await disk.log.edit([
    {
      kind: 'add',
      name: `backup:${repositoryId}`,
      granule: GRANULE,
      recording: true,
      fill: 'none',
      meta: countingFrom(backup, name),
    },
  ])
}

/** Where the image is made. Kind 'exists' when there is something. */
async function freeImage({ host, home }: EngineContext, { image, name }: RestoreRequest): Promise<string> {
  if (image !== undefined && !path.isAbsolute(image))
    throw new BlockError('invalid-argument', `${image}: the image of a disk needs an absolute path`)
  if (image === undefined) await host.makeFolder(home.imageFolder)
  const file = image ?? path.join(home.imageFolder, `${name}.qcow2`)
  const folder = path.dirname(file)
  if ((await host.status(folder))?.kind !== 'folder')
    throw new BlockError('not-found', `the folder ${folder} does not exist`, { path: folder })
  const real = path.join(await host.realPath(folder), path.basename(file))
  if ((await host.status(real)) === undefined) return real
  throw new BlockError('exists', `${real} is there already: name another image`, { path: real })
}
