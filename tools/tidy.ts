// Holds the house's map and its manners: which room may import which, and how a file reads. A broken rule is a line
// `file:line: rule: what is wrong. Why the rule is there.` and exit status 1. What the compiler, the linter and the
// formatter already see is not repeated here.
//
//   node tools/tidy.ts
//
// A new room is a line in ROOMS. A new exception is a line in the `only` of RESERVED, with its reason beside it.

import fs from 'node:fs'
import { isBuiltin } from 'node:module'
import path from 'node:path'
import { type Import, isCode, readSource, type SourceFile, type Spot } from './source-file.ts'

interface Room {
  /** A file imports its own room and rooms of lower rank; rooms of one rank never meet. */
  readonly rank: number
  /** What never changes about it. */
  readonly invariant: string
}

/** Folders under src. The longest name that fits is a file's room. */
export const ROOMS: Readonly<Record<string, Room>> = {
  base: { rank: 0, invariant: 'base knows bytes, clocks and limits, and nothing of disks' },
  block: { rank: 1, invariant: 'block is the contract of a device and opens nothing' },
  bitmap: { rank: 2, invariant: 'a bitmap is a set in memory; who keeps it durable is not its affair' },
  host: { rank: 2, invariant: 'host is the operating system behind an interface, and knows no format' },
  file: { rank: 3, invariant: 'file makes a host file a device, whatever its content' },
  format: { rank: 4, invariant: 'a format is given its file and never opens a path' },
  'format/raw': { rank: 4, invariant: 'a format is given its file and never opens a path' },
  'format/qcow2': { rank: 4, invariant: 'a format is given its file and never opens a path' },
  filter: { rank: 4, invariant: 'a filter knows one device below it and nothing else' },
  nbd: { rank: 4, invariant: 'nbd serves any device and knows no format, chain or job' },
  dirtylog: { rank: 4, invariant: 'the dirty log is given its files and knows no disk' },
  repository: { rank: 4, invariant: 'a repository stores chunks and knows neither disks nor guests' },
  chain: { rank: 5, invariant: 'a chain makes layers one disk and starts no long work' },
  image: { rank: 6, invariant: 'image tools work on image files that no daemon serves' },
  guest: { rank: 6, invariant: 'guest has guests hold still and go on, and knows no disk' },
  source: { rank: 6, invariant: 'a source answers what changed, for disks that others own' },
  job: { rank: 7, invariant: 'a job is given devices and bitmaps and knows no names' },
  engine: { rank: 8, invariant: 'engine alone owns machines, disks, exports, jobs and repositories' },
  shard: { rank: 9, invariant: 'shard puts engines into threads, and knows no data path' },
  api: { rank: 10, invariant: 'api translates between HTTP and the engine, and decides nothing' },
  daemon: { rank: 11, invariant: 'daemon wires a process and knows no data path' },
  cli: { rank: 12, invariant: 'cli asks and prints' },
}

/** src/index.ts, which shows the public parts of all rooms. */
const INDEX = 'src/index.ts'
const INDEX_RANK = 13

/** Third-party packages may be imported from this rank upward. */
const PACKAGES_FROM = 'api'

interface Reserved {
  /** What is imported. */
  readonly what: RegExp
  /** Who may: files, or folders with a slash at the end. */
  readonly only: readonly string[]
  readonly reason: string
}

const RESERVED: readonly Reserved[] = [
  {
    what: /^src\/host\/syscalls\.ts$/,
    only: ['src/host/real.ts', 'src/host/real-file.ts', 'src/host/claims.ts', 'src/host/spare-memory.ts'],
    reason: 'Whoever uses a system call has a plain way without it, beside it',
  },
  {
    what: /^(node:)?fs(\/promises)?$/,
    only: [
      'src/host/real.ts',
      'src/host/real-file.ts',
      'src/host/direct-file.ts',
      'src/host/io-ring.ts',
      'src/host/holders.ts', // who has a file open, in /proc
      'src/nbd/server.ts', // the mode of a listening socket's file
      'src/api/', // likewise, and its token
      'src/daemon/', // configuration, before there is a host
      'src/cli/', // files that the user names
    ],
    reason: 'Files go through Host, so that a simulated host can crash them',
  },
  {
    what: /^(node:)?module$/,
    only: ['src/host/koffi.ts'],
    reason: 'createRequire hides imports from these rules',
  },
]

/** Files that import nothing but these. */
const MODEST: Readonly<Record<string, { readonly only: readonly string[]; readonly reason: string }>> = {
  'src/api/schema.ts': {
    only: [
      'zod',
      'src/api/shapes.ts',
      'src/api/host-routes.ts',
      'src/api/view-routes.ts',
      'src/api/vm-routes.ts',
      'src/api/bitmap-shapes.ts',
    ],
    reason: 'Server, client, command line and dashboard all import it',
  },
  'src/api/shapes.ts': { only: ['zod'], reason: 'schema.ts, which is to stay light, imports it' },
  'src/api/host-routes.ts': {
    only: ['zod', 'src/api/shapes.ts'],
    reason: 'schema.ts, which is to stay light, imports it',
  },
  'src/api/view-routes.ts': {
    only: ['zod', 'src/api/shapes.ts'],
    reason: 'schema.ts, which is to stay light, imports it',
  },
  'src/api/vm-routes.ts': {
    only: ['zod', 'src/api/shapes.ts'],
    reason: 'schema.ts, which is to stay light, imports it',
  },
  'src/api/bitmap-shapes.ts': {
    only: ['zod', 'src/api/shapes.ts'],
    reason: 'schema.ts, which is to stay light, imports it',
  },
}

export const MAX_LINES = 500

export interface Finding extends Spot {
  readonly path: string
  readonly rule: string
  readonly reason: string
}

interface Rule {
  readonly name: string
  readonly reason: string
  /** The reason may be given with the spot, where it depends on it. */
  find(file: SourceFile): Iterable<Spot & { readonly reason?: string }>
}

const isTest = (file: string): boolean => file.endsWith('.test.ts') || file.startsWith('test/')
const isProduct = (file: string): boolean => file.startsWith('src/') && !isTest(file)
const isPackage = (imported: Import): boolean => !imported.isLocal && imported.text !== '?' && !isBuiltin(imported.text)

function roomOf(file: string): string | undefined {
  const folder = path.posix.dirname(file).replace(/^src\/?/, '')
  const names = Object.keys(ROOMS).filter((name) => folder === name || folder.startsWith(`${name}/`))
  return names.sort((a, b) => b.length - a.length)[0]
}

function rankOf(file: string): number {
  return file === INDEX ? INDEX_RANK : (ROOMS[roomOf(file) ?? '']?.rank ?? Number.NaN)
}

function* brokenRooms(file: SourceFile): Iterable<Spot & { reason: string }> {
  if (!isProduct(file.path)) return
  const own = roomOf(file.path)
  const rank = rankOf(file.path)
  if (Number.isNaN(rank)) {
    yield { line: 1, text: `${file.path} is in no room`, reason: 'A room has a rank and an invariant in tools/tidy.ts' }
    return
  }
  for (const { line, text, isLocal } of file.imports) {
    if (!isLocal || !text.startsWith('src/') || (own !== undefined && roomOf(text) === own)) continue
    const other = roomOf(text) ?? text
    if (rankOf(text) < rank) continue
    const reason = `Imports go down only: ${ROOMS[own ?? '']?.invariant ?? 'nothing imports the index'}`
    yield { line, text: `${own ?? file.path} (${rank}) imports ${other} (${rankOf(text)})`, reason }
  }
}

function* brokenReserves(file: SourceFile): Iterable<Spot & { reason: string }> {
  if (!isProduct(file.path)) return
  for (const { line, text } of file.imports) {
    for (const { what, only, reason } of RESERVED) {
      const isAllowed = only.some((place) => (place.endsWith('/') ? file.path.startsWith(place) : file.path === place))
      if (what.test(text) && !isAllowed) yield { line, text: `only ${only.join(', ')} may import ${text}`, reason }
    }
    const modest = MODEST[file.path]
    if (modest !== undefined && !modest.only.includes(text)) {
      yield {
        line,
        text: `${file.path} imports ${text}, and may import ${modest.only.join(', ')} only`,
        reason: modest.reason,
      }
    }
  }
}

function* where(lines: readonly string[], pattern: RegExp, says: string): Iterable<Spot> {
  for (const [index, line] of lines.entries()) if (pattern.test(line)) yield { line: index + 1, text: says }
}

/** Rules over parsed TypeScript and JavaScript. */
export const RULES: readonly Rule[] = [
  {
    name: 'parse',
    reason: 'What cannot be parsed cannot be judged',
    find: (file) => file.errors,
  },
  { name: 'rooms', reason: '', find: brokenRooms },
  { name: 'reserved', reason: '', find: brokenReserves },
  {
    name: 'packages',
    reason: `Rooms below ${PACKAGES_FROM} stand on Node alone: few dependencies, and none in the data path`,
    *find(file) {
      if (!isProduct(file.path) || rankOf(file.path) >= (ROOMS[PACKAGES_FROM]?.rank ?? 0)) return
      for (const one of file.imports) if (isPackage(one)) yield { line: one.line, text: `imports ${one.text}` }
    },
  },
  {
    name: 'outside',
    reason: 'The package holds src alone; the dashboard shares only the routes and their types with it',
    *find(file) {
      for (const { line, text, isLocal } of file.imports) {
        const isOfProduct = isProduct(file.path) && isLocal && !/^(src\/|package\.json$)/.test(text)
        const isOfWeb = file.path.startsWith('web/') && /^src\/(?!api\/schema\.ts$)/.test(text)
        if (isOfProduct || isOfWeb) yield { line, text: `imports ${text}` }
      }
    },
  },
  {
    name: 'computed import',
    reason: 'An import that is computed hides from these rules',
    *find(file) {
      if (!isProduct(file.path)) return
      for (const { line, text } of file.imports)
        if (text === '?') yield { line, text: 'the place of this import is computed' }
    },
  },
  {
    name: 'opening',
    reason: 'A stranger learns from the first paragraph what the file is for, and what it does not do',
    *find(file) {
      const needsOne = /^(src|tools|bench|test)\//.test(file.path) && !file.path.endsWith('.test.ts')
      if (needsOne && file.lines[0]?.startsWith('//') !== true && file.lines[0]?.startsWith('#!') !== true)
        yield { line: 1, text: 'the first line is no comment' }
    },
  },
  {
    name: 'length',
    reason: 'A file is one idea that fits in a head',
    *find(file) {
      const count = file.lines.at(-1) === '' ? file.lines.length - 1 : file.lines.length
      if (count > MAX_LINES) yield { line: MAX_LINES + 1, text: `${count} lines, and ${MAX_LINES} is the most` }
    },
  },
  {
    name: 'name',
    reason: 'One spelling for all file names',
    *find(file) {
      const name = path.posix.basename(file.path)
      const pattern = file.path.startsWith('web/') ? /^[A-Za-z0-9.-]+$/ : /^[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+)+$/
      if (!pattern.test(name)) yield { line: 1, text: `${name} is not kebab-case` }
    },
  },
  {
    name: 'notes',
    reason: 'Do it, or open an issue: a note in the code is read by nobody who would do it',
    *find(file) {
      for (const comment of file.comments)
        for (const spot of where(comment.text.split('\n'), /\b(?:T[O]DO|FIX[M]E|X{3})\b/, 'a note to do it later'))
          yield { line: comment.line + spot.line - 1, text: spot.text }
    },
  },
  {
    name: 'silenced',
    reason: 'A silenced compiler or linter hides the next mistake too',
    *find(file) {
      const pattern = /@ts-(?:ignore|expect-error|nocheck)|(?:oxlint|eslint)-disable|biome-ignore/
      for (const comment of file.comments)
        for (const spot of where(comment.text.split('\n'), pattern, 'a check is switched off'))
          yield { line: comment.line + spot.line - 1, text: spot.text }
      for (const { line } of file.anys) yield { line, text: 'the type any' }
    },
  },
  {
    name: 'dead code',
    reason: 'History keeps what was: code in a comment is neither run nor read',
    *find(file) {
      for (const comment of file.comments) {
        // Inside a comment, lines that stand in by three spaces are a picture or an example.
        const lines = comment.text.split('\n').filter((line) => !/^ {3}/.test(line))
        const isDead = comment.kind === 'line' && [comment.text, ...lines].some(isCode)
        if (isDead) yield { line: comment.line, text: 'code in a comment' }
      }
    },
  },
  {
    name: 'only',
    reason: 'It hides every other test of the file',
    *find(file) {
      if (!isTest(file.path)) return
      for (const { line } of file.onlys) yield { line, text: 'a test narrowed to itself' }
    },
  },
  {
    name: 'sentence',
    reason: 'The names of the tests are the specification: a word is no sentence',
    *find(file) {
      for (const { line, text } of file.testNames)
        if (!text.includes(' ')) yield { line, text: `"${text}" is no sentence` }
    },
  },
]

interface Banned {
  readonly what: RegExp
  readonly says: string
  readonly within: RegExp
}

/** Words that no text file may hold, documents included. */
const BANNED: readonly Banned[] = [
  { what: /(?<![\w.~-])\/work\//, says: 'a path of one machine', within: /./ },
  { what: /(?<![\w.~-])\/tmp\//, says: 'a fixed temporary folder', within: /^src\// },
]
const BANNED_REASON = 'It is right on one machine only, and two runs meet there'

/** What is wrong with the files, given as path from the root and text. */
export function tidy(files: ReadonlyMap<string, string>): Finding[] {
  const findings: Finding[] = []
  for (const [file, text] of files) {
    for (const { what, says, within } of BANNED) {
      if (!within.test(file)) continue
      for (const spot of where(text.split('\n'), what, says))
        findings.push({ ...spot, path: file, rule: 'paths', reason: BANNED_REASON })
    }
    if (!/\.(ts|tsx|js)$/.test(file)) continue
    const source = readSource(file, text)
    for (const rule of RULES)
      for (const spot of rule.find(source)) findings.push({ reason: rule.reason, ...spot, path: file, rule: rule.name })
  }
  return findings
}

export function toLine(finding: Finding): string {
  return `${finding.path}:${finding.line}: ${finding.rule}: ${finding.text}. ${finding.reason}.`
}

const FOLDERS = ['src', 'test', 'tools', 'bench', 'web', 'bin', 'docs', '.ci']
const TEXT = /(\.(ts|tsx|js|md|json|sh|css|html|yaml|yml)|^run)$/
const MADE = /(^|\/)(node_modules|dist|golden|results)(\/|$)/

/** The project's text files, without what programs made. */
export function readTree(root: string): Map<string, string> {
  const found = new Map<string, string>()
  const add = (file: string): void => {
    const name = path.relative(root, file).replaceAll(path.sep, '/')
    if (TEXT.test(path.basename(file)) && !MADE.test(name) && name !== 'package-lock.json')
      found.set(name, fs.readFileSync(file, 'utf8'))
  }
  for (const entry of fs.readdirSync(root, { withFileTypes: true }))
    if (entry.isFile()) add(path.join(root, entry.name))
  for (const folder of FOLDERS) {
    if (!fs.existsSync(path.join(root, folder))) continue
    for (const entry of fs.readdirSync(path.join(root, folder), { recursive: true, withFileTypes: true }))
      if (entry.isFile()) add(path.join(entry.parentPath, entry.name))
  }
  return found
}

if (import.meta.main) {
  const files = readTree(path.resolve(import.meta.dirname, '..'))
  const findings = tidy(files)
  for (const finding of findings) console.log(toLine(finding))
  console.log(`${files.size} files, ${findings.length === 0 ? 'all tidy' : `${findings.length} not tidy`}`)
  process.exitCode = findings.length === 0 && files.size > 0 ? 0 : 1
}
