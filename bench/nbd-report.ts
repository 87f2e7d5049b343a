// What the benchmark of NBD servers found, as a part of docs/benchmarks.md. Figures only; it measures nothing.

import { describeSetting, median, type Setting } from './machine.ts'
import type { ImageFormat } from './servers.ts'

export interface Row {
  readonly format: ImageFormat
  readonly workload: string
  readonly server: string
  /** I/O per second of each round, in order. */
  readonly rounds: readonly number[]
  /** 99th percentile latency of each round, microseconds. */
  readonly p99Us: readonly number[]
}

export interface Results extends Setting {
  readonly versions: Readonly<Record<string, string>>
  readonly settings: { readonly seconds: number; readonly rounds: number; readonly imageMiB: number }
  readonly targets: Readonly<Record<string, number>>
  readonly rows: readonly Row[]
}

/** The server that the others are measured by, and its second run in the same rounds: their ratio is the noise. */
export const REFERENCE = 'qemu-nbd'
export const REFERENCE_AGAIN = 'qemu-nbd again'

/** The median of a server's rounds, in I/O per second; undefined where it was not measured. */
export function medianOf(results: Results, format: ImageFormat, workload: string, server: string): number | undefined {
  const row = results.rows.find((r) => r.format === format && r.workload === workload && r.server === server)
  return row === undefined ? undefined : median(row.rounds)
}

/** How many times as fast as the reference. */
export function ratioOf(results: Results, format: ImageFormat, workload: string, server: string): number | undefined {
  const own = medianOf(results, format, workload, server)
  const reference = medianOf(results, format, workload, REFERENCE)
  return own === undefined || reference === undefined ? undefined : own / reference
}

/** The worst disagreement of the reference with itself, over all workloads: 0.1 is ten percent. */
export function noiseOf(results: Results): number {
  const again = results.rows.filter((row) => row.server === REFERENCE_AGAIN)
  const off = again.map(({ format, workload }) =>
    Math.abs((ratioOf(results, format, workload, REFERENCE_AGAIN) ?? 1) - 1),
  )
  return Math.max(0, ...off)
}

function cell(results: Results, format: ImageFormat, workload: string, server: string): string {
  const own = medianOf(results, format, workload, server)
  const ratio = ratioOf(results, format, workload, server)
  if (own === undefined || ratio === undefined) return '-'
  const figure = Math.round(own).toLocaleString('en-US')
  return server === REFERENCE ? figure : `${figure} (${ratio.toFixed(2)})`
}

function table(results: Results, format: ImageFormat): string {
  const rows = results.rows.filter((row) => row.format === format)
  const servers = [...new Set(rows.map((row) => row.server))]
  const workloads = [...new Set(rows.map((row) => row.workload))]
  const lines = [
    `| ${format} | ${servers.join(' | ')} | target |`,
    `|---|${servers.map(() => '---:|').join('')}---:|`,
    ...workloads.map((workload) => {
      const cells = servers.map((server) => cell(results, format, workload, server))
      return `| ${workload} | ${cells.join(' | ')} | ${results.targets[workload]?.toFixed(1)} |`
    }),
  ]
  return lines.join('\n')
}

/** The part of the page. */
export function nbdSection(results: Results): string {
  const { settings, versions } = results
  return `## NBD servers side by side

${describeSetting(results, Object.values(versions), 'node bench/nbd.ts')}

fio's nbd engine over a Unix socket, on the same machine as the server. Each server has its own ${settings.imageMiB} MiB
image of random data, wholly in memory (a tmpfs, unless VARVE_BENCH_DIR said otherwise): no disk is measured. ${settings.rounds} rounds of ${settings.seconds} s, the
servers in turn within each round; medians of I/O per second, in brackets the ratio to ${REFERENCE}. "${REFERENCE_AGAIN}" is
the same server measured a second time in each round: how far its ratio is from 1 is the noise: up to ${(noiseOf(results) * 100).toFixed(0)} % in this run, so a ratio nearer to 1 than that says
nothing. Client and server share the cores, so a figure here is no upper bound.

${table(results, 'raw')}

${table(results, 'qcow2')}
`
}
