// `varve restore`: brings a disk of a backup back, to a new image, without a daemon.

import path from 'node:path'
import { type Command, Option } from 'commander'
import { IMAGE_LOST_RANGES_MAX } from '../base/limits.ts'
import type { BlockDevice } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { type Format, FORMATS } from '../chain/open.ts'
import { SalvageFilter } from '../filter/salvage.ts'
import { chooseDisk } from '../repository/choose-disk.ts'
import { parseBackupName } from './backup-name.ts'
import { print } from './context.ts'
import { cliOf } from './daemon-context.ts'
import { Progress } from './progress.ts'
import { repoOption, type RepositoryFlags, withKeys, withRepository } from './repository.ts'
import { restoreToImage } from './restore-image.ts'

export function addRestoreCommand(program: Command): void {
  withKeys(
    program
      .command('restore <backup[:disk]>')
      .description('restore a disk of a backup to a new image')
      .addOption(repoOption()),
  )
    .requiredOption('--to <image>', 'the image to make')
    .addOption(new Option('-f, --format <format>', 'its format').choices(FORMATS).default('raw'))
    .option('--disk <name>', 'which disk, when the backup has several')
    .option('--salvage', 'go on over what is damaged, as zeros; ends with status 5 when there was any')
    .action(restore)
}

interface RestoreOptions extends RepositoryFlags {
  readonly repo: string
  readonly to: string
  readonly format: Format
  readonly disk?: string
  readonly salvage?: boolean
}

async function restore(named: string, options: RestoreOptions, command: Command): Promise<void> {
  const { backup: id, disk: wanted = options.disk } = parseBackupName(named)
  const cli = cliOf(command)
  const image = path.resolve(options.to)
  const lost = new LostRanges()
  const result = await withRepository(options.repo, options, async (repository) => {
    const reader = await repository.openBackup(id)
    const progress = new Progress('restore')
    try {
      const disk = chooseDisk(reader, wanted)
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
