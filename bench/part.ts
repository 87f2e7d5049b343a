// What a part of the benchmark is given and gives back. A part is a file in bench/parts; run.ts runs them and keeps their figures.

import { AGAIN, type Extent, type Figure, median, type Results, type Row } from './results.ts'

export interface Bench extends Extent {
  /** Empty, for images and sockets; removed after the part. In memory unless VARVE_BENCH_DIR said otherwise. */
  readonly folder: string
  /** Likewise, on a disk. */
  readonly diskFolder: string
  /** True for the rows that the user asked for. */
  readonly wants: (row: string) => boolean
  /** Remembers the version of a program that takes part. False when it is not installed, which is said. */
  readonly has: (program: string, version: string | undefined) => boolean
}

export interface Part {
  readonly name: string
  readonly title: string
  /** What was measured and how, as a paragraph of the page. */
  readonly about: (results: Results) => string
  /** Of the published run, where it differs from what is usual. */
  readonly extent?: Partial<Extent>
  readonly measure: (bench: Bench) => Promise<Row[]>
}

export interface Measurement {
  /** In the unit of the row. */
  readonly value: number
  readonly p99Us?: number
}

export interface Contender {
  readonly program: string
  readonly measure: () => Promise<Measurement>
}

/** Measures all in turn, round by round, so that a slow minute of the machine hits all of them. */
export async function takeTurns(contenders: readonly Contender[], rounds: number, title: string): Promise<Figure[]> {
  const found = contenders.map(({ program }) => ({ program, rounds: [] as number[], p99Us: [] as number[] }))
  for (let round = 0; round < rounds; round++) {
    for (let turn = 0; turn < contenders.length; turn++) {
      // Another one begins each round: what one leaves behind, free memory most of all, is not always the same one's to find.
      const index = (turn + round) % contenders.length
      const { value, p99Us } = await (contenders[index] as Contender).measure()
      found[index]?.rounds.push(value)
      if (p99Us !== undefined) found[index]?.p99Us.push(p99Us)
    }
  }
  for (const { program, rounds: values } of found)
    console.error(`  ${title}, ${program}: ${median(values).toLocaleString('en-US', { maximumFractionDigits: 2 })}`)
  return found.map(({ p99Us, ...figure }) => (p99Us.length === 0 ? figure : { ...figure, p99Us }))
}

/** All, and at the end the one of that name a second time, to show the noise. */
export function againLast<T extends { readonly program: string }>(all: readonly T[], program: string): T[] {
  return [...all, ...all.filter((one) => one.program === program).map((one) => ({ ...one, program: program + AGAIN }))]
}
