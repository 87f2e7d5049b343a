// `varve restore`: brings a disk of a backup back. To a new image, without a daemon; live, as a disk that the daemon serves at once; or onto a
// disk that the daemon has.

import path from 'node:path'
import { type Command, Option } from 'commander'
import type { BodyInput } from '../api/schema.ts'
import { IMAGE_LOST_RANGES_MAX } from '../base/limits.ts'
import { formatSize } from '../base/size.ts'
import type { BlockDevice } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { type Format, FORMATS } from '../chain/open.ts'
import { WHEN_AWAY, type WhenAway } from '../engine/backup-layer.ts'
import { SalvageFilter } from '../filter/salvage.ts'
import { chooseDisk } from '../repository/choose-disk.ts'
import { absoluteLocation } from '../shard/repositories.ts'
import { type BackupName, parseBackupName } from './backup-name.ts'
import { confirm } from './confirm.ts'
import { print } from './context.ts'
import { type Cli, cliOf, followJob } from './daemon-context.ts'
import { Progress } from './progress.ts'
import { repoOption, type RepositoryFlags, withKeys, withRepository } from './repository.ts'
import { restoreToImage } from './restore-image.ts'
import { addTermOptions, type TermOptions, termsOf } from './terms.ts'

interface RestoreOptions extends RepositoryFlags, TermOptions {
  readonly repo: string
  readonly to?: string
  readonly format?: Format
  readonly disk?: string
  readonly salvage?: boolean
  readonly live?: string
  readonly whenAway?: WhenAway
  readonly onto?: string
  readonly keep?: string
  readonly discard?: boolean
  readonly yes?: boolean
  readonly wait: boolean
}

export function addRestoreCommand(program: Command): void {
  const command = withKeys(
    program
      .command('restore <backup[:disk]>')
      .description('restore a disk of a backup: to a new image, live as a new disk at once, or onto a disk')
      .addOption(repoOption()),
  )
    .option('--to <image>', 'the image to make')
    .addOption(new Option('-f, --format <format>', 'its format; raw unless told, and qcow2 live').choices(FORMATS))
    .option('--disk <name>', 'which disk, when the backup has several')
    .option('--salvage', 'go on over what is damaged, as zeros; ends with status 5 when there was any')
    .option('--live <name>', 'make this disk over the backup and serve it at once, while the rest comes behind')
    .addOption(
      new Option('--when-away <what>', 'live: guests wait for a repository that is away, or are told').choices(
        WHEN_AWAY,
      ),
    )
    .option('--onto <disk>', 'make this disk what it was: only what differs is written, and it is not served meanwhile')
    .option('--keep <snapshot>', 'onto: the snapshot that the present state becomes; before-BACKUP unless told')
    .option('--discard', 'onto: the present state is lost')
    .option('--yes', 'onto: do not ask')
  addTermOptions(command, 'restore').option('--no-wait', 'live and onto: return as soon as it is begun').action(restore)
}

async function restore(named: string, options: RestoreOptions, command: Command): Promise<void> {
  const { backup, disk = options.disk, partition } = parseBackupName(named)
  const wanted = { backup, disk, partition }
  if (options.live !== undefined) return restoreLive(cliOf(command), wanted, options.live, options)
  if (options.onto !== undefined) return restoreOnto(cliOf(command), wanted, options.onto, options)
  if (options.to === undefined) {
    const message = 'say where it is restored: --to IMAGE, --live NAME for a new disk at once, or --onto DISK'
    throw new BlockError('invalid-argument', message)
  }
  await restoreImage(cliOf(command), wanted, path.resolve(options.to), options)
}

async function restoreImage(
  cli: Cli,
  { backup: id, disk: wanted }: BackupName,
  image: string,
  options: RestoreOptions,
): Promise<void> {
  const lost = new LostRanges()
  const result = await withRepository(options.repo, options, async (repository) => {
    const reader = await repository.openBackup(id)
    const progress = new Progress('restore')
    try {
      const disk = chooseDisk(reader, wanted)
      const source: BlockDevice =
        options.salvage === true ? new SalvageFilter(disk.device, (...range) => lost.add(...range)) : disk.device
      const report = (done: number, total: number): void => progress.update(done, total)
      return { image, size: disk.size, copied: await restoreToImage(source, image, options.format ?? 'raw', report) }
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

/** The daemon opens the repository itself, with the passphrase or key that it was started with. */
async function restoreLive(cli: Cli, wanted: BackupName, name: string, options: RestoreOptions): Promise<void> {
  const { to, format, salvage, whenAway, passphraseFile, keyFile } = options
  const refuse = (message: string): BlockError => new BlockError('invalid-argument', message)
  if (format === 'raw') throw refuse('live, a disk is restored into a qcow2 image: a raw one cannot say what it lacks')
  if (salvage === true)
    throw refuse('what is damaged is left out of a new image only: --salvage needs --to, without --live')
  if (passphraseFile !== undefined || keyFile !== undefined)
    throw refuse('live, the daemon opens the repository: give VARVE_PASSPHRASE_FILE or VARVE_KEY_FILE to varve serve')
  const wish: BodyInput<'restore'> = {
    name,
    repository: absoluteLocation(options.repo),
    backup: wanted.backup,
    ...(wanted.disk === undefined ? {} : { disk: wanted.disk }),
    ...(to === undefined ? {} : { image: path.resolve(to) }),
    ...(whenAway === undefined ? {} : { whenAway }),
    ...termsOf(options),
  }
  const begun = cli.api.call('restore', {}, wish)
  await begun
  const { uri = '' } = await cli.api.call('showDisk', { disk: name }, {})
  // Whoever waits for the disk need not wait for the rest of it.
  if (!cli.json) process.stdout.write(`${uri}\n`)
  const job = await followJob(cli, begun, options)
  if (cli.json) print(cli, { uri, job }, () => '')
}

/** Whoever uses the disk loses it first, which is asked about. */
async function restoreOnto(cli: Cli, wanted: BackupName, disk: string, options: RestoreOptions): Promise<void> {
  const { discard = false, keep = `before-${wanted.backup}`, yes } = options
  refuseWithOnto(options)
  const present = discard ? 'and what it is now is lost' : `and what it is now becomes the snapshot ${keep}`
  if (yes !== true)
    await confirm(
      cli,
      `disk ${disk} is withdrawn from its guests until it is what it was in ${wanted.backup}, ${present}`,
    )
  const wish: BodyInput<'restoreOnto'> = {
    repository: absoluteLocation(options.repo),
    backup: wanted.backup,
    ...(wanted.disk === undefined ? {} : { disk: wanted.disk }),
    ...(discard ? {} : { keep }),
    ...termsOf(options),
  }
  const job = await followJob(cli, cli.api.call('restoreOnto', { disk }, wish), options)
  print(cli, job, ({ details }) => {
    const figures = [
      `compared ${formatSize(Number(details['comparedBytes']))}`,
      `fetched ${formatSize(Number(details['fetchedBytes']))}`,
      `wrote ${formatSize(Number(details['changedBytes']))}`,
    ]
    return [
      `${disk}: ${(details['reason'] as string | undefined) ?? 'is being restored'}`,
      ...(options.wait ? [figures.join(', ')] : []),
    ].join('\n')
  })
}

function refuseWithOnto({ to, live, salvage, discard, keep, passphraseFile, keyFile }: RestoreOptions): void {
  const refuse = (message: string): BlockError => new BlockError('invalid-argument', message)
  if (to !== undefined || live !== undefined) throw refuse('say one of --to, --live and --onto')
  if (salvage === true)
    throw refuse('what is damaged is left out of a new image only: --salvage needs --to, without --onto')
  if (discard === true && keep !== undefined) throw refuse('say --keep or --discard, not both')
  if (passphraseFile === undefined && keyFile === undefined) return
  throw refuse(
    'onto a disk, the daemon opens the repository: give VARVE_PASSPHRASE_FILE or VARVE_KEY_FILE to varve serve',
  )
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
