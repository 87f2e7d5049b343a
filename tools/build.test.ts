import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { tempFolder } from '../test/support/temp.ts'
import { build, rewriteUrls } from './build.ts'

const ROOT = path.resolve(import.meta.dirname, '..')

/** A small project that builds by this project's settings. */
function project(t: TestContext, files: Readonly<Record<string, string>>): string {
  const root = tempFolder(t)
  for (const name of ['tsconfig.json', 'tsconfig.build.json', 'package.json'])
    fs.copyFileSync(path.join(ROOT, name), path.join(root, name))
  fs.symlinkSync(path.join(ROOT, 'node_modules'), path.join(root, 'node_modules'))
  for (const [name, text] of Object.entries(files)) {
    fs.mkdirSync(path.dirname(path.join(root, name)), { recursive: true })
    fs.writeFileSync(path.join(root, name), text)
  }
  return root
}

test('a build holds JavaScript that runs and declarations, with imports and workers of .js, and no tests', async (t) => {
  const root = project(t, {
    'src/a.ts': `import { b } from './deep/b.ts'
      export const a: string = b
      export const late = (): Promise<{ c: number }> => import('./deep/c.ts')
      export const worker = new URL('./deep/b.ts', import.meta.url)\n`,
    'src/deep/c.ts': `export const c = 3\n`,
    'src/deep/b.ts': `export const b = 'built'\n`,
    'src/a.test.ts': `export {}\n`,
  })
  const target = path.join(root, 'dist')
  assert.equal(await build(root, target, ['src/a.ts', 'src/deep/b.ts']), undefined)
  assert.deepEqual(fs.readdirSync(path.join(target, 'src')).sort(), ['a.d.ts', 'deep'])
  const built = (await import(path.join(target, 'a.js'))) as {
    a: string
    late: () => Promise<{ c: number }>
    worker: URL
  }
  assert.equal(built.a, 'built')
  assert.equal((await built.late()).c, 3)
  assert.ok(fs.existsSync(built.worker), built.worker.href)
})

test('a source that does not compile builds nothing and says why', async (t) => {
  const root = project(t, { 'src/a.ts': `export const a: number = 'no number'\n` })
  assert.match((await build(root, path.join(root, 'dist'), ['src/a.ts'])) ?? '', /src\/a\.ts.*TS2322/)
  assert.ok(!fs.existsSync(path.join(root, 'dist', 'a.js')))
})

test('an old build is gone before the new one', async (t) => {
  const root = project(t, { 'src/a.ts': 'export const a = 1\n', 'dist/src/old.js': '' })
  assert.equal(await build(root, path.join(root, 'dist'), ['src/a.ts']), undefined)
  assert.ok(!fs.existsSync(path.join(root, 'dist', 'src', 'old.js')))
})

test('only URLs of neighbouring sources are rewritten', () => {
  assert.equal(rewriteUrls(`new URL("../a.ts", import.meta.url)`), `new URL("./a.js", import.meta.url)`)
  const others = `new URL('a.ts', base); new URL('https://a.ts/', import.meta.url); './a.ts'`
  assert.equal(rewriteUrls(others), others)
})
