import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { tempFolder } from '../test/support/temp.ts'

const ROOT = path.resolve(import.meta.dirname, '..')
const SETTINGS = ['tsconfig.json', '.oxlintrc.json', 'biome.json', 'knip.json', '.gitignore']

const PACKAGE = { name: 'small', type: 'module', private: true, scripts: { ok: 'node tools/ok.ts' } }

/** Runs the checks over one source, by this project's settings. */
function check(t: TestContext, source: string): { status: number | null; said: string } {
  const root = tempFolder(t)
  fs.mkdirSync(path.join(root, 'src', 'base'), { recursive: true })
  fs.mkdirSync(path.join(root, 'tools'))
  for (const name of SETTINGS) fs.copyFileSync(path.join(ROOT, name), path.join(root, name))
  for (const name of ['ok.ts', 'tidy.ts', 'source-file.ts'])
    fs.copyFileSync(path.join(ROOT, 'tools', name), path.join(root, 'tools', name))
  fs.symlinkSync(path.join(ROOT, 'node_modules'), path.join(root, 'node_modules'))
  // Without a list of dependencies knip has none to find unused.
  fs.writeFileSync(path.join(root, 'package.json'), `${JSON.stringify(PACKAGE, undefined, 2)}\n`)
  fs.writeFileSync(path.join(root, 'src', 'base', 'sample.ts'), source)
  const result = spawnSync(process.execPath, [path.join(root, 'tools', 'ok.ts'), '--no-tests'], { encoding: 'utf8' })
  return { status: result.status, said: result.stdout + result.stderr }
}

test('one call shows every check that fails, and none hides the next', (t) => {
  const { status, said } = check(t, 'export const a: number = "no number"\nPromise.reject(new Error())\n')
  assert.equal(status, 1)
  for (const name of ['tidy', 'types', 'lint', 'format', 'unused'])
    assert.match(said, new RegExp(`^FAIL {2}${name} `, 'm'))
  assert.match(said, /^Not ok: tidy, types, lint, format, unused$/m)
})

test('the lint finds a promise that nobody awaits, also one that may be undefined', (t) => {
  const { said } = check(
    t,
    `// A.

type Pending = Promise<void> | undefined

export function start(work: () => Promise<void>, flush: () => Pending): void {
  work()
  flush()
}
`,
  )
  assert.match(said, /^FAIL {2}lint/m)
  assert.match(said, /no-floating-promises[^]*sample\.ts:6[^]*no-floating-promises[^]*sample\.ts:7/)
  for (const name of ['tidy', 'types', 'format']) assert.match(said, new RegExp(`^ok {4}${name} `, 'm'))
})
