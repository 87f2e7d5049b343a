// Results on record: each run of a part is a file in bench/results, and docs/benchmarks.md shows the newest of each part: first what
// is asked and what was found, then the figures. Its chart is docs/benchmarks.svg. It measures nothing.

import fs from 'node:fs'
import path from 'node:path'
import { drawChart } from './chart.ts'
import { ROOT } from './machine.ts'
import type { Part } from './part.ts'
import { AGAIN, type Ask, findingsOf, medianOf, noiseOf, type Results, type Row, ratioTo } from './results.ts'

const RESULTS = path.join(ROOT, 'bench', 'results')
const PAGE = path.join(ROOT, 'docs', 'benchmarks.md')
const CHART = path.join(ROOT, 'docs', 'benchmarks.svg')

/** A row whose program disagrees with itself by more than this says nothing; the page marks it. */
const NOISE_MAX = 0.25

export function keep(results: Results): void {
  fs.mkdirSync(RESULTS, { recursive: true })
  const name = `${results.part}-${results.date.replaceAll(/[:.]/g, '-')}.json`
  fs.writeFileSync(path.join(RESULTS, name), `${JSON.stringify(results, null, 2)}\n`)
}

/** Writes page and chart anew from what is on record. */
export function writePage(parts: readonly Part[]): void {
  const measured = parts.flatMap((part) => {
    const results = newestOf(part.name)
    return results === undefined ? [] : [{ part, results }]
  })
  const text = [
    HEAD,
    summary(measured.map(({ results }) => results)),
    ...measured.map(({ part, results }) => section(part, results)),
  ].join('\n\n')
  fs.writeFileSync(PAGE, `${text}\n`)
  const cached = measured.find(({ part }) => part.name === 'cached')
  if (cached !== undefined) fs.writeFileSync(CHART, drawChart(cached.results))
}

function newestOf(part: string): Results | undefined {
  if (!fs.existsSync(RESULTS)) return undefined
  const names = fs.readdirSync(RESULTS).filter((name) => new RegExp(`^${part}-\\d{4}-`).test(name))
  const newest = names.sort().at(-1)
  if (newest === undefined) return undefined
  return JSON.parse(fs.readFileSync(path.join(RESULTS, newest), 'utf8')) as Results
}

const HEAD = `# Benchmarks

\`npm run bench\` measures all of this, writes this page, and keeps the raw figures under \`bench/results/\`. The programs that are
compared take turns within each round; a figure is the median of the rounds. Client and servers share the machine's
cores, so no figure is an upper bound.

![Speed of varve nbd beside other NBD servers](benchmarks.svg)`

/** What is asked of each row, and what was found. */
function summary(all: readonly Results[]): string {
  const lines = all.flatMap(({ rows }) =>
    rows.flatMap((row) =>
      findingsOf(row).map(({ ask, found, isMet }) => {
        const noise = noiseOf(row)
        const isNoisy = ask.of !== undefined && noise !== undefined && noise > NOISE_MAX
        const verdict = isNoisy ? 'too noisy' : isMet ? 'yes' : '**no**'
        return `| ${row.table}, ${row.name} | ${describeAsk(row, ask)} | ${describe(found)} | ${percent(noise)} | ${verdict} |`
      }),
    ),
  )
  return `## What is asked and what was found

"Noise" is how far a program that ran twice in each round is from itself; a ratio nearer to what is asked than that says little.

| of | asked | found | noise | met |
|---|---|---:|---:|---|
${lines.join('\n')}`
}

function describeAsk(row: Row, { program = row.subject, of, atLeast, atMost }: Ask): string {
  const bound = atLeast === undefined ? `at most ${atMost}` : `at least ${atLeast}`
  return of === undefined ? `${program}: ${bound} ${row.unit}` : `${program}: ${bound} of ${of}`
}

function section(part: Part, results: Results): string {
  const { date, commit, isModified, machine, loadBefore, extent, versions, rows } = results
  const programs = Object.values(versions).join('; ')
  const tables = [...new Set(rows.map(({ table }) => table))]
  return `## ${part.title}

${part.about(results)}

Measured ${date.slice(0, 10)} at commit ${commit.slice(0, 12)}${isModified ? ' (with changes)' : ''}: ${extent.rounds} ${extent.rounds === 1 ? 'round' : 'rounds'}. ${machine.cores} cores (${machine.cpu}), Linux ${machine.kernel},
load average ${loadBefore.toFixed(1)} before. ${programs}.

${tables.map((table) => tableOf(rows.filter((row) => row.table === table))).join('\n\n')}`
}

/** Figures, and in brackets what the subject's figure is when theirs is 1. */
function tableOf(rows: readonly Row[]): string {
  const programs = [...new Set(rows.flatMap(({ figures }) => figures.map(({ program }) => program)))]
  const lines = rows.map((row) => {
    const cells = programs.map((program) => cell(row, program))
    return `| ${row.name}, ${row.unit} | ${cells.join(' | ')} |`
  })
  return [
    `| ${rows[0]?.table} | ${programs.join(' | ')} |`,
    `|---|${programs.map(() => '---:|').join('')}`,
    ...lines,
  ].join('\n')
}

function cell(row: Row, program: string): string {
  const value = medianOf(row, program)
  const ratio = ratioTo(row, program)
  if (value === undefined || ratio === undefined) return '-'
  return program === row.subject || program.endsWith(AGAIN)
    ? describe(value)
    : `${describe(value)} (${ratio.toFixed(2)})`
}

function describe(value: number): string {
  return value.toLocaleString('en-US', { maximumFractionDigits: value < 10 ? 2 : value < 100 ? 1 : 0 })
}

function percent(share: number | undefined): string {
  return share === undefined ? '' : `${(share * 100).toFixed(0)} %`
}
