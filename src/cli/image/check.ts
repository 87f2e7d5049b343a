// varve image check: is an image whole? Exit status: 0 nothing is wrong; 1 space is lost and no more (leaks), or the check could
// not be done; 5 the image is corrupt. What was found is in the output in each case.

import { type Command, Option } from 'commander'
import { formatSize } from '../../base/size.ts'
import { realHost } from '../../host/real.ts'
import type { Checked } from '../../image/check.ts'
import {
  formatOption,
  type ImageOptions,
  outputOption,
  printResult,
  quietOption,
  shareOption,
  wantsJson,
  whatToOpen,
} from './options.ts'

/** Also when a part could not be checked. */
const LEAKS_STATUS = 1
const CORRUPT_STATUS = 5

interface CheckOptions extends ImageOptions {
  readonly repair?: 'leaks' | 'all'
  readonly quiet?: boolean
}

export function addCheckCommand(image: Command): void {
  image
    .command('check <image>')
    .description('is an image whole? exit status 0: yes, 1: space is lost, 5: corrupt')
    .addOption(formatOption())
    .addOption(
      new Option('-r, --repair <what>', 'repair lost space alone, or all that can be').choices(['leaks', 'all']),
    )
    .addOption(shareOption())
    .addOption(quietOption())
    .addOption(outputOption())
    .action(checkCommand)
}

async function checkCommand(path: string, options: CheckOptions, command: Command): Promise<void> {
  const { checkFile } = await import('../../image/check.ts')
  const checked = await checkFile({ host: realHost, path, ...whatToOpen(options), repair: options.repair })
  if (options.quiet !== true || wantsJson(command)) {
    printResult(command, checked.report, () => textOf(checked))
  }
  const { corruptions = 0, leaks = 0, 'check-errors': errors } = checked.report
  if (corruptions > 0) process.exitCode = CORRUPT_STATUS
  else if (leaks > 0 || errors > 0) process.exitCode = LEAKS_STATUS
}

function textOf({ report, problems, repaired }: Checked): string {
  const { corruptions = 0, leaks = 0, 'check-errors': errors } = report
  const { 'corruptions-fixed': corruptionsFixed = 0, 'leaks-fixed': leaksFixed = 0 } = report
  const lines: string[] = []
  if (corruptionsFixed + leaksFixed > 0) {
    lines.push(...repaired.map((problem) => `  ${problem}`))
    lines.push(`repaired ${corruptionsFixed} errors and ${leaksFixed} leaked clusters; checked again:`)
  }
  lines.push(...problems.map((problem) => `  ${problem}`))
  const unlisted = corruptions + leaks + errors - problems.length
  if (unlisted > 0) lines.push(`  and ${unlisted} more`)
  if (errors > 0) lines.push(`${errors} places could not be checked`)
  if (corruptions > 0)
    lines.push(`${corruptions} errors: data may be lost. varve image check -r all repairs what can be repaired`)
  if (leaks > 0) lines.push(`${leaks} clusters are lost space and no more: varve image check -r leaks`)
  if (corruptions + leaks + errors === 0) lines.push('No errors were found on the image.')
  const { 'total-clusters': total, 'allocated-clusters': allocated } = report
  if (total !== undefined && allocated !== undefined) {
    const part = (count = 0, all = allocated): string => `${((100 * count) / all).toFixed(2)}%`
    const fragmented = part(report['fragmented-clusters'])
    const compressed = part(report['compressed-clusters'])
    lines.push(
      `${allocated}/${total} = ${part(allocated, total)} allocated, ${fragmented} fragmented, ${compressed} compressed clusters`,
    )
  }
  const end = report['image-end-offset']
  if (end !== undefined) lines.push(`Image end offset: ${end} (${formatSize(end)})`)
  return lines.join('\n')
}
