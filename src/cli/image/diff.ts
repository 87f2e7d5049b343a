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
  readonly fromBitmap?: string
  readonly bitmap?: string
  readonly into?: string
  readonly granularity?: number
  readonly progress?: boolean
}

const GRANULARITY = 64 * 1024

export function addDiffCommand(image: Command): void {
  image
    .command('diff <images...>')
    .usage('[options] <image> <image> | --overlay <image> | --from-bitmap <name> <image>')
    .description('the blocks that differ between two images, that an overlay holds, or that a bitmap says have changed')
    .addOption(formatOption())
    .addOption(new Option('-F, --second-format <format>', 'format of the second image').choices(FORMATS))
    .option('--overlay', 'of one image: what it holds itself, over its backing file; no data is read')
    .option('--from-bitmap <name>', 'of one image: what this persistent bitmap of it says has changed')
    .option('--bitmap <name>', 'save the result as a persistent bitmap of the last image, and print nothing')
    .option('--into <image>', 'with --bitmap: save it in this qcow2 image instead')
    .option(
      '-g, --granularity <size>',
      'size of a block, a power of two; 64k unless told, or that of the overlay or bitmap',
      granularityArgument,
    )
    .addOption(allowOption())
    .addOption(shareOption())
    .addOption(progressOption())
    .addOption(outputOption())
    .action(diff)
}

async function diff(images: readonly string[], flags: DiffFlags, command: Command): Promise<void> {
  refuse(images, flags)
  const [first = '', second = ''] = images
  const open = { host: realHost, ...whatToOpen(flags) }
  const last = { ...open, path: second, format: flags.secondFormat }
  const find = (visit: RangeVisitor): Promise<void> =>
    withProgress('comparing', flags.progress, async (progress) => {
      const options = { granule: flags.granularity ?? (images.length === 2 ? GRANULARITY : 1), visit, progress }
      if (flags.fromBitmap !== undefined) return diffByBitmap({ ...open, path: first }, flags.fromBitmap, options)
      if (flags.overlay === true) return diffOne({ ...open, path: first }, options)
      return diffTwo({ ...open, path: first }, last, options)
    })
  if (flags.bitmap === undefined) {
    const output = wantsJson(command) ? new JsonRanges() : new TableRanges()
    await find(output.visit)
    output.end()
  } else {
    const image = images.length === 2 ? last : { ...open, path: first }
    const into = flags.into === undefined ? image : { host: realHost, path: flags.into }
    await saveAsBitmap(into, flags.bitmap, flags.granularity ?? GRANULARITY, find)
  }
}

function refuse(images: readonly string[], { overlay, fromBitmap, bitmap, into }: DiffFlags): void {
  const fail = (message: string): never => {
    throw new BlockError('invalid-argument', message)
  }
  if (overlay === true && fromBitmap !== undefined) fail('give --overlay or --from-bitmap, not both')
  const wanted = overlay === true || fromBitmap !== undefined ? 1 : 2
  if (images.length !== wanted && wanted === 1) fail('name one image for --overlay or --from-bitmap')
  if (images.length !== wanted) fail('name two images, or one with --overlay or --from-bitmap')
  if (into !== undefined && bitmap === undefined) fail('--into is where --bitmap saves; name the bitmap')
}

async function saveAsBitmap(
  into: OpenImageOptions,
  name: string,
  granule: number,
  find: (visit: RangeVisitor) => Promise<void>,
): Promise<void> {
  const { checkNewBitmap, saveNewBitmap } = await import('../../image/edit-bitmaps.ts')
  const { Bitmap } = await import('../../bitmap/bitmap.ts')
  const size = await checkNewBitmap(into, name)
  const bits = new Bitmap(size, granule)
  await find((start, length) => {
    if (start + length > size) {
      const message = `the images differ at ${start}, past the ${size} bytes of ${into.path}, whose bitmap cannot say so`
      throw new BlockError('invalid-argument', message, { path: into.path })
    }
    bits.set(start, length)
  })
  await saveNewBitmap(into, name, bits)
}

async function diffByBitmap(image: OpenImageOptions, name: string, options: DiffOptions): Promise<void> {
  const { readBitmap } = await import('../../image/edit-bitmaps.ts')
  const { diffBitmap } = await import('../../image/diff.ts')
  diffBitmap(await readBitmap(image, name), options)
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
