// varve snapshot, varve clone, varve commit and varve stream: live snapshots, new disks over them, and live merge, downward and upward.

import path from 'node:path'
import { createInterface } from 'node:readline/promises'
import { type Command, Option } from 'commander'
import type { JobReply } from '../api/schema.ts'
import { BlockError } from '../block/error.ts'
import { print, sizeArgument, table } from './context.ts'
import { type Cli, cliOf, followJob } from './daemon-context.ts'

export function addSnapshotCommands(program: Command): void {
  const snapshot = program.command('snapshot').description('live snapshots of a disk')
  snapshot
    .command('create <disk> [name]')
    .description('freeze the present state under a name; writes go to a new overlay')
    .action(async (disk: string, name: string | undefined, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      const made = await cli.api.call('createSnapshot', { disk }, { name: name ?? defaultName() })
      print(cli, made, () => `${made.name}: ${made.path}`)
    })
  snapshot
    .command('list <disk>')
    .description('the snapshots of a disk: those that its present state follows, oldest first, then those beside')
    .action(async (disk: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      const found = await cli.api.call('listSnapshots', { disk }, {})
      print(cli, found, () =>
        table(
          ['NAME', 'CREATED', 'AFTER', 'IN CHAIN', 'IMAGE'],
          found.map((row) => [
            row.name,
            new Date(row.createdMs).toISOString(),
            row.after ?? '',
            row.inChain ? 'yes' : 'no',
            row.path,
          ]),
        ),
      )
    })
  snapshot
    .command('revert <disk> <name>')
    .description('make the disk what the snapshot holds, at once; nothing may be using it: stop the guest first')
    .option('--keep-as <name>', 'name of the snapshot that keeps the present state; "before-NAME-TIME" unless told')
    .option('--discard', 'keep no snapshot of the present state')
    .option('-y, --yes', 'do not ask')
    .action(revert)
  snapshot
    .command('delete <disk> <name>')
    .description('merge the layer of the snapshot with the one above it, while the guest writes')
    .addOption(
      new Option('--direction <way>', 'down into the snapshot, or up into the layer above; auto copies less')
        .choices(['auto', 'down', 'up'])
        .default('auto'),
    )
    .option('--speed <rate>', 'bytes per second', sizeArgument, 0)
    .option('--no-wait', 'return as soon as the job runs')
    .action(remove)

  program
    .command('clone <disk> <snapshot> <name> [image]')
    .description('make a new disk over a snapshot, at once; prints its URI')
    .action(clone)
  program
    .command('commit <disk>')
    .description('merge layers down while the guest writes; by default all of them into the base')
    .option('--from <layer>', 'highest layer that goes down: a snapshot, an image or "active"')
    .option('--to <layer>', 'layer that takes all: a snapshot, an image or "base"')
    .option('--speed <rate>', 'bytes per second', sizeArgument, 0)
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
    .option('-y, --yes', 'end the snapshots in between without asking')
    .option('--no-wait', 'return as soon as the job runs')
    .action(stream)
}

interface DeleteOptions {
  readonly direction: 'auto' | 'down' | 'up'
  readonly speed: number
  readonly wait: boolean
}

async function remove(disk: string, name: string, options: DeleteOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const { speed, direction } = options
  const last = await followJob(
    cli,
    cli.api.call('deleteSnapshot', { disk, snapshot: name }, { speed, direction }),
    options,
  )
  // A snapshot beside the chain is not merged.
  const said = last.details as { readonly direction?: string; readonly reason?: string }
  const way = said.direction === undefined ? '' : `; merged ${said.direction}: ${said.reason}`
  print(cli, last, () => `${last.id}: ${last.state}${way}`)
}

interface RevertOptions {
  readonly keepAs?: string
  readonly discard?: boolean
  readonly yes?: boolean
}

async function revert(disk: string, name: string, options: RevertOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  if (options.discard === true && options.keepAs !== undefined)
    throw new BlockError('invalid-argument', 'say --discard or --keep-as, not both')
  const keep = options.discard === true ? undefined : (options.keepAs ?? `before-${name.slice(0, 32)}-${defaultName()}`)
  if (options.yes !== true) {
    const fate = keep === undefined ? 'discards what it holds now' : `keeps what it holds now as ${keep}`
    await confirm(cli, `This changes disk ${disk} under whoever uses it and ${fate}`)
  }
  await cli.api.call('revert', { disk, snapshot: name }, given({ keep }))
  print(cli, { disk, snapshot: name, kept: keep ?? null }, () =>
    [`${disk} is as ${name}`, ...(keep === undefined ? [] : [`before: ${keep}`])].join('; '),
  )
}

async function clone(
  disk: string,
  snapshot: string,
  name: string,
  image: string | undefined,
  _options: unknown,
  command: Command,
): Promise<void> {
  const cli = cliOf(command)
  const made = await cli.api.call(
    'clone',
    { disk, snapshot },
    { name, ...given({ image: image && path.resolve(image) }) },
  )
  print(cli, made, ({ uri }) => uri ?? '')
}

interface MergeOptions {
  readonly speed: number
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
  await end(cli, cli.api.call('commit', { disk }, { ...range, speed: options.speed }), options, ends)
}

async function stream(disk: string, options: StreamOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const range = given({ base: options.base, to: options.to })
  const { ends } = await cli.api.call('planStream', { disk }, range)
  if (ends.length > 0 && options.yes !== true) await ask(cli, `This stream of ${disk}`, ends)
  await end(cli, cli.api.call('stream', { disk }, { ...range, speed: options.speed }), options, ends)
}

/** The options that were said. */
function given<T extends Record<string, string | undefined>>(options: T): { [K in keyof T]?: string } {
  const said = Object.entries(options).filter(([, value]) => value !== undefined)
  return Object.fromEntries(said) as { [K in keyof T]?: string }
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

async function confirm(cli: Cli, question: string): Promise<void> {
  if (cli.json || !process.stdin.isTTY) throw new BlockError('invalid-argument', `${question}: say --yes to go on`)
  const terminal = createInterface({ input: process.stdin, output: process.stderr })
  const answer = await terminal.question(`${question}. Go on? [y/N] `)
  terminal.close()
  if (!/^y(es)?$/i.test(answer.trim())) throw new BlockError('cancelled', 'nothing was changed')
}

function defaultName(): string {
  return new Date().toISOString().replace(/[:.]/g, '-').replace('Z', '')
}
