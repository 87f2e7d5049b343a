// What the benchmark of conversions found, as a part of docs/benchmarks.md. Figures only; it measures nothing.

import { describeSetting, median, type Setting } from './machine.ts'

export interface ConvertRow {
  readonly workload: string
  readonly program: string
  /** Seconds from the start of the process to its end, of each round, in order. */
  readonly seconds: readonly number[]
  /** Bytes that the target takes on the file system. */
  readonly targetBytes: number
}

export interface ConvertResults extends Setting {
  readonly versions: Readonly<Record<string, string>>
  readonly settings: { readonly imageMiB: number; readonly rounds: number }
  /** Of the source. */
  readonly dataMiB: number
  readonly rows: readonly ConvertRow[]
}

/** The program that the other is measured by, and its second run in the same rounds: their ratio is the noise. */
export const REFERENCE = 'qemu-img'
export const REFERENCE_AGAIN = 'qemu-img again'

/** What the project asks for: at least so many times the throughput of qemu-img. */
const TARGET = 1

function rowOf(results: ConvertResults, workload: string, program: string): ConvertRow | undefined {
  return results.rows.find((row) => row.workload === workload && row.program === program)
}

/** How many times as fast as the reference. */
export function speedOf(results: ConvertResults, workload: string, program: string): number | undefined {
  const own = rowOf(results, workload, program)
  const reference = rowOf(results, workload, REFERENCE)
  return own === undefined || reference === undefined ? undefined : median(reference.seconds) / median(own.seconds)
}

/** The worst disagreement of the reference with itself: 0.1 is ten percent. */
export function convertNoise(results: ConvertResults): number {
  const again = results.rows.filter(({ program }) => program === REFERENCE_AGAIN)
  return Math.max(0, ...again.map((row) => Math.abs((speedOf(results, row.workload, REFERENCE_AGAIN) ?? 1) - 1)))
}

function cell(results: ConvertResults, workload: string, program: string): string {
  const row = rowOf(results, workload, program)
  const speed = speedOf(results, workload, program)
  if (row === undefined || speed === undefined) return '-'
  const seconds = `${median(row.seconds).toFixed(2)} s`
  return program === REFERENCE ? seconds : `${seconds} (${speed.toFixed(2)})`
}

/** The part of the page. */
export function convertSection(results: ConvertResults): string {
  const programs = [...new Set(results.rows.map(({ program }) => program))]
  const workloads = [...new Set(results.rows.map(({ workload }) => workload))]
  const size = (workload: string): string =>
    programs
      .filter((program) => program !== REFERENCE_AGAIN)
      .map((program) => Math.round((rowOf(results, workload, program)?.targetBytes ?? 0) / 1024 ** 2))
      .join(' and ')
  const lines = workloads.map((workload) => {
    const cells = programs.map((program) => cell(results, workload, program))
    return `| ${workload} | ${cells.join(' | ')} | ${TARGET.toFixed(1)} | ${size(workload)} MiB |`
  })
  const { settings, dataMiB } = results
  return `## Conversions side by side

${describeSetting(results, Object.values(results.versions), 'node bench/convert.ts')}

A raw disk of ${settings.imageMiB} MiB with ${dataMiB} MiB of data, half of that random and half text, in runs of 64 KiB to 8 MiB between holes;
all files in memory (a tmpfs, unless VARVE_BENCH_DIR said otherwise). \`varve image convert\` and \`qemu-img convert\` with the same
options and their defaults, from the start of the process to its end; ${settings.rounds} rounds, the programs in turn within each round.
Medians of seconds, in brackets how many times as fast as qemu-img. "${REFERENCE_AGAIN}" is the same program a second time in
each round: it was off by up to ${(convertNoise(results) * 100).toFixed(0)} % in this run. The last column is what the targets take.

| from and to | ${programs.join(' | ')} | target | size |
|---|${programs.map(() => '---:|').join('')}---:|---:|
${lines.join('\n')}
`
}
