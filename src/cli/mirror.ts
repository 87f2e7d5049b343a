// varve mirror: copies a disk to another place and keeps the copy equal, until it is completed.

import path from 'node:path'
import { type Command, Option } from 'commander'
import type { BodyInput, JobReply } from '../api/schema.ts'
import { BlockError } from '../block/error.ts'
import { formatSize } from '../base/size.ts'
import { confirm } from './confirm.ts'
import { print } from './context.ts'
import { type Cli, cliOf, followJob } from './daemon-context.ts'
import { restOf } from './progress.ts'
import { addTermOptions, type TermOptions, termsOf } from './terms.ts'

type Request = BodyInput<'mirror'>

interface MirrorOptions extends TermOptions {
  readonly format?: Request['format']
  readonly sync: NonNullable<Request['sync']>
  readonly bitmap?: string
  readonly mode: NonNullable<Request['mode']>
  readonly existing?: boolean
  readonly complete?: boolean
  readonly pivot?: boolean
  readonly yes?: boolean
  readonly wait: boolean
}

export function addMirrorCommand(program: Command): void {
  const command = program
    .command('mirror <disk> <target>')
    .description('copy a disk to an image, a block device or an NBD URI and keep it equal while the guest writes')
    .addOption(new Option('-f, --format <format>', 'format of a target that is no NBD URI').choices(['raw', 'qcow2']))
    .addOption(
      new Option('--sync <what>', 'what is copied at first: all, what the active layer owns, nothing, or a bitmap')
        .choices(['full', 'top', 'none', 'bitmap'])
        .default('full'),
    )
    .option('--bitmap <name>', 'the bitmap of --sync bitmap')
    .addOption(modeOption())
    .option('--existing', 'write over what is at the target; else an image is made')
    .option('--complete', 'end as soon as the target is equal: it stays a copy of that moment')
    .option('--pivot', 'the same, and the disk goes on at the target')
  addTermOptions(command, 'mirror')
    .option('-y, --yes', 'end the snapshots that a pivot leaves behind without asking')
    .option('--no-wait', 'return as soon as the job runs')
    .action(mirror)
}

export function modeOption(): Option {
  return new Option(
    '--mode <mode>',
    'the guest never waits for the target, or writes to both; auto changes when it must',
  )
    .choices(['auto', 'background', 'write-blocking'])
    .default('auto')
}

async function mirror(disk: string, target: string, options: MirrorOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const { format, sync, bitmap, mode, existing, complete, pivot } = options
  if (complete === true && pivot === true)
    throw new BlockError('invalid-argument', 'say --complete or --pivot, not both')
  if (pivot === true && sync !== 'top') await askForSnapshots(cli, disk, options)
  const finish = pivot === true ? 'pivot' : complete === true ? 'copy' : undefined
  const body: Request = {
    target: /^nbds?(\+unix)?:/.test(target) ? target : path.resolve(target),
    sync,
    mode,
    existing: existing === true,
    ...termsOf(options),
    ...(format === undefined ? {} : { format }),
    ...(bitmap === undefined ? {} : { bitmap }),
    ...(finish === undefined ? {} : { finish }),
  }
  const isOver = finish === undefined ? ({ state }: JobReply): boolean => state === 'ready' : undefined
  const following = { wait: options.wait, ...(isOver === undefined ? {} : { isOver }) }
  const last = await followJob(cli, cli.api.call('mirror', { disk }, body), following)
  print(cli, last, () => describeMirror(last))
}

async function askForSnapshots(cli: Cli, disk: string, { yes }: MirrorOptions): Promise<void> {
  const ends = (await cli.api.call('listSnapshots', { disk }, {})).filter(({ inChain }) => inChain)
  if (ends.length > 0 && yes !== true)
    await confirm(cli, `The pivot of ${disk} ends the snapshots ${ends.map(({ name }) => name).join(', ')}`)
}

/** Says of a mirror how it is, what the target holds, and what can be done. */
export function describeMirror({ id, state, details, error, restMs }: JobReply): string {
  const { holds, mode, reason, behind } = details as Readonly<Record<string, string | number | undefined>>
  const kept = (details['kept'] ?? []) as readonly string[]
  const next = state === 'ready' ? `varve job complete ${id} [--pivot], or varve job cancel ${id}` : undefined
  const isOpen = state === 'running' || state === 'ready'
  return [
    `${id}: ${state}`,
    ...(isOpen && mode !== undefined ? [`mode ${mode}`] : []),
    ...(isOpen && typeof behind === 'number' && behind > 0 ? [`${formatSize(behind)} behind`] : []),
    ...(state === 'running' ? [restOf(restMs)] : []),
    ...(isOpen && reason !== undefined ? [String(reason)] : []),
    ...(holds === undefined ? [] : [`${String(details['target'])} holds ${holds}`]),
    ...(kept.length > 0 ? [`no longer used, and left where it is: ${kept.join(', ')}`] : []),
    ...(error === undefined ? [] : [error.message]),
    ...(next === undefined ? [] : [next]),
  ].join('; ')
}
