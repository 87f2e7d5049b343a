// Is the tree fit to hand on? Runs every check and then the tests, with a line and a time for each. All checks run, so that
// one call shows all that is wrong; the tests start only when the checks pass. `.ci/run` does the same, step by step.
//
//   npm run ok                  checks and tests
//   npm run ok -- --no-tests    checks only

import { spawnSync } from 'node:child_process'
import path from 'node:path'
import { stripVTControlCharacters } from 'node:util'

const ROOT = path.resolve(import.meta.dirname, '..')

interface Step {
  readonly name: string
  /** A program and its arguments, as a person would type them. */
  readonly command: readonly [string, ...string[]]
  /** What to do about a failure. */
  readonly remedy: string
}

const CHECKS: readonly Step[] = [
  { name: 'tidy', command: ['node', 'tools/tidy.ts'], remedy: 'CONTRIBUTING.md explains each rule' },
  { name: 'types', command: ['tsc', '--project', '.'], remedy: 'see the compiler' },
  { name: 'lint', command: ['oxlint', '--type-aware', '--deny-warnings'], remedy: 'see the linter' },
  { name: 'format', command: ['biome', 'format', '.'], remedy: 'npm run format' },
  { name: 'unused', command: ['knip', '--treat-config-hints-as-errors'], remedy: 'remove what nothing uses' },
]

const TESTS: Step = { name: 'tests', command: ['node', 'tools/test.ts'], remedy: 'see the failures above' }

/** Programs of node_modules first, so that the Node of the project is found before that of the machine. */
const ENVIRONMENT = {
  ...process.env,
  PATH: `${path.join(ROOT, 'node_modules', '.bin')}${path.delimiter}${process.env['PATH'] ?? ''}`,
}

/** True when the step succeeds. A check speaks only when it fails; the tests speak as they go. */
function passes(step: Step, isQuiet: boolean): boolean {
  const [program, ...args] = step.command
  const started = performance.now()
  const result = spawnSync(program, args, {
    cwd: ROOT,
    env: ENVIRONMENT,
    encoding: 'utf8',
    stdio: ['ignore', isQuiet ? 'pipe' : 'inherit', isQuiet ? 'pipe' : 'inherit'],
    maxBuffer: 64 * 1024 * 1024,
  })
  const isOk = result.status === 0
  const seconds = ((performance.now() - started) / 1000).toFixed(1)
  if (isQuiet || !isOk) console.log(`${isOk ? 'ok  ' : 'FAIL'}  ${step.name.padEnd(8)} ${seconds} s`)
  if (isOk) return true
  // Some programs choose colours under CI even where nobody sees them.
  if (isQuiet) console.log(stripVTControlCharacters(`${result.stdout ?? ''}${result.stderr ?? ''}`).trimEnd())
  if (result.error !== undefined) console.log(`${program}: ${result.error.message}; run npm ci first`)
  console.log(`      ${step.command.join(' ')}: ${step.remedy}`)
  return false
}

const failed = CHECKS.filter((step) => !passes(step, true))
if (failed.length > 0) console.log(`Not ok: ${failed.map((step) => step.name).join(', ')}`)
else if (process.argv.includes('--no-tests')) console.log('The checks pass.')
else if (passes(TESTS, false)) console.log('All ok.')
else failed.push(TESTS)
process.exitCode = failed.length === 0 ? 0 : 1
