// varve machine: create, list, show, add, remove, set.

import path from 'node:path'
import type { Command } from 'commander'
import type { MachineReply } from '../api/host-routes.ts'
import { GUEST_FREEZE_MS } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import { print, table } from './context.ts'
import { cliOf } from './daemon-context.ts'

export function addMachineCommands(program: Command): void {
  const machine = program
    .command('machine')
    .description('disks that belong together: snapshot and backed up at one moment')
  machine
    .command('create <name> <disks...>')
    .description('make a machine of disks that are of none')
    .action(async (name: string, disks: string[], _options: unknown, command: Command) => {
      const cli = cliOf(command)
      print(cli, await cli.api.call('createMachine', {}, { name, disks }), describe)
    })
  machine
    .command('list')
    .description('all machines; a disk of none of them is a machine by itself')
    .action(async (_options: unknown, command: Command) => {
      const cli = cliOf(command)
      const found = await cli.api.call('listMachines', {}, {})
      print(cli, found, () =>
        table(
          ['MACHINE', 'DISKS'],
          found.map(({ name, disks }) => [name, disks.join(' ')]),
        ),
      )
    })
  machine
    .command('show <name>')
    .description('one machine')
    .action(async (name: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      print(cli, await cli.api.call('showMachine', { machine: name }, {}), describe)
    })
  machine
    .command('add <name> <disks...>')
    .description('take more disks into a machine')
    .action(async (name: string, disks: string[], _options: unknown, command: Command) => {
      const cli = cliOf(command)
      print(cli, await cli.api.call('changeMachine', { machine: name }, { add: disks }), describe)
    })
  machine
    .command('remove <name> [disks...]')
    .description('take disks out of a machine; with none named, forget it. Its disks stay')
    .action(remove)
  machine
    .command('set <name>')
    .description('how the guest is frozen for the moment of a snapshot or backup: by commands, by its agent, or not')
    .option('--freeze-command <command>', 'for the shell, with the name in VARVE_MACHINE; with --thaw-command')
    .option('--thaw-command <command>', 'lets the guest go on; it may be called more than once')
    .option('--agent <socket>', 'the QEMU guest agent, at this Unix socket of QEMU')
    .option('--freeze-limit <seconds>', 'how long the guest is frozen at most; 10 unless told', seconds)
    .option('--no-freeze', 'not at all')
    .action(set)
}

interface SetOptions {
  readonly freezeCommand?: string
  readonly thawCommand?: string
  readonly agent?: string
  readonly freezeLimit?: number
  readonly freeze: boolean
}

async function set(name: string, options: SetOptions, command: Command): Promise<void> {
  const by = wayOf(options)
  const limitMs = (options.freezeLimit ?? GUEST_FREEZE_MS / 1000) * 1000
  const cli = cliOf(command)
  const hooks = by === undefined ? null : { by, limitMs: Math.ceil(limitMs) }
  print(cli, await cli.api.call('setGuestHooks', { machine: name }, { hooks }), describe)
}

type Way = NonNullable<MachineReply['hooks']>['by']

/** Kind 'invalid-argument' unless the options say one way. */
function wayOf({ freezeCommand, thawCommand, agent, freeze }: SetOptions): Way | undefined {
  const isByCommands = freezeCommand !== undefined || thawCommand !== undefined
  if ([isByCommands, agent !== undefined, !freeze].filter(Boolean).length !== 1)
    throw new BlockError('invalid-argument', 'say --freeze-command and --thaw-command, --agent, or --no-freeze')
  if (agent !== undefined) return { kind: 'agent', socket: path.resolve(agent) }
  if (!isByCommands) return undefined
  if (freezeCommand !== undefined && thawCommand !== undefined)
    return { kind: 'commands', freeze: freezeCommand, thaw: thawCommand }
  throw new BlockError('invalid-argument', '--freeze-command and --thaw-command go together')
}

async function remove(name: string, disks: string[], _options: unknown, command: Command): Promise<void> {
  const cli = cliOf(command)
  if (disks.length > 0) {
    print(cli, await cli.api.call('changeMachine', { machine: name }, { remove: disks }), describe)
    return
  }
  await cli.api.call('removeMachine', { machine: name }, {})
  print(cli, {}, () => `${name} removed; its disks stay, each a machine by itself`)
}

function describe({ name, disks, hooks }: MachineReply): string {
  return [`${name}: ${disks.join(', ')}`, ...(hooks === undefined ? [] : [describeHooks(hooks)])].join('\n')
}

function describeHooks({ by, limitMs }: NonNullable<MachineReply['hooks']>): string {
  const way =
    by.kind === 'agent'
      ? `by the guest agent at ${by.socket}`
      : `by ${JSON.stringify(by.freeze)}, and ${JSON.stringify(by.thaw)} after`
  return `the guest is frozen ${way}, for ${limitMs / 1000} s at most`
}

/** Kind 'invalid-argument' when it is no time. */
function seconds(text: string): number {
  const value = Number(text)
  if (text.trim() !== '' && Number.isFinite(value) && value > 0) return value
  throw new BlockError('invalid-argument', `${JSON.stringify(text)} is no time: seconds, more than 0`)
}
