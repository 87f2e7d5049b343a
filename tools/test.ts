// Runs the tests: every *.test.ts under src and test, or the files and folders named. Prints each test's sentence, each failure
// whole, and closes with one line `N passed, N failed, N skipped`. A skipped test is named with its reason; under CI a
// skip fails the run, since a peer that should be there is missing.
//
//   npm test                          all
//   npm test -- src/bitmap test/crash some
//   npm test -- --list                the files only

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { run } from 'node:test'

const ROOT = path.resolve(import.meta.dirname, '..')
const LONGEST_MS = 45 * 60 * 1000

function testFiles(place: string): string[] {
  if (fs.statSync(place).isFile()) return [place]
  return fs
    .readdirSync(place, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && entry.name.endsWith('.test.ts'))
    .map((entry) => path.join(entry.parentPath, entry.name))
    .sort()
}

const names = process.argv.slice(2).filter((word) => !word.startsWith('--'))
const places =
  names.length > 0 ? names.map((name) => path.resolve(name)) : [path.join(ROOT, 'src'), path.join(ROOT, 'test')]
const files = places.flatMap(testFiles)
if (process.argv.includes('--list')) {
  for (const file of files) console.log(path.relative(ROOT, file))
  process.exit(0)
}

interface Found {
  readonly name: string
  readonly file: string
  readonly detail: string
}

const failed: Found[] = []
const skipped: Found[] = []
let passed = 0

const stream = run({ files, concurrency: Math.max(1, os.availableParallelism()), timeout: LONGEST_MS, cwd: ROOT })

stream.on('test:pass', (event) => {
  if (event.details.type === 'suite') return
  const file = path.relative(ROOT, event.file ?? '')
  if (event.skip !== undefined && event.skip !== false) {
    skipped.push({ name: event.name, file, detail: String(event.skip) })
    return
  }
  // A file is reported as a test of its own when it holds none: that is no test.
  if (event.name === event.file || event.name.endsWith('.test.ts')) return
  passed++
  console.log(`ok    ${file}: ${event.name} (${Math.round(event.details.duration_ms)} ms)`)
})

stream.on('test:fail', (event) => {
  const cause = event.details.error.cause
  const isOfChild = (event.details.error as { failureType?: string }).failureType === 'subtestsFailed'
  if (isOfChild) return
  const detail = cause instanceof Error ? (cause.stack ?? cause.message) : String(cause ?? event.details.error.message)
  const file = path.relative(ROOT, event.file ?? '')
  failed.push({ name: event.name, file, detail })
  console.log(`FAIL  ${file}: ${event.name}\n${detail.replaceAll(/^/gm, '      ')}`)
})

const output = new Set(['test:stdout', 'test:stderr'])
stream.on('data', (event: { type: string; data: { message?: string } }) => {
  if (output.has(event.type) && event.data.message !== undefined) process.stdout.write(event.data.message)
})

stream.on('end', () => {
  for (const test of skipped) console.log(`skip  ${test.file}: ${test.name}: ${test.detail}`)
  for (const test of failed) console.log(`FAIL  ${test.file}: ${test.name}`)
  const skippedInCi = process.env['CI'] !== undefined && skipped.length > 0
  if (skippedInCi) console.log('Under CI every test runs: install what the skipped ones miss.')
  if (passed + failed.length === 0) console.log('No test ran.')
  console.log(`${passed} passed, ${failed.length} failed${skipped.length > 0 ? `, ${skipped.length} skipped` : ''}`)
  process.exitCode = failed.length > 0 || passed === 0 || skippedInCi ? 1 : 0
})
