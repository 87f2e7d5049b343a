// varve image bitmap: changes the persistent bitmaps of a qcow2 image, as `qemu-img bitmap` has it. Actions are done in the order
// in which they are given.

import { type Command, Option } from 'commander'
import { isPowerOfTwo } from '../../base/round.ts'
import { parseSize } from '../../base/size.ts'
import { BlockError } from '../../block/error.ts'
import { FORMATS, type Format } from '../../chain/open.ts'
import { MAX_GRANULARITY_BITS, MIN_GRANULARITY_BITS } from '../../format/qcow2/spec.ts'
import { realHost } from '../../host/real.ts'
import type { BitmapAction } from '../../image/edit-bitmaps.ts'
import { formatOption, type ImageOptions, quietOption, whatToOpen } from './options.ts'

interface BitmapFlags extends ImageOptions {
  readonly granularity?: number
  readonly sourceFile?: string
  readonly sourceFormat?: Format
}

/** An action as it was given, before what goes with it is known. */
type Asked = { readonly kind: BitmapAction['kind']; readonly source?: string }

const PLAIN = {
  add: 'add an empty bitmap, which records from now on',
  remove: 'remove it',
  clear: 'clear it',
  enable: 'record from now on',
  disable: 'record no more',
} as const

export function addBitmapCommand(image: Command): void {
  const asked: Asked[] = []
  const bitmap = image
    .command('bitmap <image> <name>')
    .description('change a persistent bitmap of a qcow2 image; several changes are made in the order given')
  for (const [kind, description] of Object.entries(PLAIN) as [keyof typeof PLAIN, string][]) {
    bitmap.option(`--${kind}`, description)
    bitmap.on(`option:${kind}`, () => asked.push({ kind }))
  }
  bitmap.option('--merge <bitmap>', 'add what this other bitmap has set')
  bitmap.on('option:merge', (source: string) => asked.push({ kind: 'merge', source }))
  bitmap
    .option('-g, --granularity <size>', 'with --add: size of a block, a power of two', granularityArgument)
    .option('-b, --source-file <image>', 'with --merge: the other bitmap is in this image')
    .addOption(new Option('-F, --source-format <format>', 'format of that image').choices(FORMATS))
    .addOption(formatOption())
    .addOption(quietOption())
    .action(async (path: string, name: string, flags: BitmapFlags) => {
      const { editBitmap } = await import('../../image/edit-bitmaps.ts')
      const actions = asked.map((action) => complete(action, flags))
      refuse(asked, flags)
      await editBitmap({ host: realHost, path, ...whatToOpen(flags) }, name, actions)
    })
}

function complete({ kind, source }: Asked, { granularity, sourceFile, sourceFormat }: BitmapFlags): BitmapAction {
  if (kind === 'add') return { kind, granularity }
  if (kind !== 'merge') return { kind }
  const image = sourceFile === undefined ? undefined : { host: realHost, path: sourceFile, format: sourceFormat }
  return { kind, bitmap: source as string, image }
}

function refuse(asked: readonly Asked[], { granularity, sourceFile, sourceFormat }: BitmapFlags): void {
  const fail = (message: string): never => {
    throw new BlockError('invalid-argument', message)
  }
  const has = (kind: BitmapAction['kind']): boolean => asked.some((action) => action.kind === kind)
  if (asked.length === 0) fail('say what to do: --add, --remove, --clear, --enable, --disable or --merge BITMAP')
  if (granularity !== undefined && !has('add')) fail('-g goes with --add')
  if (sourceFile !== undefined && !has('merge')) fail('-b names the image of the bitmap that --merge takes')
  if (sourceFormat !== undefined && sourceFile === undefined) fail('-F says the format of an image; name it with -b')
}

function granularityArgument(text: string): number {
  const bytes = parseSize(text)
  if (
    bytes !== undefined &&
    isPowerOfTwo(bytes) &&
    bytes >= 2 ** MIN_GRANULARITY_BITS &&
    bytes <= 2 ** MAX_GRANULARITY_BITS
  )
    return bytes
  throw new BlockError('invalid-argument', `-g ${text}: give a power of two from 512 to 2G, such as 64k`)
}
