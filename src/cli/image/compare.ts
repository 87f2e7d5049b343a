// varve image compare: whether two images show the same. Exit status 0 when they do, 1 when they do not, and another when that
// could not be found out, as qemu-img has it; so an error that ends other commands with 1 ends this one with 2.

import { type Command, Option } from 'commander'
import { FORMATS, type Format } from '../../chain/open.ts'
import { realHost } from '../../host/real.ts'
import { type GlobalOptions, reportError } from '../context.ts'
import {
  allowOption,
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

interface CompareFlags extends ImageOptions {
  readonly secondFormat?: Format
  readonly strict?: boolean
  readonly progress?: boolean
  readonly quiet?: boolean
}

/** Of a comparison that was not finished: what other commands call failed is not to be taken for "they differ". */
const UNKNOWN = 2

export function addCompareCommand(image: Command): void {
  image
    .command('compare <first> <second>')
    .description('whether two images show the same: status 0 if so, 1 if not')
    .addOption(formatOption())
    .addOption(new Option('-F, --second-format <format>', 'format of the second image').choices(FORMATS))
    .option('-s, --strict', 'sizes and what is allocated must be the same too')
    .addOption(allowOption())
    .addOption(shareOption())
    .addOption(progressOption())
    .addOption(quietOption())
    .addOption(outputOption())
    .action(compare)
}

async function compare(first: string, second: string, flags: CompareFlags, command: Command): Promise<void> {
  try {
    process.exitCode = (await isSame(first, second, flags, command)) ? 0 : 1
  } catch (error) {
    const { json } = command.optsWithGlobals<GlobalOptions>()
    process.exitCode = Math.max(UNKNOWN, reportError(error, json === true))
  }
}

async function isSame(first: string, second: string, flags: CompareFlags, command: Command): Promise<boolean> {
  const { withPair } = await import('../../image/pair.ts')
  const { compareImages, describeComparison } = await import('../../image/compare.ts')
  const open = { host: realHost, ...whatToOpen(flags) }
  const two = [
    { ...open, path: first },
    { ...open, path: second, format: flags.secondFormat },
  ] as const
  const comparison = await withProgress('comparing', flags.progress, (progress) =>
    withPair(...two, (a, b) => compareImages(a, b, { strict: flags.strict, progress })),
  )
  const { outcome, sizes } = comparison
  if (flags.quiet !== true) {
    if (sizes[0] !== sizes[1] && outcome !== 'size') process.stderr.write('varve: Warning: Image size mismatch!\n')
    printResult(command, { identical: outcome === 'identical', ...comparison }, describeComparison)
  }
  return outcome === 'identical'
}
