// varve vm snapshot, commit, stream and mirror: what QEMU itself does with the disks of a running machine. All but the snapshot, which is done at once, are
// jobs of the daemon's (engine/vm-jobs.ts). QEMU knows of the layers; Varve keeps no record of them, and deletes no image.

import fs from 'node:fs'
import path from 'node:path'
import { type Command, Option } from 'commander'
import { BlockError } from '../block/error.ts'
import { type Format, FORMATS } from '../chain/open.ts'
import { realHost } from '../host/real.ts'
import { isInUse } from '../source/qemu/disk-in-use.ts'
import { takeSnapshot } from '../source/qemu/own-jobs.ts'
import { print, sizeArgument } from './context.ts'
import { cliOf, followJob } from './daemon-context.ts'
import { refuseExisting, withVm } from './vm-contact.ts'

interface JobOptions {
  readonly speed: number
  /** False with --no-wait. */
  readonly wait: boolean
}

export function addVmJobCommands(vm: Command): void {
  const speed = (): Option =>
    new Option('--speed <rate>', 'bytes per second').default(0, 'no limit').argParser(sizeArgument)
  vm.command('snapshot <vm> <name>')
    .description(
      'put overlays over all disks of a running machine at one moment, each beside its image, as VM-DISK.NAME.qcow2',
    )
    .action(snapshot)
  vm.command('commit <vm> <disk>')
    .description('have QEMU merge the overlays of a disk down into the lowest image, while its guest writes')
    .addOption(speed())
    .option('--no-wait', 'return at once')
    .action((name: string, disk: string, options: JobOptions, command: Command) =>
      merge('vm-commit', name, disk, options, command),
    )
  vm.command('stream <vm> <disk>')
    .description('have QEMU pull all layers of a disk up into the uppermost one, while its guest writes')
    .addOption(speed())
    .option('--no-wait', 'return at once')
    .action((name: string, disk: string, options: JobOptions, command: Command) =>
      merge('vm-stream', name, disk, options, command),
    )
  vm.command('mirror <vm> <disk> <image>')
    .description('have QEMU copy a disk into a new image, of the moment at which the copy is done')
    .addOption(new Option('-f, --format <format>', 'of the image').choices(FORMATS).default('qcow2'))
    .addOption(speed())
    .option('--no-wait', 'return at once')
    .action(mirror)
}

async function snapshot(vm: string, name: string, _options: unknown, command: Command): Promise<void> {
  if (!/^[A-Za-z0-9][A-Za-z0-9._-]*$/.test(name))
    throw new BlockError('invalid-argument', `${JSON.stringify(name)}: name it by letters, digits, '.', '_' and '-'`)
  const { createImage } = await import('../image/create.ts')
  const cli = cliOf(command)
  const made = await withVm(cli, vm, async (client, disks) => {
    const overlays: { disk: string; under: string; file: string }[] = []
    try {
      for (const disk of disks.filter(isInUse)) {
        if (!path.isAbsolute(disk.file) || !fs.existsSync(disk.file))
          throw new BlockError('unsupported', `disk ${disk.name} of ${vm} is no file of this host: ${disk.file}`)
        const file = path.join(path.dirname(disk.file), `${vm}-${disk.name}.${name}.qcow2`)
        refuseExisting(file)
        const settings = {
          size: disk.size,
          backingName: disk.file,
          backingFormat: disk.format === 'raw' ? 'raw' : 'qcow2',
        } as const
        await createImage({ host: realHost, path: file, format: 'qcow2', settings, unsafe: true })
        overlays.push({ disk: disk.name, under: disk.top, file })
      }
      await takeSnapshot(client, overlays)
      return overlays
    } catch (error) {
      for (const { file } of overlays) fs.rmSync(file)
      throw error
    }
  })
  const shown = made.map(({ disk, file }) => ({ disk, image: file }))
  print(cli, shown, () => shown.map(({ disk, image }) => `${disk}: writes go to ${image}`).join('\n'))
}

async function merge(
  kind: 'vm-commit' | 'vm-stream',
  vm: string,
  disk: string,
  options: JobOptions,
  command: Command,
): Promise<void> {
  const cli = cliOf(command)
  const asked = cli.api.call('vmJob', { vm }, { kind, disk, speed: options.speed })
  const last = await followJob(cli, asked, options)
  const { image } = last.details
  const next = `all of it is in ${String(image)}; give QEMU that at its next start`
  print(cli, options.wait ? { disk, image, job: last.id } : last, () =>
    options.wait ? `${disk}: ${next}` : `${last.id}: ${last.state}`,
  )
}

async function mirror(
  vm: string,
  disk: string,
  image: string,
  options: JobOptions & { readonly format: Format },
  command: Command,
): Promise<void> {
  const cli = cliOf(command)
  const { format, speed } = options
  const file = path.resolve(image)
  const asked = cli.api.call('vmJob', { vm }, { kind: 'vm-mirror', disk, speed, target: { file, format } })
  const last = await followJob(cli, asked, options)
  print(cli, options.wait ? { image: file, job: last.id } : last, () =>
    options.wait ? `${file} is a copy of ${disk}` : `${last.id}: ${last.state}`,
  )
}
