// varve vm: machines that run in QEMUs of their own, perhaps libvirt's, with their disks in QEMU's hands. They are backed up by varve backup, as other
// machines are.

import path from 'node:path'
import type { Command } from 'commander'
import type { VmReply } from '../api/vm-routes.ts'
import { formatSize } from '../base/size.ts'
import { BlockError } from '../block/error.ts'
import { print, seconds, table, warn } from './context.ts'
import { cliOf } from './daemon-context.ts'
import { addVmJobCommands } from './vm-jobs.ts'
import { addMoveCommands } from './vm-move.ts'

export function addVmCommands(program: Command): void {
  const vm = program
    .command('vm')
    .description('machines that run in QEMUs of their own, by their monitors or by libvirt')
  vm.command('add <name>')
    .description('take in a machine that runs, and say what can be done with each of its disks')
    .option('--qmp <socket>', "the Unix socket of QEMU's -qmp; Varve uses it briefly now and then")
    .option('--agent <socket>', 'the guest agent, by which the guest is frozen for the moment of a backup')
    .option('--libvirt <domain>', 'a machine of libvirt’s in place of a monitor; it is asked by virsh')
    .option('--connect <uri>', `of its libvirt; ${LIBVIRT_URI} unless told`)
    .option('--freeze', 'libvirt has the guest’s agent freeze it for the moment of a backup')
    .option('--freeze-limit <seconds>', 'how long it is frozen at most; 10 unless told', seconds)
    .action(add)
  addMoveCommands(vm)
  addVmJobCommands(vm)
  vm.command('list')
    .description('all of them')
    .action(async (_options: unknown, command: Command) => {
      const cli = cliOf(command)
      const found = await cli.api.call('listVms', {}, {})
      const rows = found.map((one) => [
        one.name,
        one.state,
        one.version ?? '',
        String(one.disks.filter(({ bitmap }) => bitmap !== 'skipped').length),
        placeOf(one),
      ])
      print(cli, found, () => table(['VM', 'STATE', 'QEMU', 'DISKS', 'MONITOR'], rows))
    })
  vm.command('show <name>')
    .description('one of them, and what can be done with each of its disks')
    .action(async (name: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      print(cli, await cli.api.call('showVm', { vm: name }, {}), describe)
    })
  vm.command('remove <name>')
    .description('forget it, and remove the bitmaps that Varve has in it. Its backups stay')
    .action(async (name: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      const { left } = await cli.api.call('removeVm', { vm: name }, {})
      if (left !== undefined) warn(left)
      print(cli, { left }, () => `${name} removed; its backups stay`)
    })
}

const LIBVIRT_URI = 'qemu:///system'

interface AddOptions {
  readonly qmp?: string
  readonly agent?: string
  readonly libvirt?: string
  readonly connect?: string
  readonly freeze?: true
  readonly freezeLimit?: number
}

async function add(name: string, options: AddOptions, command: Command): Promise<void> {
  checkAdd(options)
  const { qmp, agent, libvirt: domain = '', connect = LIBVIRT_URI, freeze, freezeLimit } = options
  const cli = cliOf(command)
  const limit = freezeLimit === undefined ? {} : { freezeMs: Math.ceil(freezeLimit * 1000) }
  const place =
    qmp === undefined
      ? { libvirt: { domain, connect }, ...(freeze && { freezes: true }) }
      : { qmp: path.resolve(qmp), ...(agent === undefined ? {} : { agent: path.resolve(agent) }) }
  print(cli, await cli.api.call('addVm', {}, { name, ...place, ...limit }), describe)
}

/** Kind 'invalid-argument' for options that do not go together. */
function checkAdd({ qmp, agent, libvirt, connect, freeze, freezeLimit }: AddOptions): void {
  const refuse = (isWrong: boolean, why: string): void => {
    if (isWrong) throw new BlockError('invalid-argument', why)
  }
  refuse((qmp === undefined) === (libvirt === undefined), 'say where the machine is: --qmp SOCKET or --libvirt DOMAIN')
  refuse(qmp === undefined && agent !== undefined, '--agent goes with --qmp; a machine of libvirt’s takes --freeze')
  refuse(libvirt === undefined && connect !== undefined, '--connect goes with --libvirt')
  refuse(libvirt === undefined && freeze !== undefined, '--freeze goes with --libvirt, --agent SOCKET with --qmp')
  const freezes = agent !== undefined || freeze !== undefined
  refuse(freezeLimit !== undefined && !freezes, '--freeze-limit goes with --agent or --freeze')
}

/** Where it is reached. */
function placeOf({ qmp, libvirt }: VmReply): string {
  return libvirt === undefined ? (qmp ?? '') : `${libvirt.domain} of ${libvirt.connect}`
}

function describe(vm: VmReply): string {
  const { name, agent, state, error, version, disks, removed } = vm
  const head = state === 'away' ? `${name}: away: ${error}` : `${name}: QEMU ${version} at ${placeOf(vm)}`
  return [
    head,
    ...(agent === undefined ? [] : [`its guest is frozen for a backup by its agent at ${agent}`]),
    ...disks.map(describeDisk),
    ...(removed.length === 0 ? [] : [`an earlier backup had left ${removed.join(', ')}: removed`]),
  ].join('\n')
}

const MEANINGS: Readonly<Record<VmReply['disks'][number]['bitmap'], string>> = {
  persistent: 'incremental, over restarts of QEMU',
  transient: 'incremental as long as QEMU runs',
  compared: 'a full by comparison each time',
  skipped: 'not backed up',
}

function describeDisk({ name, size, format, file, bitmap, reason }: VmReply['disks'][number]): string {
  const what = format === '' ? '' : ` ${format}, ${formatSize(size)}, ${file}:`
  return `  ${name}:${what} ${MEANINGS[bitmap]}${reason === undefined ? '' : ` (${reason})`}`
}
