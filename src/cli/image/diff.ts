// varve image diff: which blocks of a disk differ, printed as they are found.

import { type Command, Option } from 'commander'
import { GRANULE_MAX, GRANULE_MIN } from '../../base/limits.ts'
import { isPowerOfTwo } from '../../base/round.ts'
import { parseSize } from '../../base/size.ts'
import { BlockError } from '../../block/error.ts'
import { FORMATS, type Format } from '../../chain/open.ts'
import { realHost } from '../../host/real.ts'
import type { DiffOptions, RangeVisitor } from '../../image/diff.ts'
import type { OpenImageOptions } from '../../image/open-image.ts'
import {
  allowOption,
  formatOption,
  type ImageOptions,
  outputOption,
  progressOption,
  shareOption,
  wantsJson,
  whatToOpen,
  withProgress,
} from './options.ts'

interface DiffFlags extends ImageOptions {
  readonly secondFormat?: Format
  readonly overlay?: boolean
  readonly granularity: number
  readonly progress?: boolean
}

const GRANULARITY = 64 * 1024

export function addDiffCommand(image: Command): void {
  image
    .command('diff <images...>')
    .usage('[options] <image> <image> | --overlay <image>')
    .description('the blocks that differ between two images, or that an overlay holds')
    .addOption(formatOption())
    .addOption(new Option('-F, --second-format <format>', 'format of the second image').choices(FORMATS))
    .option('--overlay', 'of one image: what it holds itself, over its backing file; no data is read')
    .option('-g, --granularity <size>', 'size of a block, a power of two', granularityArgument, GRANULARITY)
    .addOption(allowOption())
    .addOption(shareOption())
    .addOption(progressOption())
    .addOption(outputOption())
    .action(diff)
}

async function diff(images: readonly string[], flags: DiffFlags, command: Command): Promise<void> {
  const [first = '', second = ''] = images
  const wanted = flags.overlay === true ? 1 : 2
  if (images.length !== wanted) {
    const message = wanted === 1 ? 'name one image for --overlay' : 'name two images, or one with --overlay'
    throw new BlockError('invalid-argument', message)
  }
  const output = wantsJson(command) ? new JsonRanges() : new TableRanges()
  const open = { host: realHost, ...whatToOpen(flags) }
  await withProgress('comparing', flags.progress, async (progress) => {
    const options = { granule: flags.granularity, visit: output.visit, progress }
    if (flags.overlay === true) return diffOne({ ...open, path: first }, options)
    return diffTwo({ ...open, path: first }, { ...open, path: second, format: flags.secondFormat }, options)
  })
  output.end()
}

async function diffTwo(first: OpenImageOptions, second: OpenImageOptions, options: DiffOptions): Promise<void> {
  const { withPair } = await import('../../image/pair.ts')
  const { diffImages } = await import('../../image/diff.ts')
  await withPair(first, second, (a, b) => diffImages(a, b, options))
}

async function diffOne(image: OpenImageOptions, options: DiffOptions): Promise<void> {
  const { openImageAlone } = await import('../../image/open-image.ts')
  const { diffOverlay } = await import('../../image/diff.ts')
  const layer = await openImageAlone(image)
  try {
    await diffOverlay(layer, options)
  } finally {
    await layer.close()
  }
}

interface RangeOutput {
  readonly visit: RangeVisitor
  end(): void
}

class JsonRanges implements RangeOutput {
  #before = '['

  readonly visit: RangeVisitor = (start, length) => {
    process.stdout.write(`${this.#before}${JSON.stringify({ start, length })}`)
    this.#before = ',\n'
  }

  end(): void {
    process.stdout.write(this.#before === '[' ? '[]\n' : ']\n')
  }
}

class TableRanges implements RangeOutput {
  readonly visit: RangeVisitor = (start, length) => void process.stdout.write(`${String(start).padEnd(18)}${length}\n`)

  end(): void {}
}

function granularityArgument(text: string): number {
  const bytes = parseSize(text)
  if (bytes !== undefined && isPowerOfTwo(bytes) && bytes >= GRANULE_MIN && bytes <= GRANULE_MAX) return bytes
  throw new BlockError('invalid-argument', `-g ${text}: give a power of two from ${GRANULE_MIN} to 16M, such as 64k`)
}
