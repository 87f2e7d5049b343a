// The package as a user gets it: packed, installed in an empty folder, run by this Node and by older ones.

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { after, before, test } from 'node:test'
import { type Outcome, peer, runPeer } from '../support/peer.ts'

const ROOT = path.resolve(import.meta.dirname, '..', '..')
const COMPILER = path.join(ROOT, 'node_modules', 'typescript', 'bin', 'tsc')

let folder = ''
let packed: string[] = []

before(() => {
  folder = fs.mkdtempSync(path.join(process.env['VARVE_TEST_DIR'] ?? os.tmpdir(), 'varve-package-'))
  fs.writeFileSync(path.join(folder, 'package.json'), '{ "name": "user", "private": true, "type": "module" }\n')
  const said = peer('npm', 'pack', ROOT, '--pack-destination', folder, '--json', '--silent')
  const [tarball] = JSON.parse(said) as { filename: string; files: { path: string }[] }[]
  assert.ok(tarball !== undefined)
  packed = tarball.files.map((file) => file.path)
  const options = ['--no-audit', '--no-fund', '--prefer-offline', '--no-package-lock', '--prefix', folder]
  peer('npm', 'install', ...options, path.join(folder, tarball.filename))
})

after(() => fs.rmSync(folder, { recursive: true, force: true }))

const command = (): string => fs.realpathSync(path.join(folder, 'node_modules', '.bin', 'varve'))

function runFile(name: string, text: string): Outcome {
  fs.writeFileSync(path.join(folder, name), text)
  return runPeer(process.execPath, [path.join(folder, name)])
}

test('the package holds the command, the built sources and the licence, and no tests and no sources', () => {
  for (const file of ['bin/varve.js', 'dist/main.js', 'dist/index.js', 'dist/src/index.d.ts', 'LICENSE'])
    assert.ok(packed.includes(file), `${file} is packed`)
  assert.deepEqual(
    packed.filter((file) => /\.test\.|^(src|test|tools|bench)\//.test(file)),
    [],
  )
})

test('the installed command says its version', () => {
  const { status, stdout, stderr } = runPeer(process.execPath, [command(), '--version'])
  assert.deepEqual({ status, stdout, stderr }, { status: 0, stdout: '0.1.0\n', stderr: '' })
})

test('the installed command knows its commands and refuses others', () => {
  const help = runPeer(process.execPath, [command(), '--help'])
  assert.equal(help.status, 0, help.stderr)
  assert.match(help.stdout, /^ +serve /m)
  assert.equal(runPeer(process.execPath, [command(), 'no-such-command']).status, 2)
})

test('the installed package is a library', () => {
  const said = runFile(
    'user.js',
    `import { BlockError, guard, MemoryDevice } from 'varve'
     const device = guard(new MemoryDevice(4096))
     device.write(0, 2, Buffer.from('hi'), 0, 0)
     try { device.read(4096, 1, Buffer.alloc(1), 0) } catch (error) { console.log(error instanceof BlockError, error.kind) }`,
  )
  assert.equal(said.stdout, 'true out-of-range\n', said.stderr)
})

test('the installed package has types that a program compiles against, and that refuse what is wrong', () => {
  const compile = (text: string): Outcome => {
    fs.writeFileSync(path.join(folder, 'user.ts'), text)
    const options = ['--ignoreConfig', '--noEmit', '--strict', '--module', 'nodenext', '--target', 'es2024']
    return runPeer(process.execPath, [COMPILER, ...options, path.join(folder, 'user.ts')])
  }
  const right = compile(
    `import { type BlockDevice, type ErrorKind, MemoryDevice } from 'varve'
     export const device: BlockDevice = new MemoryDevice(4096)
     export const kind: ErrorKind = 'io'\n`,
  )
  assert.equal(right.status, 0, right.stdout)
  const wrong = compile(`import type { ErrorKind } from 'varve'\nexport const kind: ErrorKind = 'no such kind'\n`)
  assert.match(wrong.stdout, /user\.ts.*error TS2322/)
})

/** Node programs on the path, outside the project, that are too old for Varve. */
function olderNodes(): string[] {
  const folders = (process.env['PATH'] ?? '').split(path.delimiter).filter((place) => !place.includes('node_modules'))
  const programs = folders.map((place) => path.join(place, 'node')).filter((program) => fs.existsSync(program))
  return programs.filter((program) => {
    const version = spawnSync(program, ['--version'], { encoding: 'utf8' }).stdout
    return Number(/^v(\d+)/.exec(version)?.[1]) < 24
  })
}

test('an older Node gets one line with the Node that is needed and the one that was found', () => {
  // One always pretends to be older, since the machine may have no other Node.
  const pretender = path.join(folder, 'pretend.cjs')
  fs.writeFileSync(pretender, `Object.defineProperty(process, 'versions', { value: { node: '24.14.1' } })`)
  const runs = [
    { program: process.execPath, options: ['--require', pretender], version: '24.14.1' },
    ...olderNodes().map((program) => ({ program, options: [], version: peer(program, '--version').slice(1).trim() })),
  ]
  for (const { program, options, version } of runs) {
    const { status, stdout, stderr } = runPeer(program, [...options, command(), '--version'])
    assert.deepEqual({ status, stdout }, { status: 1, stdout: '' })
    assert.match(stderr, new RegExp(`^varve needs Node 24\\.15 or newer; this is Node ${version} \\(.*\\)\\n$`))
  }
})
