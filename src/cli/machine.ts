// varve machine: create, list, show, add, remove.

import type { Command } from 'commander'
import type { MachineReply } from '../api/host-routes.ts'
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

function describe({ name, disks }: MachineReply): string {
  return `${name}: ${disks.join(', ')}`
}
