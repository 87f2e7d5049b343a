// varve commit and varve stream: live merge, downward and upward.

import { type Command, Option } from 'commander'
import type { JobReply } from '../api/schema.ts'
import { ERROR_POLICIES, type ErrorPolicy } from '../job/job.ts'
import { print, sizeArgument } from './context.ts'
import { confirm } from './confirm.ts'
import { type Cli, cliOf, followJob, given } from './daemon-context.ts'

export function addMergeCommands(program: Command): void {
  program
    .command('commit <disk>')
    .description('merge layers down while the guest writes; by default all of them into the base')
    .option('--from <layer>', 'highest layer that goes down: a snapshot, an image or "active"')
    .option('--to <layer>', 'layer that takes all: a snapshot, an image or "base"')
    .option('--speed <rate>', 'bytes per second', sizeArgument, 0)
    .addOption(errorOption())
    .option('-y, --yes', 'end the snapshots in between without asking')
    .option('--no-wait', 'return as soon as the job runs')
    .action(commit)
  program
    .command('stream <disk>')
    .description(
      'merge layers up while the guest writes; by default all of them into the active one, which then needs no other',
    )
    .option('--base <layer>', 'layer that stays below: a snapshot, an image or "base"')
    .option('--to <layer>', 'layer that takes what lies between: a snapshot, an image or "active"')
    .option('--speed <rate>', 'bytes per second', sizeArgument, 0)
    .addOption(errorOption())
    .option('-y, --yes', 'end the snapshots in between without asking')
    .option('--no-wait', 'return as soon as the job runs')
    .action(stream)
}

function errorOption(): Option {
  const option = new Option(
    '--on-error <policy>',
    'report ends the job, stop pauses it, enospc only when the target is full',
  )
  return option.choices(ERROR_POLICIES).default('enospc')
}

interface MergeOptions {
  readonly speed: number
  readonly onError: ErrorPolicy
  readonly yes?: boolean
  readonly wait: boolean
}

interface CommitOptions extends MergeOptions {
  readonly from?: string
  readonly to?: string
}

interface StreamOptions extends MergeOptions {
  readonly base?: string
  readonly to?: string
}

async function commit(disk: string, options: CommitOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const range = given({ from: options.from, to: options.to })
  const { ends } = await cli.api.call('planCommit', { disk }, range)
  if (ends.length > 0 && options.yes !== true) await ask(cli, `This commit of ${disk}`, ends)
  await end(
    cli,
    cli.api.call('commit', { disk }, { ...range, speed: options.speed, onError: options.onError }),
    options,
    ends,
  )
}

async function stream(disk: string, options: StreamOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const range = given({ base: options.base, to: options.to })
  const { ends } = await cli.api.call('planStream', { disk }, range)
  if (ends.length > 0 && options.yes !== true) await ask(cli, `This stream of ${disk}`, ends)
  await end(
    cli,
    cli.api.call('stream', { disk }, { ...range, speed: options.speed, onError: options.onError }),
    options,
    ends,
  )
}

/** Follows the job unless told not to, and says what became of the layers. */
async function end(cli: Cli, asked: Promise<JobReply>, options: MergeOptions, ends: readonly string[]): Promise<void> {
  const last = await followJob(cli, asked, options)
  const kept = (last.details['kept'] ?? []) as readonly string[]
  print(cli, last, () =>
    [
      `${last.id}: ${last.state}`,
      ...(ends.length > 0 ? [`ended snapshots: ${ends.join(', ')}`] : []),
      ...(kept.length > 0 ? [`no longer used, and left where it is: ${kept.join(', ')}`] : []),
    ].join('; '),
  )
}

/** A merge takes away what these snapshots show, so it is asked for by name. */
function ask(cli: Cli, what: string, ends: readonly string[]): Promise<void> {
  return confirm(cli, `${what} ends the snapshots ${ends.join(', ')}`)
}
