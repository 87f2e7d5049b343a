// varve image resize: makes the disk of an image larger or smaller.

import { type Command, Option } from 'commander'
import { formatSize } from '../../base/size.ts'
import { realHost } from '../../host/real.ts'
import { PREALLOCATIONS, type Preallocation } from '../../image/create-options.ts'
import { sizeArgument } from '../context.ts'
import {
  allowOption,
  formatOption,
  type ImageOptions,
  outputOption,
  printResult,
  quietOption,
  whatToOpen,
} from './options.ts'

interface ResizeOptions extends ImageOptions {
  readonly shrink?: boolean
  readonly preallocation?: Preallocation
  readonly quiet?: boolean
}

export function addResizeCommand(image: Command): void {
  image
    .command('resize <image> <size>')
    .description('make the disk larger or smaller: 10G, +1G, -1G')
    // A size such as -1G looks like an option; what is none is refused as a size.
    .allowUnknownOption()
    .addOption(formatOption())
    .option('--shrink', 'lose what is past the new end')
    .addOption(
      new Option('--preallocation <how>', 'set space aside for what is added').choices(PREALLOCATIONS).default('off'),
    )
    .addOption(allowOption())
    .addOption(quietOption())
    .addOption(outputOption())
    .action(resizeCommand)
}

async function resizeCommand(path: string, sizeText: string, options: ResizeOptions, command: Command): Promise<void> {
  const { resizeImage } = await import('../../image/resize.ts')
  const { shrink = false, preallocation = 'off' } = options
  const sign = /^[+-](?=\d)/.exec(sizeText)?.[0]
  const bytes = sizeArgument(sign === undefined ? sizeText : sizeText.slice(1))
  const change =
    sign === undefined
      ? ({ kind: 'to', bytes } as const)
      : ({ kind: 'by', bytes: sign === '-' ? -bytes : bytes } as const)
  const { from, to } = await resizeImage({
    host: realHost,
    path,
    ...whatToOpen(options),
    change,
    shrink,
    preallocation,
  })
  if (options.quiet === true) return
  const result = { filename: path, 'old-virtual-size': from, 'virtual-size': to }
  printResult(command, result, () => `resized ${path} from ${formatSize(from)} to ${formatSize(to)}`)
}
