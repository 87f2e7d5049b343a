// varve image info: what an image says of itself.

import type { Command } from 'commander'
import { formatSize } from '../../base/size.ts'
import { realHost } from '../../host/real.ts'
import type { BitmapDescription, ImageInfo, SnapshotInfo } from '../../image/info.ts'
import { table } from '../context.ts'
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
  if (info.snapshots !== undefined) lines.push('Snapshot list:', ...indent(snapshotTable(info.snapshots)))
  const specific = info['format-specific']
  if (specific === undefined) return lines.join('\n')
  lines.push('Format specific information:')
  for (const [name, value] of Object.entries(specific.data)) {
    if (name !== 'bitmaps') lines.push(...indent(`${name.replaceAll('-', ' ')}: ${value}`))
  }
  const { bitmaps } = specific.data
  if (bitmaps !== undefined) lines.push(...indent('bitmaps:'), ...indent(bitmapTable(bitmaps)))
  return lines.join('\n')
}

function indent(text: string): string[] {
  return text.split('\n').map((line) => `    ${line}`)
}

/** One line for each snapshot, under heads as qemu-img has them. */
export function snapshotTable(snapshots: readonly SnapshotInfo[]): string {
  return table(
    ['ID', 'TAG', 'VM SIZE', 'DATE'],
    snapshots.map((snapshot) => [
      snapshot.id,
      snapshot.name,
      formatSize(snapshot['vm-state-size']),
      new Date(snapshot['date-sec'] * 1000).toISOString(),
    ]),
  )
}

function bitmapTable(bitmaps: readonly BitmapDescription[]): string {
  return table(
    ['NAME', 'GRANULARITY', 'FLAGS'],
    bitmaps.map(({ name, granularity, flags }) => [name, formatSize(granularity), flags.join(', ')]),
  )
}
