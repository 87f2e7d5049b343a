// Builds dist/, which is what the package ships: declarations of src by the compiler, and its JavaScript joined into few files, since
// a command that loads two hundred takes twice as long to start. Tests are left out.
//
//   dist/main.js, index.js, ...    the entries, by name, all in one folder; a worker is found there by its URL
//   dist/NAME-HASH.js              what entries and commands share, or load when they need it
//   dist/src/.../*.d.ts            the declarations
//   dist/LICENSES                  of the packages that are joined in
//
//   node tools/build.ts [FOLDER]   into FOLDER instead of dist
//
// A source that does not compile builds nothing.

import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { rolldown } from 'rolldown'

const ROOT = path.resolve(import.meta.dirname, '..')

/** The command, the library and the workers' files. */
const ENTRIES: readonly string[] = [
  'src/cli/main.ts',
  'src/index.ts',
  'src/shard/shard-worker.ts',
  'src/repository/squeeze-worker.ts',
]

/** Packages of many small files that every command loads: joined too, which takes half of a command's start. Their licences come along. */
const JOINED_PACKAGES: readonly string[] = ['commander', 'zod']

/** Rooms that every command needs, and that need no package which is slow to load: one file. */
const SHARED = /\/src\/(base|block|bitmap|host|file|format|filter|chain|image|cli\/image)\//

/** `new URL('../x.ts', import.meta.url)` as it must be where x.ts has become the entry x.js. */
export function rewriteUrls(code: string): string {
  return code.replaceAll(
    /(new URL\(\s*(['"]))\.{1,2}\/(?:[^'"/]+\/)*([^'"/]+)\.ts(\2,\s*import\.meta\.url\s*\))/g,
    '$1./$3.js$4',
  )
}

/** Compiles `root` into `target`, an absolute path. Returns what the compiler said, or undefined when it was content. */
export async function build(root: string, target: string, entries = ENTRIES): Promise<string | undefined> {
  fs.rmSync(target, { recursive: true, force: true })
  const compiler = path.join(ROOT, 'node_modules', 'typescript', 'bin', 'tsc')
  const project = path.join(root, 'tsconfig.build.json')
  const result = spawnSync(process.execPath, [compiler, '--project', project, '--outDir', target], { encoding: 'utf8' })
  if (result.status !== 0) return `${result.stdout}${result.stderr}`
  await join(root, target, entries)
  return undefined
}

async function join(root: string, target: string, entries: readonly string[]): Promise<void> {
  const joined = await rolldown({
    cwd: root,
    platform: 'node',
    input: Object.fromEntries(entries.map((entry) => [path.basename(entry, '.ts'), path.join(root, entry)])),
    // Packages are installed beside this one.
    external: (id) => /^[^./]/.test(id) && !JOINED_PACKAGES.includes(id),
    // What is loaded late in the sources may be in the file that is loaded first.
    checks: { ineffectiveDynamicImport: false },
    plugins: [{ name: 'urls', renderChunk: rewriteUrls }],
  })
  await joined.write({
    dir: target,
    format: 'esm',
    entryFileNames: '[name].js',
    chunkFileNames: '[name]-[hash].js',
    codeSplitting: { groups: [{ name: 'shared', test: SHARED }] },
  })
  await joined.close()
  const licences = JOINED_PACKAGES.map((name) => {
    const text = fs.readFileSync(path.join(ROOT, 'node_modules', name, 'LICENSE'), 'utf8')
    return `${name}\n\n${text}`
  })
  fs.writeFileSync(path.join(target, 'LICENSES'), licences.join('\n'))
}

if (import.meta.main) {
  const complaint = await build(ROOT, path.resolve(ROOT, process.argv[2] ?? 'dist'))
  if (complaint !== undefined) console.error(complaint)
  process.exitCode = complaint === undefined ? 0 : 1
}
