// varve image commit: merges an overlay that no daemon serves into a backing file. (varve commit does it to a running disk.)

import type { Command } from 'commander'
import { realHost } from '../../host/real.ts'
import {
  allowOption,
  formatOption,
  type ImageOptions,
  outputOption,
  printResult,
  progressOption,
  quietOption,
  whatToOpen,
  withProgress,
} from './options.ts'

interface CommitOptions extends ImageOptions {
  readonly base?: string
  readonly keep?: boolean
  readonly progress?: boolean
  readonly quiet?: boolean
}

export function addCommitCommand(image: Command): void {
  image
    .command('commit <image>')
    .description('merge an overlay into its backing file, then empty it')
    .addOption(formatOption())
    .option('-b, --base <image>', 'merge down to this image of the chain; the overlay then keeps its data')
    .option('-d, --keep', 'leave the data in the overlay too')
    .addOption(allowOption())
    .addOption(progressOption())
    .addOption(quietOption())
    .addOption(outputOption())
    .action(commitCommand)
}

async function commitCommand(path: string, options: CommitOptions, command: Command): Promise<void> {
  const { commitImage } = await import('../../image/commit.ts')
  const { base, keep } = options
  const done = await withProgress('commit', options.progress, (progress) =>
    commitImage({ host: realHost, path, ...whatToOpen(options), base, keep, progress }),
  )
  if (options.quiet === true) return
  printResult(command, { filename: path, base: done.base }, () => `committed ${path} to ${done.base}`)
}
