// Results on record: each run of a benchmark is a file in bench/results, and docs/benchmarks.md shows the newest of each kind
// whose noise is low enough. It measures nothing.

import fs from 'node:fs'
import path from 'node:path'
import { type ConvertResults, convertNoise, convertSection } from './convert-report.ts'
import { NOISE_MAX, ROOT } from './machine.ts'
import { nbdSection, noiseOf, type Results } from './nbd-report.ts'

const RESULTS = path.join(ROOT, 'bench/results')
const PAGE = path.join(ROOT, 'docs/benchmarks.md')

/** Keeps the results, writes the page anew, and says whether they are on it. */
export function publish(kind: 'nbd' | 'convert', results: { readonly date: string }, noise: number): boolean {
  fs.mkdirSync(RESULTS, { recursive: true })
  const name = `${kind}-${results.date.replaceAll(/[:.]/g, '-')}.json`
  fs.writeFileSync(path.join(RESULTS, name), `${JSON.stringify(results, null, 2)}\n`)
  fs.writeFileSync(PAGE, page())
  if (noise <= NOISE_MAX) return true
  console.error(`Not published: the reference differs from itself by ${(noise * 100).toFixed(0)} %.`)
  console.error('Measure again on a machine that does nothing else.')
  return false
}

function page(): string {
  const nbd = newest<Results>('nbd', noiseOf)
  const convert = newest<ConvertResults>('convert', convertNoise)
  const sections = [nbd && nbdSection(nbd), convert && convertSection(convert)].filter((text) => text !== undefined)
  return `# Benchmarks\n\n\`npm run bench\` measures all of this, writes this page, and keeps the raw figures under \`bench/results/\`.\n\n${sections.join('\n')}`
}

function newest<T>(kind: string, noise: (results: T) => number): T | undefined {
  const names = fs.readdirSync(RESULTS).filter((name) => name.startsWith(`${kind}-`))
  for (const name of names.sort().reverse()) {
    const results = JSON.parse(fs.readFileSync(path.join(RESULTS, name), 'utf8')) as T
    if (noise(results) <= NOISE_MAX) return results
  }
  return undefined
}
