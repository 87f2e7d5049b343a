// The figures of all benchmarks have one form: rows of programs that did the same work in turn, and what the project asks of
// them. Here is the form and its arithmetic; it measures nothing and prints nothing.

import type { Setting } from './machine.ts'

/** What one program did in each round, in order, in the unit of the row. */
export interface Figure {
  readonly program: string
  readonly rounds: readonly number[]
  /** 99th percentile of the latency in each round, in microseconds, where it is known. */
  readonly p99Us?: readonly number[]
}

/** What is asked: a program's median, or its ratio to another program's of the same row, at least or at most. */
export interface Ask {
  /** The subject of the row unless told. */
  readonly program?: string
  readonly of?: string
  readonly atLeast?: number
  readonly atMost?: number
}

export interface Row {
  /** Rows with the same programs stand in one table, under this heading. */
  readonly table: string
  readonly name: string
  readonly unit: string
  /** The program that the others are compared with. */
  readonly subject: string
  readonly figures: readonly Figure[]
  readonly asks: readonly Ask[]
}

/** How long and how much. */
export interface Extent {
  readonly rounds: number
  /** Of one measurement. */
  readonly seconds: number
  readonly imageMiB: number
}

/** Of one part of the benchmark: a file in bench/results. */
export interface Results extends Setting {
  readonly part: string
  readonly extent: Extent
  readonly versions: Readonly<Record<string, string>>
  readonly rows: readonly Row[]
}

/** The label of a program that runs a second time in each round: how far it is from itself is the noise. */
export const AGAIN = ' again'

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = Math.floor(sorted.length / 2)
  const upper = sorted[middle] ?? 0
  return sorted.length % 2 === 1 ? upper : ((sorted[middle - 1] ?? 0) + upper) / 2
}

/** The median of a program's rounds; undefined where it was not measured. */
export function medianOf(row: Row, program: string): number | undefined {
  const figure = row.figures.find((one) => one.program === program)
  return figure === undefined ? undefined : median(figure.rounds)
}

/** The subject's median divided by the program's. */
export function ratioTo(row: Row, program: string, subject: string = row.subject): number | undefined {
  const own = medianOf(row, subject)
  const other = medianOf(row, program)
  return own === undefined || other === undefined ? undefined : own / other
}

/** How far the program that ran twice disagrees with itself: 0.1 is ten percent. Undefined where none did. */
export function noiseOf(row: Row): number | undefined {
  const again = row.figures.find(({ program }) => program.endsWith(AGAIN))
  if (again === undefined) return undefined
  const ratio = ratioTo(row, again.program.slice(0, -AGAIN.length), again.program)
  return ratio === undefined ? undefined : Math.abs(ratio - 1)
}

export interface Finding {
  readonly ask: Ask
  readonly found: number
  readonly isMet: boolean
}

/** What is asked of the row and what was found; without what could not be measured. */
export function findingsOf(row: Row): Finding[] {
  return row.asks.flatMap((ask) => {
    const program = ask.program ?? row.subject
    const found = ask.of === undefined ? medianOf(row, program) : ratioTo(row, ask.of, program)
    if (found === undefined) return []
    const isMet =
      found >= (ask.atLeast ?? Number.NEGATIVE_INFINITY) && found <= (ask.atMost ?? Number.POSITIVE_INFINITY)
    return [{ ask, found, isMet }]
  })
}
