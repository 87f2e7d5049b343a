// varve disk: create, add, list, show, resize, release, remove; blockdev is in its own file.

import path from 'node:path'
import { type Command, Option } from 'commander'
import type { DiskReply } from '../api/schema.ts'
import { formatSize } from '../base/size.ts'
import { type Format, FORMATS } from '../chain/open.ts'
import type { Durability } from '../dirtylog/dirty-log.ts'
import type { CacheMode } from '../host/cache-mode.ts'
import { addBlockdevCommand } from './blockdev.ts'
import { cacheOption, durabilityOption, print, sizeArgument, table } from './context.ts'
import { cliOf } from './daemon-context.ts'

interface DiskOptions {
  readonly format: Format
  readonly cache: CacheMode
  readonly durability?: Durability
}

const formatOption = (): Option =>
  new Option('-f, --format <format>', 'format of the image; never probed, since a guest could write a header')
    .choices(FORMATS)
    .makeOptionMandatory()

export function addDiskCommands(program: Command): void {
  const disk = program.command('disk').description('disks that guests attach over NBD')
  disk
    .command('create <name> <image>')
    .description('make an image and serve it as a disk')
    .addOption(formatOption())
    .requiredOption('--size <size>', 'size, such as 10G', sizeArgument)
    .addOption(cacheOption())
    .addOption(durabilityOption('what the bitmaps of its backups outlive; host unless told'))
    .action((name: string, image: string, options: DiskOptions & { size: number }, command: Command) =>
      add(command, { name, image: path.resolve(image), ...options }),
    )
  disk
    .command('add <name> <image>')
    .description('serve an image as a disk; prints the URI for QEMU’s nbd driver')
    .addOption(formatOption())
    .addOption(cacheOption())
    .addOption(durabilityOption('what the bitmaps of its backups outlive; host unless told'))
    .action((name: string, image: string, options: DiskOptions, command: Command) =>
      add(command, { name, image: path.resolve(image), ...options }),
    )
  addViews(disk)
  addBlockdevCommand(disk)
  addChanges(disk)
}

function addViews(disk: Command): void {
  disk
    .command('list')
    .description('all disks')
    .action(async (_options: unknown, command: Command) => {
      const cli = cliOf(command)
      const disks = await cli.api.call('listDisks', {}, {})
      print(cli, disks, () =>
        table(
          ['NAME', 'STATE', 'SIZE', 'LAYERS', 'URI'],
          disks.map((row) => [
            row.name,
            row.held === undefined ? row.state : 'held',
            formatSize(row.size),
            String(row.layers.length),
            row.uri ?? row.error ?? row.migration ?? '',
          ]),
        ),
      )
    })
  disk
    .command('show <name>')
    .description('one disk with its layers and bitmaps')
    .action(async (name: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      print(cli, await cli.api.call('showDisk', { disk: name }, {}), describeDisk)
    })
}

function addChanges(disk: Command): void {
  disk
    .command('resize <name> <size>')
    .description(
      'make a disk larger while its guest runs; the guest’s NBD client sees it when it connects the next time',
    )
    .action(async (name: string, size: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      const resized = await cli.api.call('resizeDisk', { disk: name }, { size: sizeArgument(size) })
      print(cli, resized, () => `${name}: ${formatSize(resized.size)}`)
    })
  disk
    .command('release <name>')
    .description('serve a disk on TCP again that is held since the host stopped uncleanly')
    .action(async (name: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      await cli.api.call('releaseDisk', { disk: name }, {})
      print(cli, {}, () => `${name} is served on TCP again`)
    })
  disk
    .command('remove <name>')
    .description('stop serving a disk and forget it; its images stay')
    .action(async (name: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      await cli.api.call('removeDisk', { disk: name }, {})
      print(cli, {}, () => `${name} removed; its images stay`)
    })
}

async function add(
  command: Command,
  body: DiskOptions & { name: string; image: string; size?: number },
): Promise<void> {
  const cli = cliOf(command)
  const added = await cli.api.call('addDisk', {}, body)
  if (added.note !== undefined) process.stderr.write(`varve: ${added.note}\n`)
  print(cli, added, (disk) => disk.uri ?? '')
}

function restoringLines({ restoring }: DiskReply): string[] {
  if (restoring === undefined) return []
  const { repository, backup, disk, away } = restoring
  const where = `restoring: from ${repository}, ${backup}:${disk}`
  return [away === undefined ? where : `${where}, which is away: ${away}`]
}

function describeDisk(disk: DiskReply): string {
  const layers = disk.layers.toReversed().map((layer, index) => {
    const role = index === 0 ? 'active' : (layer.snapshot?.name ?? 'layer')
    const owner = layer.of === undefined ? '' : `, of disk ${layer.of}`
    return `  ${role.padEnd(12)} ${layer.format.padEnd(6)} ${layer.path}${owner}`
  })
  const bitmaps = disk.bitmaps.map(
    (bitmap) =>
      `  ${bitmap.name}: ${bitmap.state}, ${bitmap.recording ? 'recording' : 'not recording'}, ${formatSize(bitmap.dirtyBytes)} dirty${bitmap.distrust === undefined ? '' : `; not trusted: ${bitmap.distrust}`}`,
  )
  return [
    `${disk.name}: ${disk.state}${disk.error === undefined ? '' : `: ${disk.error}`}, ${formatSize(disk.size)}`,
    ...(disk.uri === undefined ? [] : [disk.uri]),
    ...(disk.migration === undefined ? [] : [`migration: ${disk.migration}`]),
    ...restoringLines(disk),
    ...(disk.held === undefined ? [] : [`held: ${disk.held}`]),
    `cache: ${disk.cache}`,
    'layers, from the active one to the base:',
    ...layers,
    ...(bitmaps.length === 0 ? [] : ['bitmaps:', ...bitmaps]),
  ].join('\n')
}
