// What cannot be done to a disk while a job runs on it: one table. A backup reads a moment that no merge changes, so the two
// go together; a revert would change the disk under it.

import { BlockError } from '../block/error.ts'
import { disksOf, type JobSpec } from './catalog.ts'
import type { EngineContext } from './context.ts'

/** Each work on a chain, and the jobs that it has to wait for: those that change the chain too, or what a revert would change. */
const WAITS_FOR = {
  'snapshot create': ['commit', 'stream', 'mirror'],
  'snapshot export': ['commit', 'stream', 'mirror'],
  resize: ['commit', 'stream', 'mirror', 'backup'],
  clone: ['commit', 'stream', 'mirror'],
  commit: ['commit', 'stream', 'mirror'],
  stream: ['commit', 'stream', 'mirror'],
  mirror: ['commit', 'stream', 'mirror'],
  revert: ['commit', 'stream', 'mirror', 'backup'],
} as const satisfies Record<string, readonly JobSpec['kind'][]>

export type ChainWork = keyof typeof WAITS_FOR

/** Kind 'busy' while a job runs on the disk that the work has to wait for. */
export function refuseConflict(context: EngineContext, disk: string, work: ChainWork): void {
  const kinds: readonly JobSpec['kind'][] = WAITS_FOR[work]
  const job = context.jobs.find(({ spec }) => kinds.includes(spec.kind) && disksOf(spec).includes(disk))
  if (job === undefined) return
  throw new BlockError('busy', `${work} has to wait: job ${job.id} is at work on disk ${disk}`)
}
