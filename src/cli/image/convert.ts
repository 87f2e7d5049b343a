// varve image convert: images into another format, as `qemu-img convert` has it.

import { type Command, Option } from 'commander'
import { IMAGE_LANES, IMAGE_LANES_MAX, IMAGE_SPARSE_MAX } from '../../base/limits.ts'
import { parseSize } from '../../base/size.ts'
import { BlockError } from '../../block/error.ts'
import { FORMATS, type Format } from '../../chain/open.ts'
import { realHost } from '../../host/real.ts'
import type { Converted } from '../../image/convert.ts'
import type { ImageSettings } from '../../image/create-options.ts'
import {
  allowOption,
  createOption,
  formatOption,
  type ImageOptions,
  printResult,
  progressOption,
  quietOption,
  shareOption,
  whatToOpen,
  withProgress,
} from './options.ts'

interface ConvertFlags extends ImageOptions {
  readonly targetFormat: Format
  readonly options?: readonly string[]
  readonly backing?: string
  readonly backingFormat?: Format
  readonly compress?: boolean
  readonly snapshot?: string
  readonly bitmaps?: boolean
  readonly skipBrokenBitmaps?: boolean
  readonly sparse?: number
  readonly parallel?: number
  readonly outOfOrder?: boolean
  /** False with --no-create. */
  readonly create: boolean
  readonly targetIsZero?: boolean
  readonly force?: boolean
  readonly salvage?: boolean
  readonly progress?: boolean
}

export function addConvertCommand(image: Command): void {
  image
    .command('convert <image...>')
    .usage('[options] <source...> <target>')
    .description('copy what images show into an image of another format, or a compressed one')
    .addOption(formatOption())
    .addOption(new Option('-O, --target-format <format>', 'format of the target').choices(FORMATS).default('raw'))
    .addOption(createOption())
    .option('-c, --compress', 'compress the clusters of a qcow2 target')
    .option('-l, --snapshot <name>', 'read this internal snapshot of the source, by id or name')
    .option('--bitmaps', 'copy the persistent bitmaps of the source')
    .option('--skip-broken-bitmaps', 'with --bitmaps: leave out those that are inconsistent')
    .option('-S, --sparse <size>', 'leave out runs of zeros from this length on; 0 writes all', sparseArgument)
    .option('-m, --parallel <number>', `pieces at work at once, ${IMAGE_LANES} unless told`, parallelArgument)
    .option('-W, --out-of-order', 'write pieces in any order')
    .option('-n, --no-create', 'fill a target that is there, in place')
    .option('--target-is-zero', 'with -n: the target reads as zeros')
    .option('--force', 'replace a target that is there')
    .option('-B, --backing <image>', 'the target shows this file where the source owns nothing itself')
    .addOption(new Option('-F, --backing-format <format>', 'format of the backing file').choices(FORMATS))
    .option('--salvage', 'go on over what cannot be read, as zeros; ends with status 1 when there was any')
    .addOption(allowOption())
    .addOption(shareOption())
    .addOption(progressOption())
    .addOption(quietOption())
    .action(convert)
}

async function convert(images: readonly string[], flags: ConvertFlags, command: Command): Promise<void> {
  const target = images.at(-1) as string
  const sources = images.slice(0, -1)
  const { convertImage } = await import('../../image/convert.ts')
  const { parseCreateOptions } = await import('../../image/create-options.ts')
  const { backing, backingFormat, sparse, outOfOrder, force, salvage, targetFormat: format } = flags
  const settings = parseCreateOptions(format, flags.options ?? [])
  if (backing !== undefined) settings.backingName = backing
  if (backingFormat !== undefined) settings.backingFormat = backingFormat
  refuse(flags, settings, sources)
  const stop = new AbortController()
  const abort = (): void => stop.abort()
  process.once('SIGINT', abort).once('SIGTERM', abort)
  try {
    const converted = await withProgress('converting', flags.progress, (progress) =>
      convertImage({
        host: realHost,
        sources: sources.map((path) => ({ host: realHost, path, ...whatToOpen(flags) })),
        target,
        format,
        settings,
        allowedFolders: flags.allow,
        existing: flags.create ? undefined : flags.targetIsZero === true ? 'zero' : 'any',
        snapshot: flags.snapshot,
        compress: flags.compress,
        bitmaps: flags.bitmaps !== true ? undefined : flags.skipBrokenBitmaps === true ? 'consistent' : 'all',
        sparse,
        lanes: flags.parallel,
        outOfOrder,
        force,
        salvage,
        signal: stop.signal,
        progress,
      }),
    )
    printResult(command, { filename: target, format, ...asFields(converted) }, () => '')
    if (converted.lostBytes > 0) reportLost(converted)
  } finally {
    process.off('SIGINT', abort).off('SIGTERM', abort)
  }
}

/** What cannot be meant together. */
function refuse(flags: ConvertFlags, settings: ImageSettings, sources: readonly string[]): void {
  const { targetFormat: format } = flags
  const fail = (message: string): never => {
    throw new BlockError('invalid-argument', message)
  }
  if (sources.length === 0) fail('name a source and a target')
  if (settings.backingName !== undefined) {
    if (sources.length > 1) fail('a backing file of the target cannot be combined with several sources')
    if (!flags.create) fail('-B is for a new target: with -n it has the backing file that it has')
  }
  if (flags.compress === true) {
    if (format !== 'qcow2') fail('-c is for a target of format qcow2')
    if (flags.outOfOrder === true) fail('-W cannot be combined with -c')
  }
  if (flags.skipBrokenBitmaps === true && flags.bitmaps !== true) fail('--skip-broken-bitmaps goes with --bitmaps')
  if (flags.targetIsZero === true && flags.create) fail('--target-is-zero is for a target that is there, with -n')
  if (!flags.create && flags.options !== undefined) fail('-o is for a new target: with -n it is as it is')
  if (flags.force === true && !flags.create) fail('--force replaces the target, -n fills it: give one of them')
}

function asFields({ size, lost, lostBytes }: Converted): object {
  return { 'virtual-size': size, ...(lostBytes > 0 && { 'lost-bytes': lostBytes, lost }) }
}

function reportLost({ lost, lostBytes }: Converted): void {
  const listed = lost.reduce((sum, { length }) => sum + length, 0)
  for (const { start, length, reason } of lost)
    process.stderr.write(`varve: ${length} bytes at ${start} could not be read and are zeros now: ${reason}\n`)
  if (listed < lostBytes) process.stderr.write(`varve: and ${lostBytes - listed} bytes more\n`)
  process.exitCode = 1
}

function sparseArgument(text: string): number {
  const bytes = parseSize(text)
  if (bytes !== undefined && bytes % 512 === 0 && bytes <= IMAGE_SPARSE_MAX) return bytes
  throw new BlockError('invalid-argument', `-S ${text}: give a multiple of 512 up to ${IMAGE_SPARSE_MAX}, such as 4k`)
}

function parallelArgument(text: string): number {
  const count = /^\d{1,4}$/.test(text) ? Number(text) : 0
  if (count >= 1 && count <= IMAGE_LANES_MAX) return count
  throw new BlockError('invalid-argument', `-m ${text}: give a number from 1 to ${IMAGE_LANES_MAX}`)
}
