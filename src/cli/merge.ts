// varve commit and varve stream: live merge, downward and upward.

import type { Command } from 'commander'
import type { JobReply } from '../api/schema.ts'
import { print } from './context.ts'
import { confirm } from './confirm.ts'
import { type Cli, cliOf, followJob, given } from './daemon-context.ts'
import { addTermOptions, type TermOptions, termsOf } from './terms.ts'

export function addMergeCommands(program: Command): void {
  const down = program
    .command('commit <disk>')
    .description('merge layers down while the guest writes; by default all of them into the base')
    .option('--from <layer>', 'highest layer that goes down: a snapshot, an image or "active"')
    .option('--to <layer>', 'layer that takes all: a snapshot, an image or "base"')
  addTermOptions(down, 'commit')
    .option('-y, --yes', 'end the snapshots in between without asking')
    .option('--no-wait', 'return as soon as the job runs')
    .action(commit)
  const up = program
    .command('stream <disk>')
    .description(
      'merge layers up while the guest writes; by default all of them into the active one, which then needs no other',
    )
    .option('--base <layer>', 'layer that stays below: a snapshot, an image or "base"')
    .option('--to <layer>', 'layer that takes what lies between: a snapshot, an image or "active"')
  addTermOptions(up, 'stream')
    .option('-y, --yes', 'end the snapshots in between without asking')
    .option('--no-wait', 'return as soon as the job runs')
    .action(stream)
}

interface MergeOptions extends TermOptions {
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
  await end(cli, cli.api.call('commit', { disk }, { ...range, ...termsOf(options) }), options, ends)
}

async function stream(disk: string, options: StreamOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const range = given({ base: options.base, to: options.to })
  const { ends } = await cli.api.call('planStream', { disk }, range)
  if (ends.length > 0 && options.yes !== true) await ask(cli, `This stream of ${disk}`, ends)
  await end(cli, cli.api.call('stream', { disk }, { ...range, ...termsOf(options) }), options, ends)
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
