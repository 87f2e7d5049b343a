import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { test } from 'node:test'
import { tempFolder } from '../test/support/temp.ts'
import { readTree, ROOMS, RULES, tidy, toLine } from './tidy.ts'

const ROOT = path.resolve(import.meta.dirname, '..')

test('the tree is tidy', () => {
  const files = readTree(ROOT)
  assert.ok(files.has('src/base/assert.ts') && files.has('tools/tidy.ts'), 'the tree is read')
  assert.deepEqual(tidy(files).map(toLine), [])
})

test('every folder of src is a room, and every room that others stand on is there', () => {
  const folders = fs.readdirSync(path.join(ROOT, 'src'), { withFileTypes: true }).filter((entry) => entry.isDirectory())
  for (const { name } of folders) assert.ok(name in ROOMS, `src/${name} has no line in ROOMS`)
  for (const room of ['base', 'block', 'bitmap', 'host']) assert.ok(fs.existsSync(path.join(ROOT, 'src', room)), room)
})

/** The rules that the text breaks as a file at the path. */
function broken(file: string, text: string): string[] {
  return tidy(new Map([[file, text]])).map((finding) => finding.rule)
}

interface Sample {
  readonly rule: string
  readonly says: string
  readonly file: string
  readonly bad: string
  /** The same thought within the rule. */
  readonly good: string
  readonly goodFile?: string
}

const from = (place: string): string => `// A sample.\nimport { a } from '${place}'\nexport const b = a\n`

// Put together here, so that this file is tidy itself.
const ELSEWHERE = ['', 'work', 'main'].join('/')
const FIXED = ['', 'tmp', 'x'].join('/')

const SAMPLES: readonly Sample[] = [
  { rule: 'parse', says: 'does not parse', file: 'src/base/a.ts', bad: '// A.\nconst = 1', good: '// A.\n' },
  {
    rule: 'rooms',
    says: 'imports a room above its own',
    file: 'src/block/a.ts',
    bad: from('../chain/disk.ts'),
    good: from('../base/bytes.ts'),
  },
  {
    rule: 'rooms',
    says: 'imports a room of its own rank',
    file: 'src/nbd/a.ts',
    bad: from('../format/qcow2/image.ts'),
    good: from('./server.ts'),
  },
  {
    rule: 'rooms',
    says: 'imports the other format',
    file: 'src/format/raw/a.ts',
    bad: from('../qcow2/spec.ts'),
    good: from('./raw.ts'),
  },
  {
    rule: 'rooms',
    says: 'imports a room above for its types only',
    file: 'src/job/a.ts',
    bad: `// A.\nexport type A = import('../engine/engine.ts').Engine\n`,
    good: `// A.\nexport type A = import('../chain/disk.ts').Disk\n`,
  },
  {
    rule: 'rooms',
    says: 'passes on a room above',
    file: 'src/file/a.ts',
    bad: `// A.\nexport * from '../job/job.ts'\n`,
    good: `// A.\nexport * from '../host/host.ts'\n`,
  },
  {
    rule: 'rooms',
    says: 'starts a worker of a room above',
    file: 'src/repository/a.ts',
    bad: `// A.\nexport const a = new URL('../engine/shard.ts', import.meta.url)\n`,
    good: `// A.\nexport const a = new URL('./hash-worker.ts', import.meta.url)\n`,
  },
  {
    rule: 'rooms',
    says: 'lies in no room',
    file: 'src/attic/a.ts',
    bad: '// A.\n',
    good: '// A.\n',
    goodFile: 'src/cli/a.ts',
  },
  {
    rule: 'rooms',
    says: 'imports the index',
    file: 'src/cli/a.ts',
    bad: from('../index.ts'),
    good: from('../api/client.ts'),
  },
  {
    rule: 'reserved',
    says: 'makes system calls',
    file: 'src/file/a.ts',
    bad: from('../host/syscalls.ts'),
    good: from('../host/syscalls.ts'),
    goodFile: 'src/host/real.ts',
  },
  {
    rule: 'reserved',
    says: 'opens files',
    file: 'src/chain/a.ts',
    bad: from('node:fs/promises'),
    good: from('../host/host.ts'),
  },
  { rule: 'reserved', says: 'requires', file: 'src/engine/a.ts', bad: from('node:module'), good: from('node:path') },
  {
    rule: 'reserved',
    says: 'burdens the schema',
    file: 'src/api/schema.ts',
    bad: from('../block/error.ts'),
    good: from('zod'),
  },
  {
    rule: 'packages',
    says: 'imports a package below api',
    file: 'src/engine/a.ts',
    bad: from('pino'),
    good: from('pino'),
    goodFile: 'src/daemon/a.ts',
  },
  {
    rule: 'outside',
    says: 'imports a test',
    file: 'src/nbd/a.ts',
    bad: from('../../test/support/temp.ts'),
    good: from('./b.ts'),
  },
  {
    rule: 'outside',
    says: 'takes more of the daemon into the dashboard',
    file: 'web/a.ts',
    bad: from('../src/engine/engine.ts'),
    good: from('../src/api/schema.ts'),
  },
  {
    rule: 'computed import',
    says: 'computes what it imports',
    file: 'src/cli/a.ts',
    bad: '// A.\nawait import(`./${process.argv[2]}.ts`)\n',
    good: `// A.\nawait import('./serve.ts')\n`,
  },
  {
    rule: 'opening',
    says: 'opens without a word',
    file: 'src/base/a.ts',
    bad: 'export const a = 1\n',
    good: '// A.\n',
  },
  {
    rule: 'length',
    says: 'is too long',
    file: 'tools/a.ts',
    bad: `// A.${'\n'.repeat(501)}`,
    good: `// A.${'\n'.repeat(500)}`,
  },
  {
    rule: 'name',
    says: 'has a name in camel case',
    file: 'src/base/aB.ts',
    bad: '// A.\n',
    good: '// A.\n',
    goodFile: 'src/base/a-b.ts',
  },
  {
    rule: 'notes',
    says: 'leaves a note',
    file: 'src/base/a.ts',
    bad: `// A.\n\n// ${'TO'}${'DO'}: later\n`,
    good: '// A.\n\n// The to-do bitmap.\n',
  },
  {
    rule: 'silenced',
    says: 'silences the compiler',
    file: 'src/base/a.ts',
    bad: `// A.\n\n// @ts-${'ignore'}\nexport const a = 1\n`,
    good: '// A.\n\n// The compiler agrees.\nexport const a = 1\n',
  },
  {
    rule: 'silenced',
    says: 'casts to any',
    file: 'src/base/a.ts',
    bad: '// A.\nexport const a = 1 as any\n',
    good: `// A.\nexport const a = 'as any'\n`,
  },
  {
    rule: 'dead code',
    says: 'keeps a declaration in a comment',
    file: 'src/base/a.ts',
    bad: '// A.\n\n// Faster:\n// const size = this.size * 2\n',
    good: '// A.\n\n// return early when the cache is hot\n//   const device = new MemoryDevice(4096)\n',
  },
  {
    rule: 'dead code',
    says: 'keeps statements in a comment',
    file: 'src/base/a.ts',
    bad: '// A.\n\n// if (a) {\n//   b.close()\n// }\n',
    good: '// A.\n\n// L1 -> L2 -> cluster\n// if it is closed (twice), nothing happens\n',
  },
  {
    rule: 'only',
    says: 'runs one test only',
    file: 'src/base/a.test.ts',
    bad: `test.only('a b', () => {})\n`,
    good: `test('a b', () => {})\n`,
  },
  {
    rule: 'only',
    says: 'runs one test only by an option',
    file: 'test/model/a.test.ts',
    bad: `// A.\ntest('a b', { only: true }, () => {})\n`,
    good: `// A.\ntest('a b', { timeout: 10 }, () => {})\n`,
  },
  {
    rule: 'sentence',
    says: 'names a test by a word',
    file: 'src/base/a.test.ts',
    bad: `test('works', () => {})\n`,
    good: 'test(`${name} works at the end of the device`, () => {})\n',
  },
  {
    rule: 'paths',
    says: 'names a folder of one machine',
    file: 'docs/a.md',
    bad: `See ${ELSEWHERE}.\n`,
    good: 'See src/work/main.\n',
  },
  {
    rule: 'paths',
    says: 'names a fixed temporary file',
    file: 'src/cli/a.ts',
    bad: `// A.\nexport const a = '${FIXED}'\n`,
    good: `// A.\nexport const a = 'x'\n`,
  },
]

for (const { rule, says, file, bad, good, goodFile } of SAMPLES) {
  test(`tidy finds a file that ${says}, and leaves its neighbour alone`, () => {
    assert.ok(broken(file, bad).includes(rule), `${rule} in ${broken(file, bad).join()}`)
    assert.deepEqual(broken(goodFile ?? file, good), [])
  })
}

test('every rule has a sample that breaks it', () => {
  const shown = new Set(SAMPLES.map((sample) => sample.rule))
  assert.deepEqual(
    RULES.map((rule) => rule.name).filter((name) => !shown.has(name)),
    [],
  )
})

test('a finding says where, which rule, what and why', () => {
  const [finding] = tidy(new Map([['src/nbd/a.ts', from('../filter/delay.ts')]]))
  assert.ok(finding !== undefined)
  assert.equal(
    toLine(finding),
    'src/nbd/a.ts:2: rooms: nbd (4) imports filter (4). Imports go down only: ' +
      'nbd serves any device and knows no format, chain or job.',
  )
})

test('the tree leaves out what programs made', (t) => {
  const root = tempFolder(t)
  for (const file of [
    'src/a.ts',
    'dist/a.js',
    'node_modules/a/a.js',
    'test/golden/a.json',
    'web/dist/a.js',
    'README.md',
  ]) {
    fs.mkdirSync(path.dirname(path.join(root, file)), { recursive: true })
    fs.writeFileSync(path.join(root, file), '')
  }
  assert.deepEqual([...readTree(root).keys()].sort(), ['README.md', 'src/a.ts'])
})
