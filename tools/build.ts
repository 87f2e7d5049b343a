// Builds dist/, which is what the package ships: JavaScript and declarations of src, without its tests, by the compiler.
// The compiler rewrites `./x.ts` in imports; a worker's file is named by a URL instead, which is rewritten here.
//
//   node tools/build.ts [FOLDER]      into FOLDER instead of dist
//
// A source that does not compile builds nothing.

import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'

const ROOT = path.resolve(import.meta.dirname, '..')

/** `new URL('./x.ts', import.meta.url)` as it must be where x.ts has become x.js. */
export function rewriteUrls(code: string): string {
  return code.replaceAll(/(new URL\(\s*(['"])\.{1,2}\/[^'"]+)\.ts(\2,\s*import\.meta\.url\s*\))/g, '$1.js$3')
}

/** Compiles `root` into `target`, an absolute path. Returns what the compiler said, or undefined when it was content. */
export function build(root: string, target: string): string | undefined {
  fs.rmSync(target, { recursive: true, force: true })
  const compiler = path.join(ROOT, 'node_modules', 'typescript', 'bin', 'tsc')
  const project = path.join(root, 'tsconfig.build.json')
  const result = spawnSync(process.execPath, [compiler, '--project', project, '--outDir', target], { encoding: 'utf8' })
  if (result.status !== 0) return `${result.stdout}${result.stderr}`
  for (const entry of fs.readdirSync(target, { recursive: true, withFileTypes: true })) {
    if (!entry.isFile() || !entry.name.endsWith('.js')) continue
    const file = path.join(entry.parentPath, entry.name)
    const code = fs.readFileSync(file, 'utf8')
    const rewritten = rewriteUrls(code)
    if (rewritten !== code) fs.writeFileSync(file, rewritten)
  }
  return undefined
}

if (import.meta.main) {
  const complaint = build(ROOT, path.resolve(ROOT, process.argv[2] ?? 'dist'))
  if (complaint !== undefined) console.error(complaint)
  process.exitCode = complaint === undefined ? 0 : 1
}
