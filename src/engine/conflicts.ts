// What cannot be done to a disk while a job runs on it: one table. A backup reads a moment that no merge changes, as does a view, so
// these go together; a revert would change the disk under it.

import { BlockError } from '../block/error.ts'
import { disksOf, type JobSpec } from './catalog.ts'
import type { EngineContext } from './context.ts'

/** Each work on a chain, and the jobs that it has to wait for: those that change the chain too, or what a revert would change. */
const WAITS_FOR = {
  'snapshot create': ['commit', 'stream', 'restore', 'overwrite', 'mirror', 'migrate'],
  'snapshot export': ['commit', 'stream', 'restore', 'overwrite', 'mirror', 'migrate'],
  resize: ['commit', 'stream', 'restore', 'overwrite', 'mirror', 'migrate', 'backup', 'view'],
  clone: ['commit', 'stream', 'restore', 'overwrite', 'mirror', 'migrate'],
  commit: ['commit', 'stream', 'restore', 'overwrite', 'mirror', 'migrate'],
  stream: ['commit', 'stream', 'restore', 'overwrite', 'mirror', 'migrate'],
  mirror: ['commit', 'stream', 'restore', 'overwrite', 'mirror', 'migrate'],
  // The bitmaps go along as they are: no backup has some of their bits for itself.
  migrate: ['commit', 'stream', 'restore', 'overwrite', 'mirror', 'migrate', 'backup', 'view'],
  backup: ['migrate', 'overwrite'],
  'restore onto': ['commit', 'stream', 'restore', 'overwrite', 'mirror', 'migrate', 'backup', 'view'],
  revert: ['commit', 'stream', 'restore', 'overwrite', 'mirror', 'migrate', 'backup', 'view'],
} as const satisfies Record<string, readonly JobSpec['kind'][]>

export type ChainWork = keyof typeof WAITS_FOR

/** What can be done to a disk while the rest of it is in a backup, and to one that a restore onto it has left half done. */
const WHILE_RESTORING: readonly ChainWork[] = ['stream', 'backup']
const WHILE_HALF: readonly ChainWork[] = ['restore onto', 'revert']

/**
 * Kind 'busy' while a job runs on the disk that the work has to wait for, or while not all of the disk is here. A backup that waits for its
 * turn has not begun: nothing waits for it.
 */
export function refuseConflict(context: EngineContext, disk: string, work: ChainWork): void {
  const kinds: readonly JobSpec['kind'][] = WAITS_FOR[work]
  const job = context.jobs.find(({ spec }, state) => {
    const isWaiting = spec.kind === 'backup' && state === 'created'
    return !isWaiting && kinds.includes(spec.kind) && disksOf(spec).includes(disk)
  })
  const restoring = context.disks.get(disk)?.record.restoring
  if (job === undefined && restoring !== undefined && !WHILE_RESTORING.includes(work)) {
    const message = `${work} has to wait: the rest of disk ${disk} is in backup ${restoring.backup}: varve stream ${disk} brings it`
    throw new BlockError('busy', message, { device: disk })
  }
  const overwriting = context.disks.get(disk)?.record.overwriting
  if (job === undefined && overwriting !== undefined && !WHILE_HALF.includes(work)) {
    const message = `${work} has to wait: disk ${disk} is half of backup ${overwriting.backup}: varve restore ${overwriting.backup} --onto ${disk} makes it whole`
    throw new BlockError('busy', message, { device: disk })
  }
  if (job === undefined) return
  throw new BlockError('busy', `${work} has to wait: job ${job.id} is at work on disk ${disk}`)
}
