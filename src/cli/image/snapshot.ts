// varve image snapshot: the internal snapshots of a qcow2 image that nobody uses. Live snapshots of a disk are `varve snapshot`.

import type { Command } from 'commander'
import { BlockError } from '../../block/error.ts'
import { realHost } from '../../host/real.ts'
import type { SnapshotChange } from '../../image/snapshot.ts'
import { snapshotTable } from './info.ts'
import {
  formatOption,
  type ImageOptions,
  outputOption,
  printResult,
  progressOption,
  quietOption,
  shareOption,
  whatToOpen,
  withProgress,
} from './options.ts'

interface SnapshotOptions extends ImageOptions {
  readonly list?: boolean
  readonly create?: string
  readonly apply?: string
  readonly delete?: string
  readonly progress?: boolean
  readonly quiet?: boolean
}

const DONE: Readonly<Record<SnapshotChange['kind'], string>> = {
  create: 'made snapshot',
  apply: 'the disk is again as in snapshot',
  delete: 'deleted snapshot',
}

export function addSnapshotCommand(image: Command): void {
  image
    .command('snapshot <image>')
    .description('internal snapshots of a qcow2 image: list them (unless told), or make, apply or delete one')
    .option('-l, --list', 'list them')
    .option('-c, --create <name>', 'keep the disk as it is now')
    .option('-a, --apply <snapshot>', 'make the disk what it was then; what it holds now is lost')
    .option('-d, --delete <snapshot>', 'delete one')
    .addOption(formatOption())
    .addOption(shareOption())
    .addOption(progressOption())
    .addOption(quietOption())
    .addOption(outputOption())
    .action(snapshotCommand)
}

async function snapshotCommand(path: string, options: SnapshotOptions, command: Command): Promise<void> {
  const { changeSnapshots, listSnapshots } = await import('../../image/snapshot.ts')
  const wanted = { host: realHost, path, ...whatToOpen(options) }
  const changes = (['create', 'apply', 'delete'] as const).flatMap((kind) => {
    const snapshot = options[kind]
    return snapshot === undefined ? [] : [{ kind, snapshot }]
  })
  const [change] = changes
  if (changes.length + (options.list === true ? 1 : 0) > 1)
    throw new BlockError('invalid-argument', 'give one of -l, -c, -a and -d, not several')
  if (change === undefined) {
    printResult(command, await listSnapshots(wanted), snapshotTable)
    return
  }
  await withProgress(change.kind, options.progress, (progress) => changeSnapshots(wanted, change, progress))
  if (options.quiet !== true) printResult(command, change, ({ kind, snapshot }) => `${DONE[kind]} ${snapshot}`)
}
