// What cannot be done to a disk while a job runs on it: one table. A backup reads a moment that no merge changes, as does a view, so
// these go together; a revert would change the disk under it.

import { BlockError } from '../block/error.ts'
import { disksOf, type JobSpec } from './catalog.ts'
import type { EngineContext } from './context.ts'

/** Each work on a chain, and the jobs that it has to wait for: those that change the chain too, or what a revert would change. */
const WAITS_FOR = {
  'snapshot create': ['commit', 'stream', 'mirror', 'migrate'],
  'snapshot export': ['commit', 'stream', 'mirror', 'migrate'],
  resize: ['commit', 'stream', 'mirror', 'migrate', 'backup', 'view'],
  clone: ['commit', 'stream', 'mirror', 'migrate'],
  commit: ['commit', 'stream', 'mirror', 'migrate'],
  stream: ['commit', 'stream', 'mirror', 'migrate'],
  mirror: ['commit', 'stream', 'mirror', 'migrate'],
  // The bitmaps go along as they are: no backup has some of their bits for itself.
  migrate: ['commit', 'stream', 'mirror', 'migrate', 'backup', 'view'],
  backup: ['migrate'],
  revert: ['commit', 'stream', 'mirror', 'migrate', 'backup', 'view'],
} as const satisfies Record<string, readonly JobSpec['kind'][]>

export type ChainWork = keyof typeof WAITS_FOR

/** Kind 'busy' while a job runs on the disk that the work has to wait for. A backup that waits for its turn has not begun: nothing waits for it. */
export function refuseConflict(context: EngineContext, disk: string, work: ChainWork): void {
  const kinds: readonly JobSpec['kind'][] = WAITS_FOR[work]
  const job = context.jobs.find(({ spec }, state) => {
    const isWaiting = spec.kind === 'backup' && state === 'created'
    return !isWaiting && kinds.includes(spec.kind) && disksOf(spec).includes(disk)
  })
  if (job === undefined) return
  throw new BlockError('busy', `${work} has to wait: job ${job.id} is at work on disk ${disk}`)
}
