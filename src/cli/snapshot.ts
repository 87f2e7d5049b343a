// varve snapshot and varve clone: live snapshots, and new disks over them.

import path from 'node:path'
import { type Command, Option } from 'commander'
import { BlockError } from '../block/error.ts'
import { print, table } from './context.ts'
import { confirm } from './confirm.ts'
import { cliOf, followJob, given } from './daemon-context.ts'
import { snapshotTree } from './snapshot-tree.ts'
import { addTermOptions, type TermOptions, termsOf } from './terms.ts'

export function addSnapshotCommands(program: Command): void {
  const snapshot = program.command('snapshot').description('live snapshots of a disk')
  snapshot
    .command('create <machine> [name]')
    .description(
      'freeze the present state of a disk, or of all disks of a machine, under a name; writes go to new overlays',
    )
    .option('--with <machines...>', 'others, at the same moment; of all or of none')
    .action(create)
  snapshot
    .command('list <disk>')
    .description('the snapshots of a disk, as a tree: each below the one that it follows')
    .action(async (disk: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      const found = await cli.api.call('listSnapshots', { disk }, {})
      print(cli, found, () =>
        table(
          ['NAME', 'CREATED', 'IN CHAIN', 'IMAGE', 'EXPORTED AT'],
          snapshotTree(found).map(({ drawn, snapshot: row }) => [
            drawn,
            new Date(row.createdMs).toISOString(),
            row.inChain ? 'yes' : 'no',
            row.path,
            row.uri ?? '',
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
  const deletion = snapshot
    .command('delete <disk> <name>')
    .description('merge the layer of the snapshot with the one above it, while the guest writes')
    .addOption(
      new Option('--direction <way>', 'down into the snapshot, or up into the layer above; auto copies less')
        .choices(['auto', 'down', 'up'])
        .default('auto'),
    )
  addTermOptions(deletion, 'commit').option('--no-wait', 'return as soon as the job runs').action(remove)

  snapshot
    .command('export <disk> <name>')
    .description('serve a snapshot over NBD for reading only, while the disk lives on; prints its URI')
    .action(async (disk: string, name: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      print(cli, await cli.api.call('exportSnapshot', { disk, snapshot: name }, {}), ({ uri }) => uri)
    })
  snapshot
    .command('unexport <disk> <name>')
    .description('end that; its readers are cut off')
    .action(async (disk: string, name: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      await cli.api.call('unexportSnapshot', { disk, snapshot: name }, {})
      print(cli, {}, () => `${name} is no longer exported`)
    })

  program
    .command('clone <disk> <snapshot> <name> [image]')
    .description('make a new disk over a snapshot, at once; prints its URI')
    .action(clone)
}

async function create(
  disk: string,
  wanted: string | undefined,
  options: { readonly with?: readonly string[] },
  command: Command,
): Promise<void> {
  const cli = cliOf(command)
  const name = wanted ?? defaultName()
  const made = await cli.api.call('createSnapshots', {}, { disks: [disk, ...(options.with ?? [])], name })
  const [only] = made
  if (only?.disk === disk && made.length === 1) {
    print(cli, only, () => `${only.name}: ${only.path}`)
    return
  }
  print(cli, made, () => made.map((one) => `${one.disk}: ${one.name}: ${one.path}`).join('\n'))
}

interface DeleteOptions extends TermOptions {
  readonly direction: 'auto' | 'down' | 'up'
  readonly wait: boolean
}

async function remove(disk: string, name: string, options: DeleteOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const request = { direction: options.direction, ...termsOf(options) }
  const last = await followJob(cli, cli.api.call('deleteSnapshot', { disk, snapshot: name }, request), options)
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

function defaultName(): string {
  return new Date().toISOString().replace(/[:.]/g, '-').replace('Z', '')
}
