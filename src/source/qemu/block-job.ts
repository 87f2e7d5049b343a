// QEMU's own block jobs (qapi/job.json), followed by asking: until one is ready, or has ended. They are started with `auto-dismiss` off, so that how
// they ended can be asked after it.

import { setTimeout as delay } from 'node:timers/promises'
import { QMP_MOVE_LOOK_MS } from '../../base/qemu-limits.ts'
import { BlockError } from '../../block/error.ts'
import type { QmpClient } from './qmp-client.ts'

export interface QemuJob {
  readonly id: string
  readonly status: string
  readonly 'current-progress': number
  readonly 'total-progress': number
  readonly error?: string
}

export interface JobWatch {
  /** Hears of bytes done, of so many, whenever the job was looked at; what it throws ends the waiting. */
  readonly progress: (done: number, total: number) => void | Promise<void>
  /** Aborted: it is waited for no longer. The job itself goes on. */
  readonly signal: AbortSignal
}

export async function jobsOf(client: QmpClient): Promise<readonly QemuJob[]> {
  return (await client.execute('query-jobs')) as readonly QemuJob[]
}

/** Waits until the job is so far. Kinds 'io' for what it failed with and when it is gone, 'cancelled' when somebody cancelled it. */
export async function reach(
  client: QmpClient,
  id: string,
  status: 'ready' | 'concluded',
  { progress, signal }: JobWatch,
): Promise<void> {
  for (;;) {
    signal.throwIfAborted()
    const job = (await jobsOf(client)).find((found) => found.id === id)
    if (job === undefined) throw new BlockError('io', `${client.name}: its job ${id} is gone: somebody else ended it`)
    if (job.error !== undefined) throw new BlockError('io', `${client.name}: its job failed: ${job.error}`)
    await progress(job['current-progress'], job['total-progress'])
    if (job.status === status) return
    if (job.status === 'concluded') throw new BlockError('cancelled', `${client.name}: its job ${id} was cancelled`)
    await delay(QMP_MOVE_LOOK_MS, undefined, { signal }).catch(() => undefined)
  }
}
