// Runs the tests: every *.test.ts under src, test and tools, or the files and folders named. One line per file as it ends,
// each failure whole, then the skipped tests with their reasons, and last `N passed, N failed`. A file fails, by its name,
// when it crashes, leaves the process early, holds no test, takes too long, or does not end after its tests. With CI set a
// skip fails the run: a peer that should be there is missing. It knows nothing of what the tests test.
//
//   npm test                            all
//   npm test -- src/bitmap test/crash   some
//   npm test -- --grep 'merge keeps'    only tests whose name matches (a regular expression)
//   npm test -- --verbose               a line per test too
//   npm test -- --list                  the files only

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { run } from 'node:test'
import { inspect, parseArgs } from 'node:util'

const ROOT = path.resolve(import.meta.dirname, '..')
const PLACES = ['src', 'test', 'tools']

/** Longest time for one file, in seconds, unless told. */
const FILE_LIMIT_S = 1500

const OPTIONS = {
  grep: { type: 'string' },
  jobs: { type: 'string' },
  list: { type: 'boolean' },
  timeout: { type: 'string' },
  verbose: { type: 'boolean' },
} as const

const USAGE = 'usage: npm test -- [--grep REGEXP] [--jobs N] [--timeout SECONDS] [--verbose] [--list] [FILE|FOLDER...]'

interface Settings {
  readonly files: readonly string[]
  readonly grep: RegExp | undefined
  readonly jobs: number
  readonly limitS: number
  readonly verbose: boolean
  readonly list: boolean
}

interface Found {
  readonly name: string
  readonly detail: string
}

interface Report {
  readonly file: string
  readonly passed: string[]
  readonly failed: Found[]
  readonly skipped: Found[]
  /** What the tests said with `t.diagnostic`, such as their seed. */
  readonly notes: string[]
  output: string
  seconds: number
}

function readSettings(words: readonly string[]): Settings {
  const { values, positionals } = parseArgs({ args: [...words], options: OPTIONS, allowPositionals: true })
  const places = positionals.length > 0 ? positionals.map((name) => path.resolve(name)) : PLACES.map(fromRoot)
  return {
    files: [...new Set(places.flatMap(testFiles))],
    grep: values.grep === undefined ? undefined : new RegExp(values.grep),
    jobs: values.jobs === undefined ? os.availableParallelism() : positive('--jobs', values.jobs),
    limitS: values.timeout === undefined ? FILE_LIMIT_S : positive('--timeout', values.timeout),
    verbose: values.verbose === true,
    list: values.list === true,
  }
}

function positive(option: string, text: string): number {
  const value = Number(text)
  if (!(value > 0)) throw new Error(`${option} takes a number above zero, not "${text}"`)
  return value
}

function fromRoot(name: string): string {
  return path.join(ROOT, name)
}

function relative(file: string): string {
  return path.relative(ROOT, file)
}

function testFiles(place: string): string[] {
  const found = fs.statSync(place, { throwIfNoEntry: false })
  if (found === undefined) throw new Error(`${place} does not exist`)
  if (found.isFile()) return [place]
  const files = fs
    .readdirSync(place, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && entry.name.endsWith('.test.ts'))
    .map((entry) => path.join(entry.parentPath, entry.name))
    .sort()
  if (files.length === 0) throw new Error(`${place} holds no *.test.ts`)
  return files
}

/** Runs one file in a process of its own. Never rejects: whatever goes wrong is a failure in the report. */
async function runFile(file: string, settings: Settings): Promise<Report> {
  const report: Report = {
    file: relative(file),
    passed: [],
    failed: [],
    skipped: [],
    notes: [],
    output: '',
    seconds: 0,
  }
  const started = performance.now()
  const underWay = new Set<string>()
  const stop = new AbortController()
  const limit = setTimeout(() => stop.abort(), settings.limitS * 1000)
  let isSummarised = false

  const stream = run({
    files: [file],
    cwd: ROOT,
    signal: stop.signal,
    ...(settings.grep === undefined ? {} : { testNamePatterns: settings.grep }),
  })
  stream.on('test:dequeue', (event) => underWay.add(event.name))
  stream.on('test:complete', (event) => underWay.delete(event.name))
  stream.on('test:stdout', (event) => (report.output += event.message))
  stream.on('test:stderr', (event) => (report.output += event.message))
  stream.on('test:diagnostic', (event) => {
    // The runner's own statistics come this way too, but belong to no file.
    if (event.file !== undefined) report.notes.push(event.message)
  })
  stream.on('test:pass', (event) => {
    // The file itself is reported as a test when it holds none.
    if (event.details.type === 'suite' || event.name === file) return
    if (event.skip === undefined || event.skip === false) report.passed.push(event.name)
    else report.skipped.push({ name: event.name, detail: String(event.skip) })
  })
  stream.on('test:fail', (event) => {
    const error = event.details.error as Error & { failureType?: string; exitCode?: number | null; signal?: string }
    if (error.failureType === 'subtestsFailed') return
    if (event.name !== file) report.failed.push({ name: event.name, detail: textOf(error) })
    else if (!stop.signal.aborted) report.failed.push({ name: 'the file itself', detail: endOf(error) })
  })
  stream.on('test:summary', (event) => {
    // The file's own, which its process sends when all its tests are done; another without a file closes the run.
    if (event.file !== undefined) isSummarised = true
  })
  for await (const _event of stream);
  clearTimeout(limit)

  report.seconds = (performance.now() - started) / 1000
  underWay.delete(file)
  const wrong = wrongOfFile(report, settings, isSummarised, stop.signal.aborted, [...underWay])
  if (wrong !== undefined) report.failed.push({ name: 'the file itself', detail: wrong })
  return report
}

/** What is wrong with the file as a whole, though no single test says so. */
function wrongOfFile(
  report: Report,
  settings: Settings,
  isSummarised: boolean,
  isStopped: boolean,
  underWay: readonly string[],
): string | undefined {
  const isNoneFound = report.passed.length + report.skipped.length === 0
  if (isStopped && underWay.length > 0) return `stopped after ${settings.limitS} s, during: ${underWay.join('; ')}`
  if (isStopped && isNoneFound) return `stopped after ${settings.limitS} s, before its first test`
  if (isStopped) return `stopped after ${settings.limitS} s: its tests are done, but something left open keeps it alive`
  if (report.failed.length > 0) return undefined
  if (isNoneFound && settings.grep === undefined) return 'ran no test: it holds none, or it left the process early'
  if (!isNoneFound && !isSummarised) return 'left the process before all its tests were done'
  return undefined
}

/** The error with its stack, less the frames of Node itself. */
function textOf(error: Error): string {
  const cause = error.cause
  const text = cause instanceof Error ? (cause.stack ?? cause.message) : inspect(cause ?? error.message)
  return text.replaceAll(/^ +at .*\(?node:internal\/.*\n?/gm, '')
}

function endOf(error: { message: string; exitCode?: number | null; signal?: string }): string {
  if (typeof error.exitCode === 'number') return `exit status ${error.exitCode}; its output has the reason`
  return error.signal === undefined ? error.message : `killed by ${error.signal}`
}

function print(report: Report, settings: Settings): void {
  const { file, passed, failed, skipped } = report
  const lines: string[] = []
  if (settings.verbose) for (const name of passed) lines.push(`ok      ${name}`)
  const skips = skipped.length === 0 ? '' : `, ${skipped.length} skipped`
  const fails = failed.length === 0 ? '' : `, ${failed.length} failed`
  if (failed.length > 0 || settings.verbose) lines.push(...indent(report.output))
  for (const test of failed) lines.push(`FAIL    ${test.name}`, ...indent(test.detail))
  if (failed.length > 0) lines.push(...indent(report.notes.join('\n')))
  const isNothing = passed.length + failed.length + skipped.length === 0
  if (!isNothing) {
    const verdict = failed.length > 0 ? 'FAIL' : 'ok  '
    lines.push(`${verdict}  ${file}: ${passed.length} passed${fails}${skips} (${report.seconds.toFixed(1)} s)`)
  }
  for (const line of lines) console.log(line)
}

function indent(text: string): string[] {
  const trimmed = text.trimEnd()
  return trimmed === '' ? [] : trimmed.split('\n').map((line) => `        ${line}`)
}

/** Runs the files, `jobs` at a time, and prints each as it ends. */
async function runAll(settings: Settings): Promise<Report[]> {
  const waiting = [...settings.files]
  const reports: Report[] = []
  const work = async (): Promise<void> => {
    for (let file = waiting.shift(); file !== undefined; file = waiting.shift()) {
      const report = await runFile(file, settings)
      reports.push(report)
      print(report, settings)
    }
  }
  await Promise.all(Array.from({ length: Math.ceil(settings.jobs) }, work))
  return reports
}

/** Prints what the run came to; true when it is good. */
function conclude(reports: readonly Report[]): boolean {
  for (const { file, skipped } of reports)
    for (const test of skipped) console.log(`skip  ${file}: ${test.name}: ${test.detail}`)
  for (const { file, failed } of reports) for (const test of failed) console.log(`FAIL  ${file}: ${test.name}`)

  const sum = (count: (report: Report) => number): number => reports.reduce((all, report) => all + count(report), 0)
  const passed = sum((report) => report.passed.length)
  const failed = sum((report) => report.failed.length)
  const skipped = sum((report) => report.skipped.length)
  const isSkipWrong = skipped > 0 && process.env['CI'] !== undefined
  if (isSkipWrong) console.log('Under CI every test runs: install what the skipped ones miss.')
  if (passed + failed + skipped === 0) console.log('No test ran.')
  console.log(`${passed} passed, ${failed} failed${skipped > 0 ? `, ${skipped} skipped` : ''}`)
  return failed === 0 && passed > 0 && !isSkipWrong
}

async function main(): Promise<number> {
  let settings: Settings
  try {
    settings = readSettings(process.argv.slice(2))
  } catch (error) {
    console.error(`${(error as Error).message}\n${USAGE}`)
    return 2
  }
  if (settings.list) {
    for (const file of settings.files) console.log(relative(file))
    return 0
  }
  return conclude(await runAll(settings)) ? 0 : 1
}

process.exitCode = await main()
