// varve image info: what an image says of itself.

import type { Command } from 'commander'
import { formatSize } from '../../base/size.ts'
import { realHost } from '../../host/real.ts'
import type { ImageInfo } from '../../image/info.ts'
import {
  allowOption,
  formatOption,
  type ImageOptions,
  outputOption,
  printResult,
  shareOption,
  whatToOpen,
} from './options.ts'

export function addInfoCommand(image: Command): void {
  image
    .command('info <image>')
    .description('what an image says of itself')
    .addOption(formatOption())
    .option('--backing-chain', 'its backing files too')
    .addOption(allowOption())
    .addOption(shareOption())
    .addOption(outputOption())
    .action(async (path: string, options: ImageOptions & { backingChain?: boolean }, command: Command) => {
      const { describeChain, describeImage } = await import('../../image/info.ts')
      const wanted = { host: realHost, path, ...whatToOpen(options) }
      if (options.backingChain === true) {
        printResult(command, await describeChain(wanted), (chain) => chain.map(textOf).join('\n\n'))
      } else printResult(command, await describeImage(wanted), textOf)
    })
}

function textOf(info: ImageInfo): string {
  const lines = [
    `image: ${info.filename}`,
    `file format: ${info.format}`,
    `virtual size: ${formatSize(info['virtual-size'])} (${info['virtual-size']} bytes)`,
    `disk size: ${formatSize(info['actual-size'])}`,
  ]
  if (info['cluster-size'] !== undefined) lines.push(`cluster_size: ${info['cluster-size']}`)
  if (info['dirty-flag']) lines.push('cleanly shut down: no')
  if (info['backing-filename'] !== undefined) {
    const full = info['full-backing-filename']
    const actual = full === info['backing-filename'] ? '' : ` (actual path: ${full})`
    lines.push(`backing file: ${info['backing-filename']}${actual}`)
  }
  const format = info['backing-filename-format']
  if (format !== undefined) lines.push(`backing file format: ${format}`)
  const specific = info['format-specific']
  if (specific !== undefined) {
    lines.push('Format specific information:')
    for (const [name, value] of Object.entries(specific.data)) lines.push(`    ${name.replaceAll('-', ' ')}: ${value}`)
  }
  return lines.join('\n')
}
