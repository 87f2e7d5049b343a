// varve migrate: moves a disk to another daemon while its guest writes, and ends what such a move left behind.

import { type Command, Option } from 'commander'
import type { BodyInput, DiskReply, JobReply } from '../api/schema.ts'
import { BlockError } from '../block/error.ts'
import { formatSize } from '../base/size.ts'
import { isPeerUri } from '../api/peer-uri.ts'
import { confirm } from './confirm.ts'
import { print } from './context.ts'
import { type Cli, cliOf, followJob } from './daemon-context.ts'
import { modeOption } from './mirror.ts'
import { addPeerOptions, type PeerOptions, withCredentials } from './peer-options.ts'
import { addTermOptions, type TermOptions, termsOf } from './terms.ts'

type Request = BodyInput<'migrate'>

interface MigrateOptions extends TermOptions, PeerOptions {
  readonly name?: string
  readonly format?: Request['format']
  readonly image?: string
  readonly mode: NonNullable<Request['mode']>
  readonly complete: boolean
  readonly handOver?: boolean
  readonly wait: boolean
  readonly settle?: boolean
  readonly force?: boolean
  readonly yes?: boolean
}

export function addMigrateCommand(program: Command): void {
  const command = program
    .command('migrate <disk> [target]')
    .description('move a disk, its snapshots and bitmaps to another daemon while the guest writes')
    .option('--name <name>', 'the disk’s name there; the same unless told')
    .addOption(
      new Option('-f, --format <format>', 'format of the image that is made there; as here unless told').choices([
        'raw',
        'qcow2',
      ]),
    )
    .option('--image <path>', 'where it is made, there; in the home of that daemon unless told')
    .addOption(modeOption())
    .option('--no-complete', 'do not switch over before varve job complete')
    .option('--hand-over', 'hang up on the guest, which connects to the new place; unless told it is passed on')
  addPeerOptions(command)
  addTermOptions(command, 'migrate')
    .option('--no-wait', 'return as soon as the job runs')
    .option('--settle', 'end what a migration left: ask the other side, and finish or undo')
    .option('--force', 'with --settle: without its word, when that host is lost for ever')
    .option('-y, --yes', 'do not ask before --force')
    .action(migrate)
}

async function migrate(
  disk: string,
  target: string | undefined,
  options: MigrateOptions,
  command: Command,
): Promise<void> {
  const cli = cliOf(command)
  if (options.settle === true) return settle(cli, disk, target, options)
  if (options.force === true) throw new BlockError('invalid-argument', '--force goes with --settle')
  if (target === undefined || !isPeerUri(target)) {
    const message = 'name the daemon to migrate to: varve+unix:///PATH/run/api.sock or varve+tls://HOST:PORT/'
    throw new BlockError('invalid-argument', message)
  }
  const { name, format, image, mode, complete, handOver, wait } = options
  const body: Request = {
    target: withCredentials(target, options),
    mode,
    complete,
    forward: handOver !== true,
    ...termsOf(options),
    ...(name === undefined ? {} : { name }),
    ...(format === undefined ? {} : { format }),
    ...(image === undefined ? {} : { image }),
  }
  const isOver = complete ? undefined : ({ state }: JobReply): boolean => state === 'ready'
  const following = { wait, ...(isOver === undefined ? {} : { isOver }) }
  const last = await followJob(cli, cli.api.call('migrate', { disk }, body), following)
  print(cli, last, () => describeMigration(last))
}

async function settle(cli: Cli, disk: string, target: string | undefined, options: MigrateOptions): Promise<void> {
  if (target !== undefined)
    throw new BlockError('invalid-argument', '--settle asks the daemon that the disk’s record names: give no target')
  const force = options.force === true
  if (force && options.yes !== true) {
    const risk =
      'If the other daemon has the disk, or comes back and goes on with it, there are two that write, and one of them loses all it wrote'
    await confirm(cli, `${disk} is settled without the word of the other side. ${risk}`)
  }
  const settled = await cli.api.call('settleDisk', { disk }, { force })
  print(cli, settled, () => describeSettled(settled))
}

function describeSettled({ name, state, migration, uri }: DiskReply): string {
  return [
    `${name}: ${state}`,
    ...(migration === undefined ? [] : [migration]),
    ...(uri === undefined ? [] : [uri]),
  ].join('; ')
}

/** Says of a migration how it is, and what can be done. */
export function describeMigration({ id, state, subject, details, error }: JobReply): string {
  const { copies, holds, mode, pauseMs, behind, waits, left } = details as Readonly<
    Record<string, string | number | undefined>
  >
  const isOpen = state === 'running' || state === 'ready'
  const target = String(details['target']).replace(/\?.*$/, '')
  const settle = `to settle it, varve migrate ${subject} --settle`
  return [
    `${id}: ${state}`,
    ...(isOpen && copies !== undefined ? [`copies ${copies}`] : []),
    ...(isOpen && mode !== undefined ? [`mode ${mode}`] : []),
    ...(isOpen && typeof behind === 'number' && behind > 0 ? [`${formatSize(behind)} behind`] : []),
    ...(state === 'finalizing' && waits !== undefined ? [`handed over, and waits: ${waits}; ${settle}`] : []),
    ...(holds === undefined ? [] : [`${target} holds ${holds}`]),
    ...(holds === undefined || pauseMs === undefined ? [] : [`the guest waited ${pauseMs} ms`]),
    ...(error === undefined ? [] : [error.message]),
    ...(left === undefined ? [] : [String(left)]),
    ...(state === 'paused' || state === 'standby' ? [settle] : []),
    ...(state === 'ready' ? [`varve job complete ${id}, or varve job cancel ${id}`] : []),
  ].join('; ')
}
