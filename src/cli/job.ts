// varve job: list, show, pause, resume, cancel, finalize, dismiss, complete, set-mode, set-speed.

import type { Command } from 'commander'
import type { JobReply } from '../api/schema.ts'
import { formatSize } from '../base/size.ts'
import { BlockError } from '../block/error.ts'
import { PLAIN_VERBS, type PlainVerb } from '../job/job.ts'
import { MIRROR_MODES } from '../job/mirror.ts'
import { confirm } from './confirm.ts'
import { print, sizeArgument, table } from './context.ts'
import { cliOf, followJob } from './daemon-context.ts'
import { describeMigration } from './migrate.ts'
import { describeMirror } from './mirror.ts'
import { restOf } from './progress.ts'

const HEADS = ['JOB', 'SUBJECT', 'STATE', 'DONE', 'OF', 'REST', 'RESUMED AT', 'ERROR OR WAITS FOR']

const WHAT: Record<PlainVerb, string> = {
  pause: 'stop copying for now',
  resume: 'go on copying, also after what stopped it was mended',
  cancel: 'undo what can be undone, and end',
  finalize: 'let the result of a job that is pending take effect',
}

/** Jobs of which there is more to say than their progress. */
const DESCRIBE: Readonly<Record<string, (status: JobReply) => string>> = {
  mirror: describeMirror,
  migrate: describeMigration,
}

export function addJobCommands(program: Command): void {
  const job = program.command('job').description('long work: merges, mirrors and backups')
  job
    .command('list')
    .description(
      'jobs that run, then those that ended and were not dismissed: by hand, or by themselves when all went well',
    )
    .option('--history', 'the dismissed ones too, as far back as they are kept')
    .action(async ({ history }: { readonly history?: boolean }, command: Command) => {
      const cli = cliOf(command)
      const all = await cli.api.call('listJobs', {}, {})
      const jobs = history === true ? all : all.filter(({ dismissed }) => !dismissed)
      print(cli, jobs, () => table(HEADS, jobs.map(row)))
    })
  job
    .command('show <job>')
    .description('one job')
    .action(async (id: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      print(cli, await cli.api.call('showJob', { job: id }, {}), (status) => {
        const more = DESCRIBE[status.kind]
        const lines = [table(HEADS, [row(status)]), ...(more === undefined ? [] : [more(status)])]
        return [...lines, ...describeCourtesy(status), ...describeIgnored(status)].join('\n')
      })
    })
  for (const verb of PLAIN_VERBS) {
    job
      .command(`${verb} <job>`)
      .description(WHAT[verb])
      .action(async (id: string, _options: unknown, command: Command) => {
        const cli = cliOf(command)
        print(cli, await cli.api.call('sayToJob', { job: id, verb }, {}), (status) => `${status.id}: ${status.state}`)
      })
  }
  job
    .command('dismiss <job>')
    .description('take an ended job out of the list; the history keeps it')
    .action(async (id: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      await cli.api.call('dismissJob', { job: id }, {})
      print(cli, {}, () => `${id} dismissed`)
    })
  job
    .command('complete <job>')
    .description(
      'end a mirror that is ready: its target stays a copy of that moment, unless the disk goes on there; a migration switches over',
    )
    .option('--pivot', 'the disk goes on at the target')
    .option('-y, --yes', 'end the snapshots that a pivot leaves behind without asking')
    .option('--no-wait', 'return at once')
    .action(complete)
  job
    .command('set-mode <job> <mode>')
    .description('how a mirror keeps up with the guest: auto, background or write-blocking')
    .action(async (id: string, word: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      const mode = MIRROR_MODES.find((known) => known === word)
      if (mode === undefined) throw new BlockError('invalid-argument', `${word} is no mode: ${MIRROR_MODES.join(', ')}`)
      const status = await cli.api.call('setMirrorMode', { job: id }, { mode })
      print(cli, status, () => `${status.id}: ${mode}`)
    })
  job
    .command('set-speed <job> <rate>')
    .description('change the speed limit, in bytes per second; 0 is no limit')
    .action(async (id: string, rate: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      const status = await cli.api.call('setJobSpeed', { job: id }, { speed: sizeArgument(rate) })
      print(cli, status, () => `${status.id}: ${formatSize(status.speed)}/s`)
    })
}

/** How the guest fares beside the job, and what the job does for it. */
function describeCourtesy({ guest }: JobReply): string[] {
  if (guest === undefined) return []
  const { latencyMs, targetMs, rate } = guest
  const held = rate === undefined ? '' : `, for which it copies at most ${formatSize(Math.round(rate))} a second`
  return [`a request of the guest takes ${latencyMs.toFixed(1)} ms, and may take ${targetMs.toFixed(1)}${held}`]
}

/** Errors that were tried again. */
function describeIgnored({ details }: JobReply): string[] {
  const { ignored, ignoredLast } = details as { readonly ignored?: number; readonly ignoredLast?: string }
  return ignored === undefined ? [] : [`tried again after ${ignored} errors; the last one: ${ignoredLast}`]
}

interface CompleteOptions {
  readonly pivot?: boolean
  readonly yes?: boolean
  readonly wait: boolean
}

async function complete(id: string, options: CompleteOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const isPivot = options.pivot === true
  const { details } = await cli.api.call('showJob', { job: id }, {})
  const ends = (details['pivotEnds'] ?? []) as readonly string[]
  if (isPivot && ends.length > 0 && options.yes !== true)
    await confirm(cli, `The pivot ends the snapshots ${ends.join(', ')}`)
  const asked = cli.api.call('completeJob', { job: id }, { finish: isPivot ? 'pivot' : 'copy' })
  print(cli, await followJob(cli, asked, options), (status) => (DESCRIBE[status.kind] ?? describeMirror)(status))
}

/** Why its turn has not come. */
function waitsOf({ details }: JobReply): string {
  const { waits } = details
  return typeof waits === 'string' ? waits : ''
}

function row(job: JobReply): string[] {
  const resumed = job.resumedAt > 0 ? formatSize(job.resumedAt) : ''
  return [
    job.id,
    job.subject,
    job.state,
    formatSize(job.done),
    formatSize(job.total),
    job.state === 'running' ? restOf(job.restMs) : '',
    resumed,
    job.error?.message ?? waitsOf(job),
  ]
}
