// varve backup of several machines, or of all: they are queued, each with a moment and an outcome of its own. This command only follows
// them, one after the other in their order; what fails does not stop the rest, and the exit status says whether all went well.

import type { JobReply } from '../api/schema.ts'
import { formatSize } from '../base/size.ts'
import { isBlockError } from '../block/error.ts'
import { print, table, warn } from './context.ts'
import { type Cli } from './daemon-context.ts'
import { Progress } from './progress.ts'
import type { TermOptions } from './terms.ts'

export interface QueueWish extends Partial<TermOptions> {
  /** All unless given. */
  readonly machines?: string[]
  readonly repository: string
  readonly full: boolean
  readonly prove?: number
  readonly since?: string
  readonly checkpoint?: string
}

/** How one machine fared. */
interface Outcome {
  readonly machine: string
  readonly job: string
  readonly error?: string
  readonly backup?: string
  readonly kind?: string
  readonly readBytes?: number
  readonly storedBytes?: number
}

/** Queues and, unless `wait` is false, follows. Sets exit status 1 when one failed. */
export async function backupQueue(cli: Cli, wish: QueueWish, wait: boolean): Promise<void> {
  const queued = await cli.api.call('queueBackups', {}, wish)
  if (!wait) {
    const rows = queued.map(({ id, subject }) => [id, subject])
    print(cli, queued, () => table(['JOB', 'MACHINE'], rows))
    return
  }
  const leave = (): void => {
    warn('the queue goes on without this command: varve job list')
    process.kill(process.pid, 'SIGINT')
  }
  process.once('SIGINT', leave)
  const outcomes: Outcome[] = []
  try {
    for (const job of queued) {
      const outcome = await follow(cli, job)
      outcomes.push(outcome)
      if (!cli.json) process.stdout.write(`${describe(outcome)}\n`)
    }
  } finally {
    process.off('SIGINT', leave)
  }
  const failed = outcomes.filter(({ error }) => error !== undefined).length
  const done = outcomes.length - failed
  const sum = failed === 0 ? '' : `, ${failed} failed`
  print(cli, { done, failed, machines: outcomes }, () => `${done} of ${outcomes.length} machines backed up${sum}`)
  if (failed > 0) process.exitCode = 1
}

async function follow(cli: Cli, { id, subject }: JobReply): Promise<Outcome> {
  const progress = new Progress(subject)
  let told: unknown
  const show = ({ done, total, details }: JobReply): void => {
    progress.update(done, total)
    const { waits } = details
    if (typeof waits === 'string' && waits !== told) warn(`${subject} waits: ${waits}`)
    told = waits
  }
  try {
    const ended = await cli.api.follow(id, show)
    const { queuedAgain } = ended.details
    if (typeof queuedAgain !== 'string') return outcomeOf(ended)
    warn(`${subject}: ${ended.error?.message}; it goes on as ${queuedAgain} when it has its turn again`)
    return await follow(cli, { ...ended, id: queuedAgain })
  } catch (error) {
    // Of very many that ended quickly, the history may have let go of the first.
    if (!isBlockError(error, 'not-found')) throw error
    return { machine: subject, job: id, error: 'it has ended, and the history no longer has it' }
  } finally {
    progress.end()
  }
}

function outcomeOf({ id, subject, error, details }: JobReply): Outcome {
  if (error !== undefined) return { machine: subject, job: id, error: error.message }
  const disks = (details['disks'] ?? []) as readonly { readonly kind: string }[]
  return {
    machine: subject,
    job: id,
    backup: String(details['backup']),
    kind: disks.every(({ kind }) => kind === 'incremental') ? 'incremental' : 'full',
    readBytes: Number(details['readBytes']),
    storedBytes: Number(details['storedBytes']),
  }
}

function describe({ machine, error, backup, kind, readBytes = 0, storedBytes = 0 }: Outcome): string {
  if (error !== undefined) return `${machine}: failed: ${error}`
  return `${machine}: ${kind} ${backup}: read ${formatSize(readBytes)}, stored ${formatSize(storedBytes)}`
}
