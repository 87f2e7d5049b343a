// varve backup, backups and verify. Only `backup` needs the daemon: what is in a repository can be listed and verified by anybody who
// can read it.

import { type Command, Option } from 'commander'
import { BlockError } from '../block/error.ts'
import { type Format, FORMATS } from '../chain/open.ts'
import { absoluteLocation } from '../shard/repositories.ts'
import { chooseDisk } from '../repository/choose-disk.ts'
import type { VerifyReport } from '../repository/repository.ts'
import { parseBackupName } from './backup-name.ts'
import { backupElsewhere, type ElsewhereOptions } from './backup-elsewhere.ts'
import { backupQueue } from './backup-queue.ts'
import { describeBackup } from './backup-report.ts'
import { print, seconds } from './context.ts'
import { Progress } from './progress.ts'
import { cliOf, followJob } from './daemon-context.ts'
import { addPeerOptions } from './peer-options.ts'
import { listBackups } from './repo.ts'
import { repoOption, type RepositoryFlags, withKeys, withRepository } from './repository.ts'
import { addTermOptions, termsOf } from './terms.ts'
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
    .option('--repo <folder>', 'the repository')
    .option('--full', 'copy all that is allocated, whatever changed')
    .option(
      '--prove <percent>',
      'read so much of what did not change, too, and compare it with the last backup',
      percent,
    )
    .option('--since <checkpoint>', 'copy what changed since this checkpoint: a differential')
    .option('--checkpoint <name>', 'make its moment a checkpoint, for later differentials')
    .option('--all', 'every machine of the host')
    .option('--with <machines...>', 'others, at the same moment')
    .option('--queue', 'also a single one waits for its window; see varve host')
    .option(
      '--to-file <image>',
      'one disk into a new image, whose backing file is the one made before it in that folder',
    )
    .addOption(new Option('-f, --format <format>', 'of that image; qcow2 unless told').choices(FORMATS))
    .option('--from <uri>', 'of a daemon elsewhere; this command reads its disks and writes here')
    .option(
      '--lease <seconds>',
      'how long that daemon waits for this command when it is silent; 600 unless told',
      seconds,
    )
  addPeerOptions(withKeys(command))
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
}

interface BackupOptions extends ElsewhereOptions {
  readonly all?: boolean
  readonly with?: readonly string[]
  readonly queue?: boolean
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
  if (options.from !== undefined || options.toFile !== undefined) {
    if (isQueued)
      throw new BlockError('invalid-argument', 'this command makes one backup: --with names more disks for it')
    return backupElsewhere(cli, [...machines, ...others], options)
  }
  refuseForeign(options)
  if (options.repo === undefined) throw new BlockError('invalid-argument', 'say where to: --repo or --to-file')
  const repository = absoluteLocation(options.repo)
  const { prove, since, checkpoint } = options
  const marks = { ...(since === undefined ? {} : { since }), ...(checkpoint === undefined ? {} : { checkpoint }) }
  const terms = { repository, full, ...(prove === undefined ? {} : { prove }), ...marks, ...termsOf(options) }
  if (isQueued) return backupQueue(cli, { ...(all ? {} : { machines }), ...terms }, options.wait)
  const wish = { disks: [...machines, ...others], ...terms }
  const last = await followJob(cli, cli.api.call('backup', {}, wish), options)
  print(cli, last, ({ details }) => describeBackup(details, options.wait))
}

/** What has a meaning only where this command makes the backup. */
function refuseForeign({ passphraseFile, keyFile, lease, format }: BackupOptions): void {
  if (passphraseFile !== undefined || keyFile !== undefined) {
    const message =
      'the daemon opens the repository: tell it by VARVE_PASSPHRASE_FILE or VARVE_KEY_FILE in its environment'
    throw new BlockError('invalid-argument', message)
  }
  if (lease !== undefined) throw new BlockError('invalid-argument', '--lease goes with --from or --to-file')
  if (format !== undefined) throw new BlockError('invalid-argument', '-f is the format of a file: say --to-file')
}

function percent(text: string): number {
  const value = Number(text.replace(/ ?%$/, ''))
  if (text.trim() !== '' && value > 0 && value <= 100) return value
  throw new BlockError('invalid-argument', `${JSON.stringify(text)} is no part of a disk: percent, up to 100`)
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

async function verifyAgainst(named: string, against: string, options: VerifyOptions, command: Command): Promise<void> {
  const { backup: id, disk: wanted = options.disk } = parseBackupName(named)
  const progress = new Progress('verify')
  const result = await withRepository(options.repo, options, async (repository) => {
    const reader = await repository.openBackup(id)
    try {
      const disk = chooseDisk(reader, wanted)
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
