// varve image map: where the data of a disk is. The list of a large image is long, so it is printed as it is found.

import { once } from 'node:events'
import type { Command } from 'commander'
import type { Layer } from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'
import { Qcow2Image } from '../../format/qcow2/image.ts'
import { realHost } from '../../host/real.ts'
import type { MapEntry } from '../../image/map.ts'
import { sizeArgument } from '../context.ts'
import {
  allowOption,
  formatOption,
  type ImageOptions,
  outputOption,
  shareOption,
  wantsJson,
  whatToOpen,
} from './options.ts'

interface MapOptions extends ImageOptions {
  readonly startOffset?: number
  readonly maxLength?: number
}

export function addMapCommand(image: Command): void {
  image
    .command('map <image>')
    .description('which file of the chain holds what, and where')
    .addOption(formatOption())
    .option('--start-offset <offset>', 'begin there', sizeArgument)
    .option('--max-length <length>', 'look at no more than that', sizeArgument)
    .addOption(allowOption())
    .addOption(shareOption())
    .addOption(outputOption())
    .action(mapCommand)
}

async function mapCommand(path: string, options: MapOptions, command: Command): Promise<void> {
  const { openImage } = await import('../../image/open-image.ts')
  const { mapImage } = await import('../../image/map.ts')
  const chain = await openImage({ host: realHost, path, ...whatToOpen(options) })
  try {
    const { startOffset = 0, maxLength = chain.size } = options
    if (startOffset > chain.size) {
      const message = `${path} has ${chain.size} bytes; --start-offset ${startOffset} is outside`
      throw new BlockError('invalid-argument', message, { path })
    }
    const entries = mapImage(chain, startOffset, maxLength)
    const files = chain.layers.toReversed().map(fileOfData)
    await printAll(wantsJson(command) ? jsonLines(entries) : tableLines(entries, files))
  } finally {
    await chain.close()
  }
}

/** The file that holds a layer's data: the image or its data file. */
function fileOfData(layer: Layer): string {
  return (layer instanceof Qcow2Image ? layer.dataFile : undefined) ?? layer.path
}

async function* jsonLines(entries: AsyncIterable<MapEntry>): AsyncGenerator<string, void, undefined> {
  let before = '['
  for await (const entry of entries) {
    yield `${before}${JSON.stringify(entry)}`
    before = ',\n'
  }
  yield before === '[' ? '[]\n' : ']\n'
}

/** Only what has data, as qemu-img shows it. */
async function* tableLines(
  entries: AsyncIterable<MapEntry>,
  files: readonly string[],
): AsyncGenerator<string, void, undefined> {
  const line = (...cells: string[]): string => `${cells.map((cell) => cell.padEnd(16)).join('')}`
  yield `${line('Offset', 'Length', 'Mapped to')}File\n`
  for await (const { start, length, depth, data, zero, offset } of entries) {
    if (!data || zero) continue
    const place = offset === undefined ? 'compressed' : hex(offset)
    yield `${line(hex(start), hex(length), place)}${files[depth]}\n`
  }
}

function hex(value: number): string {
  return value === 0 ? '0' : `0x${value.toString(16)}`
}

const PRINTED_AT_ONCE = 64 * 1024

async function printAll(pieces: AsyncIterable<string>): Promise<void> {
  let text = ''
  for await (const piece of pieces) {
    text += piece
    if (text.length < PRINTED_AT_ONCE) continue
    if (!process.stdout.write(text)) await once(process.stdout, 'drain')
    text = ''
  }
  process.stdout.write(text)
}
