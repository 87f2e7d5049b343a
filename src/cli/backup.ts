// varve repo, backup, backups, verify and restore. Only `backup` needs the daemon: what is in a repository can be listed,
// verified and restored by anybody who can read it.

import path from 'node:path'
import { type Command, Option } from 'commander'
import { formatSize } from '../base/size.ts'
import { BlockError } from '../block/error.ts'
import { type Format, FORMATS } from '../chain/open.ts'
import { initRepositoryAt, openRepositoryAt } from '../daemon/repositories.ts'
import { cliOf, followJob, Progress, print, sizeArgument, table } from './context.ts'
import { restoreToImage } from './restore-image.ts'

const repoOption = (): Option => new Option('--repo <folder>', 'the repository').makeOptionMandatory()

export function addBackupCommands(program: Command): void {
  const repo = program.command('repo').description('backup repositories')
  repo
    .command('init <folder>')
    .description('make a repository in an empty or new folder')
    .action(async (folder: string, _options: unknown, command: Command) => {
      const repository = await initRepositoryAt(folder)
      print(cliOf(command), { id: repository.id, location: path.resolve(folder) }, ({ id }) => `repository ${id}`)
    })
  repo.command('list <folder>').description('the backups in it, newest last').action(listBackups)
  program
    .command('backups')
    .description('the backups in a repository, newest last')
    .addOption(repoOption())
    .action((options: { repo: string }, command: Command) => listBackups(options.repo, options, command))
  program
    .command('backup <disk...>')
    .description('back up disks at one moment, incrementally whenever it can be')
    .addOption(repoOption())
    .option('--full', 'copy all that is allocated, whatever changed')
    .option('--speed <rate>', 'bytes per second', sizeArgument, 0)
    .option('--no-wait', 'return as soon as the moment is taken')
    .action(backup)
  program
    .command('verify <backup>')
    .description('read and check every byte of a backup')
    .addOption(repoOption())
    .action(verify)
  program
    .command('restore <backup>')
    .description('restore a disk of a backup to a new image')
    .addOption(repoOption())
    .requiredOption('--to <image>', 'the image to make')
    .addOption(new Option('-f, --format <format>', 'its format').choices(FORMATS).default('raw'))
    .option('--disk <name>', 'which disk, when the backup has several')
    .action(restore)
}

async function listBackups(folder: string, _options: unknown, command: Command): Promise<void> {
  const cli = cliOf(command)
  const backups = await (await openRepositoryAt(folder)).backups()
  print(cli, backups, () =>
    table(
      ['BACKUP', 'MOMENT', 'KIND', 'DISKS', 'SIZE', 'STORED'],
      backups.map((row) => [
        row.id,
        new Date(row.moment).toISOString(),
        row.kind,
        row.disks.map((disk) => disk.name).join(' '),
        formatSize(row.disks.reduce((sum, disk) => sum + disk.size, 0)),
        formatSize(row.storedBytes),
      ]),
    ),
  )
}

interface BackupOptions {
  readonly repo: string
  readonly full?: boolean
  readonly speed: number
  readonly wait: boolean
}

interface DiskKind {
  readonly name: string
  readonly kind: string
  readonly reason: string
}

async function backup(disks: string[], options: BackupOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const job = await cli.api.call(
    'backup',
    {},
    { disks, repository: path.resolve(options.repo), full: options.full === true, speed: options.speed },
  )
  const last = options.wait ? await followJob(cli, job) : job
  print(cli, last, ({ details }) => {
    const kinds = (details['disks'] as DiskKind[]).map((disk) => `${disk.name}: ${disk.kind} (${disk.reason})`)
    const figures = options.wait
      ? [`read ${formatSize(Number(details['readBytes']))}, stored ${formatSize(Number(details['storedBytes']))}`]
      : []
    return [String(details['backup']), ...kinds, ...figures].join('\n')
  })
}

async function verify(id: string, options: { repo: string }, command: Command): Promise<void> {
  const cli = cliOf(command)
  const progress = new Progress('verify')
  const repository = await openRepositoryAt(options.repo)
  const report = await repository.verify(id, (done, total) => progress.update(done, total))
  progress.end()
  print(cli, report, () => (report.damaged.length === 0 ? `${id}: whole` : `${id}: damaged`))
  if (report.damaged.length === 0) return
  throw new BlockError(
    'corrupt',
    `backup ${id} is damaged in ${report.damaged.length} places: ${String(report.damaged[0]?.message)}`,
  )
}

interface RestoreOptions {
  readonly repo: string
  readonly to: string
  readonly format: Format
  readonly disk?: string
}

async function restore(id: string, options: RestoreOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const reader = await (await openRepositoryAt(options.repo)).openBackup(id)
  try {
    const names = reader.disks.map((disk) => disk.name)
    const wanted = options.disk ?? (names.length === 1 ? names[0] : undefined)
    if (wanted === undefined)
      throw new BlockError('invalid-argument', `${id} has the disks ${names.join(', ')}: say --disk NAME`)
    const disk = reader.disks.find((other) => other.name === wanted)
    if (disk === undefined) throw new BlockError('not-found', `${id} has no disk ${wanted}; it has ${names.join(', ')}`)
    const progress = new Progress('restore')
    const bytes = await restoreToImage(disk.device, path.resolve(options.to), options.format, (done, total) =>
      progress.update(done, total),
    )
    progress.end()
    print(cli, { image: path.resolve(options.to), size: disk.size, copied: bytes }, (result) => result.image)
  } finally {
    await reader.close()
  }
}
