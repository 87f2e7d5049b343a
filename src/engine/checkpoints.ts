// Checkpoints: named moments of backups. Each is a bitmap of its disk that records from its moment on and stays until it is removed, so
// that a backup taken later copies what changed since then (a differential), whatever backups lie in between and whoever took them.
//
//   backup:R           counts from the last backup in repository R, and moves with each
//   checkpoint:monday  counts from the backup that was made as checkpoint monday, and stays

import { BlockError } from '../block/error.ts'
import type { Disk } from '../chain/disk.ts'
import { checkName } from './context.ts'

const PREFIX = 'checkpoint:'

/** What a backup has to do with checkpoints. */
export interface CheckpointWish {
  /** Copies what changed since this checkpoint, in place of since the last backup. */
  readonly since?: string
  /** Its moment becomes this checkpoint. */
  readonly checkpoint?: string
}

/** What of a request is kept for the job. Kind 'invalid-argument' for what cannot be asked for together, or is no name. */
export function checkpointWish(request: {
  readonly since?: string | undefined
  readonly checkpoint?: string | undefined
  readonly full: boolean
  readonly prove?: number | undefined
}): CheckpointWish {
  const { since, checkpoint, full, prove } = request
  for (const name of [since, checkpoint]) if (name !== undefined) checkName('checkpoint', name)
  if (since !== undefined && (full || prove !== undefined)) {
    const what = full ? 'a full backup' : 'a proof'
    throw new BlockError(
      'invalid-argument',
      `${what} looks at more than what changed since a checkpoint: say one of them`,
    )
  }
  return { ...(since === undefined ? {} : { since }), ...(checkpoint === undefined ? {} : { checkpoint }) }
}

/** The name of its bitmap. */
export function checkpointBitmap(checkpoint: string): string {
  return PREFIX + checkpoint
}

/** The checkpoint whose bitmap this is; undefined for another bitmap. */
export function checkpointOf(bitmap: string): string | undefined {
  return bitmap.startsWith(PREFIX) && !bitmap.endsWith(':captured') ? bitmap.slice(PREFIX.length) : undefined
}

export function isCheckpoint(bitmap: string): boolean {
  return checkpointOf(bitmap) !== undefined
}

/** Kind 'exists' when the disk has a checkpoint of that name. */
export function refuseSecond(disk: Disk, checkpoint: string): void {
  if (!disk.log.bitmaps.has(checkpointBitmap(checkpoint))) return
  const advice = `varve checkpoint remove ${disk.name} ${checkpoint}`
  throw new BlockError('exists', `disk ${disk.name} has a checkpoint ${checkpoint} already: ${advice}`)
}
