// One source file as tidy sees it: parsed, with what it imports, its comments and the spots that rules ask for. It judges
// nothing. Parsing is oxc's, since TypeScript 7 offers no compiler API.

import path from 'node:path'
import { parseSync } from 'oxc-parser'

interface Node {
  readonly type: string
  readonly start: number
  readonly end: number
  readonly [key: string]: unknown
}

/** Something found in the file, at a line from 1. */
export interface Spot {
  readonly line: number
  readonly text: string
}

export interface Import extends Spot {
  /** A file of the project, `text` its path from the root; else a package or a module of Node, as written. */
  readonly isLocal: boolean
}

export interface Comment extends Spot {
  readonly kind: 'line' | 'block'
}

export interface SourceFile {
  /** From the root, with slashes: "src/nbd/server.ts". */
  readonly path: string
  readonly lines: readonly string[]
  /** Why it could not be parsed; nothing below is known then. */
  readonly errors: readonly Spot[]
  /** Neighbouring `//` lines are one comment. Without the comment marks. */
  readonly comments: readonly Comment[]
  /** What is imported, types too; `text` is "?" when it is computed. */
  readonly imports: readonly Import[]
  /** Uses of the type `any`. */
  readonly anys: readonly Spot[]
  /** Tests narrowed to themselves by `.only(` or `only: true`. */
  readonly onlys: readonly Spot[]
  /** Names of tests that are written out, a template's holes as "${}". */
  readonly testNames: readonly Spot[]
}

/** Parses `text` as the file at `file`, a path from the root with slashes. */
export function readSource(file: string, text: string): SourceFile {
  const parsed = parseSync(file, text)
  const lineStarts = [0]
  for (let at = text.indexOf('\n'); at >= 0; at = text.indexOf('\n', at + 1)) lineStarts.push(at + 1)
  const lineAt = (offset: number): number => lineStarts.findLastIndex((start) => start <= offset) + 1

  const imports: Import[] = []
  const anys: Spot[] = []
  const onlys: Spot[] = []
  const testNames: Spot[] = []
  const spot = (node: Node, what: string): Spot => ({ line: lineAt(node.start), text: what })
  walk(parsed.program as unknown as Node, (node) => {
    const imported = importOf(node)
    if (imported !== undefined) {
      const isLocal = imported.startsWith('.')
      const place = isLocal ? path.posix.join(path.posix.dirname(file), imported) : imported
      imports.push({ ...spot(node, place), isLocal })
    }
    if (node.type === 'TSAnyKeyword') anys.push(spot(node, 'any'))
    if (isOnly(node)) onlys.push(spot(node, 'only'))
    const name = testNameOf(node)
    if (name !== undefined) testNames.push(spot(node, name))
  })

  return {
    path: file,
    lines: text.split('\n'),
    errors: parsed.errors.map((error) => ({ line: lineAt(error.labels[0]?.start ?? 0), text: error.message })),
    comments: joinComments(
      parsed.comments.map((comment) => ({ ...comment, line: lineAt(comment.start) })),
      text,
    ),
    imports,
    anys,
    onlys,
    testNames,
  }
}

function isNode(value: unknown): value is Node {
  return typeof value === 'object' && value !== null && typeof (value as Node).type === 'string'
}

function walk(node: Node, visit: (node: Node) => void): void {
  visit(node)
  for (const value of Object.values(node)) {
    for (const child of Array.isArray(value) ? (value as unknown[]) : [value]) if (isNode(child)) walk(child, visit)
  }
}

/** The text of a string literal; a template's holes become "${}". Undefined for anything else. */
function textOf(node: unknown): string | undefined {
  if (!isNode(node)) return undefined
  if (node.type === 'Literal' && typeof node['value'] === 'string') return node['value']
  if (node.type !== 'TemplateLiteral') return undefined
  return (node['quasis'] as { value: { raw: string } }[]).map((quasi) => quasi.value.raw).join('${}')
}

const IMPORTING = new Set([
  'ImportDeclaration',
  'ExportAllDeclaration',
  'ExportNamedDeclaration',
  'ImportExpression',
  'TSImportType',
])

/** What a node imports. A worker's file is an import too: new URL('./worker.ts', import.meta.url). */
function importOf(node: Node): string | undefined {
  if (IMPORTING.has(node.type)) {
    if (!isNode(node['source'])) return undefined
    const text = textOf(node['source'])
    return text === undefined || text.includes('${}') ? '?' : text
  }
  if (node.type !== 'NewExpression' || nameOf(node['callee']) !== 'URL') return undefined
  const [place, base] = node['arguments'] as Node[]
  const isOfModule = base?.type === 'MemberExpression' && nameOf(base['property']) === 'url'
  // The place may depend on being built: condition ? './worker.ts' : './worker.js'.
  const text = textOf(place?.type === 'ConditionalExpression' ? place['consequent'] : place)
  return isOfModule && text?.endsWith('.ts') === true ? text : undefined
}

/** The name of an identifier, or of the last member of `a.b.c`. */
function nameOf(node: unknown): string | undefined {
  if (!isNode(node)) return undefined
  return node.type === 'MemberExpression' ? nameOf(node['property']) : (node['name'] as string | undefined)
}

function isOnly(node: Node): boolean {
  if (node.type === 'Property') return nameOf(node['key']) === 'only' && (node['value'] as Node)['value'] === true
  if (node.type !== 'CallExpression') return false
  const callee = node['callee'] as Node
  return callee.type === 'MemberExpression' && nameOf(callee['property']) === 'only'
}

const TESTERS = new Set(['test', 'it'])

/** `test('a name', ...)`, `t.test('a name', ...)` or `test.skip('a name', ...)`. */
function testNameOf(node: Node): string | undefined {
  if (node.type !== 'CallExpression') return undefined
  const callee = node['callee'] as Node
  const isTest =
    TESTERS.has(nameOf(callee) ?? '') ||
    (callee.type === 'MemberExpression' && TESTERS.has(nameOf(callee['object']) ?? ''))
  const [name, ...rest] = node['arguments'] as Node[]
  // With one argument it is a regular expression's test() and the like.
  return isTest && rest.length > 0 ? textOf(name) : undefined
}

interface RawComment {
  readonly type: 'Line' | 'Block'
  readonly value: string
  readonly start: number
  readonly end: number
  readonly line: number
}

function joinComments(raw: readonly RawComment[], text: string): Comment[] {
  const joined: { kind: 'line' | 'block'; line: number; text: string; end: number }[] = []
  for (const comment of raw) {
    const last = joined.at(-1)
    const isNeighbour = last?.kind === 'line' && /^\s*$/.test(text.slice(last.end, comment.start))
    const isWholeLine = text.slice(text.lastIndexOf('\n', comment.start) + 1, comment.start).trim() === ''
    const isBlankBetween = last !== undefined && text.slice(last.end, comment.start).split('\n').length > 2
    if (comment.type === 'Line' && isNeighbour && isWholeLine && !isBlankBetween) {
      last.text += `\n${comment.value}`
      last.end = comment.end
    } else {
      const kind = comment.type === 'Line' ? 'line' : 'block'
      joined.push({ kind, line: comment.line, text: comment.value, end: comment.end })
    }
  }
  return joined
}

/** True when the text parses as statements and cannot be prose: a declaration, an import, a call of a member, ... */
export function isCode(text: string): boolean {
  for (const wrapped of [text, `async function wrap() {\n${text}\n}`]) {
    const parsed = parseSync('comment.ts', wrapped)
    if (parsed.errors.length > 0) continue
    const body = parsed.program.body as unknown as Node[]
    const inner = wrapped === text ? body : (((body[0] as Node)['body'] as Node)['body'] as Node[])
    return inner.some(isCodeStatement)
  }
  return false
}

const NOT_PROSE = new Set([
  'VariableDeclaration',
  'ImportDeclaration',
  'ExportNamedDeclaration',
  'FunctionDeclaration',
  'ClassDeclaration',
  'IfStatement',
  'ForStatement',
  'ForOfStatement',
  'WhileStatement',
  'TryStatement',
])

function isCodeStatement(statement: Node): boolean {
  if (NOT_PROSE.has(statement.type)) return true
  if (statement.type === 'ReturnStatement' || statement.type === 'ThrowStatement') {
    return isNode(statement['argument']) && statement['argument'].type !== 'Identifier'
  }
  if (statement.type !== 'ExpressionStatement') return false
  let expression = statement['expression'] as Node
  if (expression.type === 'AwaitExpression') expression = expression['argument'] as Node
  if (expression.type === 'CallExpression') return (expression['callee'] as Node).type === 'MemberExpression'
  return expression.type === 'AssignmentExpression' && (expression['left'] as Node).type === 'MemberExpression'
}
