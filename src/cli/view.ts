// varve view: the moment of disks over NBD, for any program to back up.

import type { Command } from 'commander'
import type { BodyInput, JobReply } from '../api/schema.ts'
import { formatSize } from '../base/size.ts'
import { BlockError, type ErrorKind } from '../block/error.ts'
import type { PlainVerb } from '../job/job.ts'
import { print, seconds, table } from './context.ts'
import { cliOf } from './daemon-context.ts'

interface OpenOptions {
  readonly bitmap?: string
  readonly since?: string
  readonly whole?: boolean
  readonly acknowledge?: boolean
  readonly lease?: number
}

/** What a view's details say of each disk. */
interface Exported {
  readonly disk: string
  readonly uri: string
  readonly kind: string
  readonly reason: string
  readonly changedBytes?: number
}

export function addViewCommands(program: Command): void {
  const view = program.command('view').description('the moment of disks over NBD, for other programs to back up')
  view
    .command('open <disks...>')
    .description('take the moment of disks, of all at once, and export it; prints the view’s name and a URI for each')
    .option('--bitmap <name>', 'what changed is qemu:dirty-bitmap:NAME; it counts from now once the view is completed')
    .option('--since <name>', 'likewise, and the bitmap stays as it is')
    .option('--whole', 'with a bitmap: what did not change can be read, too')
    .option('--acknowledge', 'a TRIM says that a range was read, and its scratch is given back')
    .option('--lease <seconds>', 'how long it stays without a request; 600 unless told', seconds)
    .action(open)
  view.command('list').description('the views that are open').action(list)
  view
    .command('complete <view>')
    .description('all of it is safe: bitmaps count from its moment')
    .action((id: string, _options: unknown, command: Command) => end(id, 'finalize', command))
  view
    .command('abort <view>')
    .description('give it up: bitmaps are as if it had not been')
    .action((id: string, _options: unknown, command: Command) => end(id, 'cancel', command))
}

async function open(disks: string[], options: OpenOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const { bitmap, since, whole, acknowledge, lease } = options
  const body: BodyInput<'openView'> = {
    disks,
    ...(bitmap === undefined ? {} : { bitmap }),
    ...(since === undefined ? {} : { since }),
    ...(whole === undefined ? {} : { whole }),
    ...(acknowledge === undefined ? {} : { acknowledge }),
    ...(lease === undefined ? {} : { leaseMs: lease * 1000 }),
  }
  const job = await cli.api.call('openView', {}, body)
  print(cli, { view: job.id, exports: exportsOf(job) }, ({ exports }) =>
    [job.id, ...exports.map(({ disk, uri, kind, reason }) => `${disk}: ${kind} (${reason}): ${uri}`)].join('\n'),
  )
}

async function list(_options: unknown, command: Command): Promise<void> {
  const cli = cliOf(command)
  const jobs = await cli.api.call('listJobs', {}, {})
  const views = jobs.filter(({ kind, endedMs }) => kind === 'view' && endedMs === undefined)
  print(cli, views, () =>
    table(
      ['VIEW', 'DISK', 'KIND', 'CHANGED', 'URI'],
      views.flatMap((job) => exportsOf(job).map((one) => [job.id, one.disk, one.kind, changedOf(one), one.uri])),
    ),
  )
}

async function end(id: string, verb: PlainVerb, command: Command): Promise<void> {
  const cli = cliOf(command)
  const { kind } = await cli.api.call('showJob', { job: id }, {})
  if (kind !== 'view') throw new BlockError('not-found', `${id} is a ${kind} and no view: varve view list`)
  await cli.api.call('sayToJob', { job: id, verb }, {})
  const ended = await cli.api.follow(id, () => undefined)
  const { error } = ended
  if (error !== undefined && error.kind !== 'cancelled') throw new BlockError(error.kind as ErrorKind, error.message)
  print(cli, ended, () => `${id} ${verb === 'cancel' ? 'has ended; its bits are back' : 'is complete'}`)
}

function exportsOf({ details }: JobReply): readonly Exported[] {
  return (details['exports'] ?? []) as readonly Exported[]
}

function changedOf({ changedBytes }: Exported): string {
  return changedBytes === undefined ? 'all' : formatSize(changedBytes)
}
