// varve repo, backup, backups, verify and restore. Only `backup` needs the daemon: what is in a repository can be listed,
// verified and restored by anybody who can read it.

import path from 'node:path'
import { type Command, Option } from 'commander'
import { formatSize } from '../base/size.ts'
import { BlockError } from '../block/error.ts'
import { type Format, FORMATS } from '../chain/open.ts'
import { absoluteLocation, initRepositoryAt, openRepositoryAt } from '../shard/repositories.ts'
import type { BackupReader, Repository } from '../repository/repository.ts'
import { print, table } from './context.ts'
import { Progress } from './progress.ts'
import { cliOf, followJob } from './daemon-context.ts'
import { restoreToImage } from './restore-image.ts'
import { addTermOptions, type TermOptions, termsOf } from './terms.ts'

const repoOption = (): Option => new Option('--repo <folder>', 'the repository').makeOptionMandatory()

export function addBackupCommands(program: Command): void {
  const repo = program.command('repo').description('backup repositories')
  repo
    .command('init <folder>')
    .description('make a repository in an empty or new folder')
    .action(async (folder: string, _options: unknown, command: Command) => {
      const repository = await initRepositoryAt(folder)
      await repository.close()
      print(cliOf(command), { id: repository.id, location: absoluteLocation(folder) }, ({ id }) => `repository ${id}`)
    })
  repo.command('list <folder>').description('the backups in it, newest last').action(listBackups)
  program
    .command('backups')
    .description('the backups in a repository, newest last')
    .addOption(repoOption())
    .action((options: { repo: string }, command: Command) => listBackups(options.repo, options, command))
  const command = program
    .command('backup <disk...>')
    .description('back up disks at one moment, incrementally whenever it can be')
    .addOption(repoOption())
    .option('--full', 'copy all that is allocated, whatever changed')
  addTermOptions(command, 'backup').option('--no-wait', 'return as soon as the moment is taken').action(backup)
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
  const { backups, damaged } = await withRepository(folder, (repository) => repository.list())
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
  const [first] = damaged
  if (first !== undefined) throw new BlockError('corrupt', `${damaged.length} more cannot be read: ${first.reason}`)
}

interface BackupOptions extends TermOptions {
  readonly repo: string
  readonly full?: boolean
  readonly wait: boolean
}

interface DiskKind {
  readonly name: string
  readonly kind: string
  readonly reason: string
}

async function backup(disks: string[], options: BackupOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const repository = absoluteLocation(options.repo)
  const wish = { disks, repository, full: options.full === true, ...termsOf(options) }
  const last = await followJob(cli, cli.api.call('backup', {}, wish), options)
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
  const report = await withRepository(options.repo, (repository) =>
    repository.verify(id, (done, total) => progress.update(done, total)),
  )
  progress.end()
  const findings = [
    ...report.ranges.map((range) => `${range.disk}: ${range.length} bytes at ${range.offset}: ${range.reason}`),
    ...report.objects.map((object) => `${object.key}: ${object.reason}`),
  ]
  print(cli, report, () => [`${id}: ${report.isGood ? 'whole' : 'damaged'}`, ...findings].join('\n'))
  if (report.isGood) return
  throw new BlockError('corrupt', `backup ${id} is damaged: ${findings[0] ?? 'see the report'}`)
}

/** Opens a repository for one piece of work and closes it. */
async function withRepository<T>(folder: string, work: (repository: Repository) => Promise<T>): Promise<T> {
  const repository = await openRepositoryAt(folder)
  try {
    return await work(repository)
  } finally {
    await repository.close()
  }
}

interface RestoreOptions {
  readonly repo: string
  readonly to: string
  readonly format: Format
  readonly disk?: string
}

async function restore(id: string, options: RestoreOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const image = path.resolve(options.to)
  const result = await withRepository(options.repo, async (repository) => {
    const reader = await repository.openBackup(id)
    const progress = new Progress('restore')
    try {
      const disk = chooseDisk(reader, options.disk)
      const report = (done: number, total: number): void => progress.update(done, total)
      return { image, size: disk.size, copied: await restoreToImage(disk.device, image, options.format, report) }
    } finally {
      progress.end()
      await reader.close()
    }
  })
  print(cli, result, () => result.image)
}

function chooseDisk(reader: BackupReader, wanted: string | undefined): BackupReader['disks'][number] {
  const names = reader.disks.map((disk) => disk.name)
  const name = wanted ?? (names.length === 1 ? names[0] : undefined)
  if (name === undefined) {
    throw new BlockError('invalid-argument', `${reader.info.id} has the disks ${names.join(', ')}: say --disk NAME`)
  }
  const disk = reader.disks.find((other) => other.name === name)
  if (disk !== undefined) return disk
  throw new BlockError('not-found', `${reader.info.id} has no disk ${name}; it has ${names.join(', ')}`)
}
