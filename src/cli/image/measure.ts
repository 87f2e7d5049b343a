// varve image measure: how large an image file would get.

import { type Command, Option } from 'commander'
import { formatSize } from '../../base/size.ts'
import { BlockError } from '../../block/error.ts'
import { FORMATS, type Format } from '../../chain/open.ts'
import { realHost } from '../../host/real.ts'
import type { Measured } from '../../image/measure.ts'
import { sizeArgument } from '../context.ts'
import {
  allowOption,
  createOption,
  formatOption,
  type ImageOptions,
  outputOption,
  printResult,
  shareOption,
  whatToOpen,
} from './options.ts'

interface MeasureOptions extends ImageOptions {
  readonly outputFormat: Format
  readonly options?: readonly string[]
  readonly size?: number
}

export function addMeasureCommand(image: Command): void {
  image
    .command('measure [image]')
    .description('how large an image file would get, empty or with what another image holds')
    .addOption(formatOption())
    .addOption(new Option('-O, --output-format <format>', 'format to measure for').choices(FORMATS).default('raw'))
    .addOption(createOption())
    .option('--size <size>', 'of an empty disk of this size', sizeArgument)
    .addOption(allowOption())
    .addOption(shareOption())
    .addOption(outputOption())
    .action(measureCommand)
}

async function measureCommand(path: string | undefined, options: MeasureOptions, command: Command): Promise<void> {
  const { parseCreateOptions } = await import('../../image/create-options.ts')
  const { bitmapBytes, measure } = await import('../../image/measure.ts')
  const settings = parseCreateOptions(options.outputFormat, options.options ?? [])
  if ((path === undefined) === (options.size === undefined))
    throw new BlockError('invalid-argument', 'measure takes either an image or --size')
  if (path === undefined) {
    printResult(command, await measure(options.outputFormat, settings, options.size ?? 0), textOf)
    return
  }
  const { openImage } = await import('../../image/open-image.ts')
  const source = await openImage({ host: realHost, path, ...whatToOpen(options) })
  try {
    const measured = await measure(options.outputFormat, settings, source.size, source)
    const bitmaps = options.outputFormat === 'qcow2' ? bitmapBytes(source.active, settings) : undefined
    printResult(command, bitmaps === undefined ? measured : { ...measured, bitmaps }, textOf)
  } finally {
    await source.close()
  }
}

function textOf(measured: Measured): string {
  const line = (name: string, bytes: number): string => `${name}: ${bytes} (${formatSize(bytes)})`
  const lines = [line('required size', measured.required), line('fully allocated size', measured['fully-allocated'])]
  if (measured.bitmaps !== undefined) lines.push(line('bitmaps size', measured.bitmaps))
  return lines.join('\n')
}
