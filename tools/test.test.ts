import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { tempFolder } from '../test/support/temp.ts'

interface Run {
  readonly status: number | null
  readonly text: string
  readonly last: string | undefined
}

/** Runs tools/test.ts over one small test file. */
function runOver(t: TestContext, source: string, options: readonly string[] = [], isCi = false): Run {
  const file = path.join(tempFolder(t), 'sample.test.ts')
  fs.writeFileSync(file, `import { test } from 'node:test'\n${source}\n`)
  const { NODE_TEST_CONTEXT: _, CI: __, ...env } = process.env
  const runner = path.join(import.meta.dirname, 'test.ts')
  const result = spawnSync(process.execPath, [runner, ...options, file], {
    encoding: 'utf8',
    env: isCi ? { ...env, CI: 'true' } : env,
  })
  const text = result.stdout + result.stderr
  return { status: result.status, text, last: text.trimEnd().split('\n').at(-1) }
}

test('the runner counts passed tests and ends well', (t) => {
  const run = runOver(t, `test('one is one', () => {}); test('two is two', () => {})`)
  assert.equal(run.status, 0, run.text)
  assert.equal(run.last, '2 passed, 0 failed')
})

test('the runner shows a failed test with its reason, its output and its seed', (t) => {
  const run = runOver(
    t,
    `test('it is broken', (t) => { t.diagnostic('VARVE_SEED=7'); console.log('a clue'); throw new Error('boom') })
     test('it is whole', () => {})`,
  )
  assert.equal(run.status, 1)
  for (const part of ['FAIL    it is broken', 'Error: boom', 'VARVE_SEED=7', 'a clue']) {
    assert.ok(run.text.includes(part), `${part} in:\n${run.text}`)
  }
  assert.equal(run.last, '1 passed, 1 failed')
})

const BROKEN_FILES: readonly [sentence: string, source: string, said: RegExp][] = [
  ['holds no test', `export {}`, /ran no test/],
  ['throws while it loads', `throw new Error('at the top')`, /at the top[^]*exit status 1/],
  ['is killed', `test('a b', () => { process.kill(process.pid, 'SIGKILL') })`, /killed by SIGKILL/],
  ['leaves in its first test', `test('a b', () => process.exit(0)); test('c d', () => {})`, /ran no test/],
  [
    'leaves in a later test',
    `test('a b', () => {}); test('c d', () => new Promise(() => setTimeout(() => process.exit(0), 300)))`,
    /left the process before all its tests were done/,
  ],
  ['hangs', `test('waits for ever', () => new Promise(() => setInterval(() => {}, 1000)))`, /during: waits for ever/],
  ['never ends after its tests', `test('a b', () => { setInterval(() => {}, 1000) })`, /something left open/],
  ['has a test marked as to do', `test('a b', { todo: true }, () => { throw new Error('not yet') })`, /not yet/],
]

for (const [sentence, source, said] of BROKEN_FILES) {
  test(`a test file that ${sentence} fails the run by its name`, (t) => {
    const run = runOver(t, source, ['--timeout', '2'])
    assert.equal(run.status, 1, run.text)
    assert.match(run.text, said)
    assert.match(run.text, /^FAIL {2}\S*sample\.test\.ts: /m)
    assert.match(run.last ?? '', /^[01] passed, 1 failed$/)
  })
}

test('a skipped test is named with its reason, and fails the run only under CI', (t) => {
  const source = `test('one is one', () => {}); test('needs a peer', { skip: 'peer not installed' }, () => {})`
  const run = runOver(t, source)
  assert.equal(run.status, 0, run.text)
  assert.match(run.text, /^skip .*needs a peer: peer not installed$/m)
  assert.equal(run.last, '1 passed, 0 failed, 1 skipped')
  assert.equal(runOver(t, source, [], true).status, 1)
})

test('--grep runs only the tests whose name matches, and fails when none does', (t) => {
  const source = `test('one is one', () => {}); test('two is broken', () => { throw new Error('boom') })`
  assert.equal(runOver(t, source, ['--grep', 'is one']).last, '1 passed, 0 failed')
  assert.equal(runOver(t, source, ['--grep', 'no such name']).status, 1)
})

test('an unknown option and a missing file are usage errors', (t) => {
  assert.equal(runOver(t, '', ['--no-such-option']).status, 2)
  const run = runOver(t, '', [path.join(tempFolder(t), 'missing.test.ts')])
  assert.equal(run.status, 2)
  assert.match(run.text, /missing\.test\.ts does not exist/)
})
