// varve backup, backups, verify and restore. Only `backup` needs the daemon: what is in a repository can be listed, verified and
// restored by anybody who can read it.

import path from 'node:path'
import { type Command, Option } from 'commander'
import { IMAGE_LOST_RANGES_MAX } from '../base/limits.ts'
import { formatSize } from '../base/size.ts'
import type { BlockDevice } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { type Format, FORMATS } from '../chain/open.ts'
import { SalvageFilter } from '../filter/salvage.ts'
import { absoluteLocation } from '../shard/repositories.ts'
import type { BackupReader, VerifyReport } from '../repository/repository.ts'
import { backupQueue } from './backup-queue.ts'
import { print } from './context.ts'
import { Progress } from './progress.ts'
import { cliOf, followJob } from './daemon-context.ts'
import { listBackups } from './repo.ts'
import { repoOption, type RepositoryFlags, withKeys, withRepository } from './repository.ts'
import { restoreToImage } from './restore-image.ts'
import { addTermOptions, type TermOptions, termsOf } from './terms.ts'
import { compareWith } from './verify-against.ts'

export function addBackupCommands(program: Command): void {
  withKeys(
    program.command('backups').description('the backups in a repository, newest last').addOption(repoOption()),
  ).action((options: RepositoryFlags & { repo: string }, command: Command) =>
    listBackups(options.repo, options, command),
  )
  const command = program
    .command('backup [machines...]')
    .description(
      'back up machines, or disks by themselves, each at one moment, incrementally whenever it can be; several, or all, are queued',
    )
    .addOption(repoOption())
    .option('--full', 'copy all that is allocated, whatever changed')
    .option('--all', 'every machine of the host')
    .option('--with <machines...>', 'others, at the same moment')
    .option('--queue', 'also a single one waits for its window; see varve host')
  addTermOptions(command, 'backup')
    .option('--no-wait', 'return as soon as the moment is taken, or all are queued')
    .action(backup)
  withKeys(
    program.command('verify <backup>').description('read and check every byte of a backup').addOption(repoOption()),
  )
    .option('--against <image>', 'compare a disk of it with an image, or with a disk by its NBD URI')
    .addOption(new Option('-f, --format <format>', 'the format of that image').choices(FORMATS))
    .option('--disk <name>', 'which disk, when the backup has several')
    .action(verify)
  withKeys(
    program
      .command('restore <backup>')
      .description('restore a disk of a backup to a new image')
      .addOption(repoOption()),
  )
    .requiredOption('--to <image>', 'the image to make')
    .addOption(new Option('-f, --format <format>', 'its format').choices(FORMATS).default('raw'))
    .option('--disk <name>', 'which disk, when the backup has several')
    .option('--salvage', 'go on over what is damaged, as zeros; ends with status 5 when there was any')
    .action(restore)
}

interface BackupOptions extends TermOptions {
  readonly repo: string
  readonly full?: boolean
  readonly all?: boolean
  readonly with?: readonly string[]
  readonly queue?: boolean
  readonly wait: boolean
}

interface DiskKind {
  readonly name: string
  readonly kind: string
  readonly reason: string
}

async function backup(machines: string[], options: BackupOptions, command: Command): Promise<void> {
  const { all = false, queue = false, with: others = [], full = false } = options
  if (all === machines.length > 0) throw new BlockError('invalid-argument', 'name machines to back up, or say --all')
  const isQueued = all || queue || machines.length > 1
  if (isQueued && others.length > 0)
    throw new BlockError(
      'invalid-argument',
      '--with is for one machine: those that are queued have moments of their own',
    )
  const cli = cliOf(command)
  const repository = absoluteLocation(options.repo)
  const terms = { repository, full, ...termsOf(options) }
  if (isQueued) return backupQueue(cli, { ...(all ? {} : { machines }), ...terms }, options.wait)
  const wish = { disks: [...machines, ...others], ...terms }
  const last = await followJob(cli, cli.api.call('backup', {}, wish), options)
  print(cli, last, ({ details }) => {
    const kinds = (details['disks'] as DiskKind[]).map((disk) => `${disk.name}: ${disk.kind} (${disk.reason})`)
    const figures = options.wait
      ? [`read ${formatSize(Number(details['readBytes']))}, stored ${formatSize(Number(details['storedBytes']))}`]
      : []
    return [String(details['backup']), ...kinds, ...figures].join('\n')
  })
}

interface VerifyOptions extends RepositoryFlags {
  readonly repo: string
  readonly against?: string
  readonly format?: Format
  readonly disk?: string
}

async function verify(id: string, options: VerifyOptions, command: Command): Promise<void> {
  if (options.against !== undefined) return verifyAgainst(id, options.against, options, command)
  const cli = cliOf(command)
  const progress = new Progress('verify')
  const report = await withRepository(options.repo, options, (repository) =>
    repository.verify(id, (done, total) => progress.update(done, total)),
  )
  progress.end()
  const findings = findingsOf(report)
  print(cli, report, () => [`${id}: ${report.isGood ? 'whole' : 'damaged'}`, ...findings].join('\n'))
  if (report.isGood) return
  throw new BlockError('corrupt', `backup ${id} is damaged: ${findings[0] ?? 'see the report'}`)
}

function findingsOf(report: VerifyReport): string[] {
  return [
    ...report.ranges.map((range) => `${range.disk}: ${range.length} bytes at ${range.offset}: ${range.reason}`),
    ...report.objects.map((object) => `${object.key}: ${object.reason}`),
  ]
}

async function verifyAgainst(id: string, against: string, options: VerifyOptions, command: Command): Promise<void> {
  const progress = new Progress('verify')
  const result = await withRepository(options.repo, options, async (repository) => {
    const reader = await repository.openBackup(id)
    try {
      const disk = chooseDisk(reader, options.disk)
      const report = (done: number, total: number): void => progress.update(done, total)
      const found = await compareWith(disk.device, against, options.format, report)
      return { backup: id, disk: disk.name, against, ...found }
    } finally {
      progress.end()
      await reader.close()
    }
  })
  const ranges = result.ranges.map(({ offset, length }) => `${length} bytes at ${offset} differ`)
  const isSame = result.differentBytes === 0
  print(cliOf(command), result, () =>
    [`${id}, disk ${result.disk}: ${isSame ? 'equal' : 'different'}`, ...ranges].join('\n'),
  )
  if (isSame) return
  throw new BlockError(
    'corrupt',
    `disk ${result.disk} of ${id} differs from ${against} in ${result.differentBytes} bytes`,
  )
}

interface RestoreOptions extends RepositoryFlags {
  readonly repo: string
  readonly to: string
  readonly format: Format
  readonly disk?: string
  readonly salvage?: boolean
}

async function restore(id: string, options: RestoreOptions, command: Command): Promise<void> {
  const cli = cliOf(command)
  const image = path.resolve(options.to)
  const lost = new LostRanges()
  const result = await withRepository(options.repo, options, async (repository) => {
    const reader = await repository.openBackup(id)
    const progress = new Progress('restore')
    try {
      const disk = chooseDisk(reader, options.disk)
      const source: BlockDevice =
        options.salvage === true ? new SalvageFilter(disk.device, (...range) => lost.add(...range)) : disk.device
      const report = (done: number, total: number): void => progress.update(done, total)
      return { image, size: disk.size, copied: await restoreToImage(source, image, options.format, report) }
    } finally {
      progress.end()
      await reader.close()
    }
  })
  const lines = lost.ranges.map(({ offset, length, reason }) => `lost: ${length} bytes at ${offset}: ${reason}`)
  const shown = options.salvage === true ? { ...result, lostBytes: lost.bytes, lost: lost.ranges } : result
  print(cli, shown, () => [result.image, ...lines].join('\n'))
  if (lost.bytes === 0) return
  throw new BlockError('corrupt', `${lost.bytes} bytes of ${id} could not be read, and are zeros in ${image}`)
}

/** Neighbours are one range; so many are listed, and all bytes are counted. */
class LostRanges {
  readonly ranges: { offset: number; length: number; reason: string }[] = []
  bytes = 0

  add(offset: number, length: number, reason: string): void {
    this.bytes += length
    const last = this.ranges.at(-1)
    if (last !== undefined && last.offset + last.length === offset) last.length += length
    else if (this.ranges.length < IMAGE_LOST_RANGES_MAX) this.ranges.push({ offset, length, reason })
  }
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
