import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { Worker } from 'node:worker_threads'
import { tempFolder } from '../../test/support/temp.ts'
import { DIRECT_PIECE, DIRECT_PIECES } from '../base/limits.ts'
import { Random, seedOfRun } from '../base/random.ts'
import { CACHE_MODES, warningOf, withCacheMode } from './cache-mode.ts'
import type { HostFile } from './host.ts'
import { realHost } from './real.ts'
import { SimulatedHost } from './simulated.ts'
import { syscalls } from './syscalls.ts'

const KIB = 1024
const MIB = 1024 * KIB
const PAGE = 4 * KIB

const noLocks = syscalls === undefined && 'no locks without system calls'

async function newFile(t: TestContext, content: Uint8Array): Promise<{ path: string; file: HostFile }> {
  const name = path.join(tempFolder(t), 'file')
  fs.writeFileSync(name, content)
  const file = await realHost.open(name, { write: true, direct: true })
  t.after(() => file.close())
  return { path: name, file }
}

test('ranges with and without whole pages, long and short, are written side by side and read back', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const model = Buffer.alloc(4 * MIB + 777)
  const { path: name, file } = await newFile(t, model)
  for (let round = 0; round < 40; round++) {
    const cuts = new Set([0, model.length])
    for (let i = 0; i < 12; i++) {
      const at = random.below(model.length)
      cuts.add(random.chance(0.7) ? at - (at % PAGE) : at)
    }
    const ordered = [...cuts].sort((a, b) => a - b)
    const data = random.fill(Buffer.alloc(model.length + 5))
    const pending = ordered.slice(1).map((end, index) => {
      const start = ordered[index] as number
      if (random.chance(0.2)) {
        model.fill(0, start, end)
        return random.chance(0.5) ? file.zero(start, end - start) : file.punch(start, end - start)
      }
      model.set(data.subarray(start + 5, end + 5), start)
      return file.write(start, end - start, data, start + 5)
    })
    await Promise.all(pending)
    const into = Buffer.alloc(model.length + 3 + 2 * PAGE, 0xee)
    const reads = ordered.slice(1).map((end, index) => {
      const start = ordered[index] as number
      return file.read(start, end - start, into, start + 3)
    })
    await Promise.all(reads)
    assert.ok(into.subarray(3, model.length + 3).equals(model), `round ${round}`)
  }
  await file.sync()
  assert.ok(fs.readFileSync(name).equals(model), 'so it reads through the page cache')
})

test('what lies past the end of the file reads as zeros', async (t) => {
  const { file } = await newFile(t, Buffer.alloc(3 * PAGE + 100, 7))
  const into = Buffer.alloc(6 * PAGE, 0xee)
  await file.read(2 * PAGE, 4 * PAGE, into, 0)
  assert.ok(into.subarray(0, PAGE + 100).every((byte) => byte === 7))
  assert.ok(into.subarray(PAGE + 100, 4 * PAGE).every((byte) => byte === 0))
  assert.ok(into.subarray(4 * PAGE).every((byte) => byte === 0xee))
  await file.read(8 * PAGE, PAGE, into, 0)
  assert.ok(into.subarray(0, PAGE).every((byte) => byte === 0))
})

test('of a page that is written whole and in part at once, no byte keeps what was there before', async (t) => {
  const { file } = await newFile(t, Buffer.alloc(64 * PAGE))
  const [whole, part] = [Buffer.alloc(PAGE, 1), Buffer.alloc(100, 2)]
  const into = Buffer.alloc(PAGE)
  for (let page = 0; page < 64; page++) {
    const at = page * PAGE
    const first = page % 2 === 0 ? file.write(at, PAGE, whole, 0) : file.write(at + 500, 100, part, 0)
    const second = page % 2 === 0 ? file.write(at + 500, 100, part, 0) : file.write(at, PAGE, whole, 0)
    await Promise.all([first, second])
    await file.sync()
    await file.read(at, PAGE, into, 0)
    const isRight = into.every((byte, i) => byte === 1 || (byte === 2 && i >= 500 && i < 600))
    assert.ok(isRight, `page ${page}`)
  }
})

test('more at once than there are buffers waits in line', async (t) => {
  const length = DIRECT_PIECE * (DIRECT_PIECES + 20)
  const { file } = await newFile(t, Buffer.alloc(0))
  const from = new Random(7).fill(Buffer.alloc(length))
  await file.write(0, length, from, 0)
  const into = Buffer.alloc(length)
  await file.read(0, length, into, 0)
  assert.ok(into.equals(from))
})

test('requests under way when the file is closed are finished first; later ones fail', async (t) => {
  const { path: name, file } = await newFile(t, Buffer.alloc(MIB))
  const data = Buffer.alloc(MIB, 9)
  const write = file.write(0, MIB, data, 0)
  const closed = file.close()
  await assert.rejects(async () => file.write(0, PAGE, data, 0), { kind: 'closed' })
  await assert.rejects(async () => file.read(0, PAGE, data, 0), { kind: 'closed' })
  await assert.rejects(async () => file.zero(0, PAGE), { kind: 'closed' })
  await Promise.all([write, closed])
  assert.ok(fs.readFileSync(name).equals(Buffer.alloc(MIB, 9)))
})

test('a claim refuses and is refused as that of any other file', { skip: noLocks }, async (t) => {
  const { path: name, file } = await newFile(t, Buffer.alloc(PAGE))
  file.lock('write')
  await assert.rejects(realHost.open(name, { lock: 'read' }), { kind: 'busy' })
  file.lock('read')
  const reader = await realHost.open(name, { lock: 'read' })
  t.after(() => reader.close())
  assert.throws(() => file.lock('write'), { kind: 'busy' })
  await file.close()
  assert.throws(() => file.lock('read'), { kind: 'closed' })
  reader.lock('write')
})

test('a buffer that is too short fails the request, and the next ones are made', async (t) => {
  const { file } = await newFile(t, Buffer.alloc(4 * PAGE, 6))
  for (let i = 0; i < DIRECT_PIECES + 1; i++)
    await assert.rejects(async () => file.write(0, PAGE, Buffer.alloc(PAGE - 1), 0))
  const into = Buffer.alloc(PAGE)
  await file.read(0, PAGE, into, 0)
  assert.ok(into.every((byte) => byte === 6))
})

test('a failure says where it happened', async (t) => {
  const { path: name } = await newFile(t, Buffer.alloc(4 * PAGE))
  const file = await realHost.open(name, { direct: true })
  t.after(() => file.close())
  // Opened for reading only: the kernel refuses.
  await assert.rejects(async () => file.write(PAGE, PAGE, Buffer.alloc(PAGE), 0), {
    name: 'BlockError',
    message: new RegExp(`^${name}: write: bad file descriptor`),
    place: { path: name, offset: PAGE, length: PAGE },
  })
})

test('a thread that dies with requests under way ends, and another one goes on with the file', async (t) => {
  const { path: name, file } = await newFile(t, Buffer.alloc(MIB, 3))
  const url = new URL('./real.ts', import.meta.url).href
  const code = `import('${url}').then(async ({ realHost }) => {
    const file = await realHost.open(${JSON.stringify(name)}, { write: true, direct: true })
    for (let i = 0; i < 100; i++) void file.read(i * 4096, 8192, Buffer.alloc(8192), 0)
    await file.write(0, 4096, Buffer.alloc(4096, 4), 0)
    throw new Error('dies')
  })`
  const worker = new Worker(code, { eval: true })
  const exit = new Promise((resolve) => worker.once('exit', resolve))
  await assert.rejects(new Promise((_resolve, reject) => worker.once('error', reject)), /dies/)
  await exit
  const into = Buffer.alloc(2 * PAGE)
  await file.read(0, 2 * PAGE, into, 0)
  assert.ok(into.equals(Buffer.concat([Buffer.alloc(PAGE, 4), Buffer.alloc(PAGE, 3)])))
})

test('a file system that cannot do it is named, with the way out', async () => {
  await assert.rejects(realHost.open('/proc/version', { direct: true }), {
    kind: 'unsupported',
    message: /^\/proc\/version: .*O_DIRECT.*--cache writeback$/,
  })
})

test('with unsafe a file is synced when it is closed and not before, which is said aloud', async () => {
  const simulated = new SimulatedHost()
  const host = withCacheMode(simulated, 'unsafe')
  const file = await host.open('/image', { write: true, create: 'exclusive' })
  await host.syncFolder('/')
  await file.write(0, 3, Buffer.from('abc'), 0)
  await file.sync()
  const crashed = simulated.clone()
  crashed.crash('none')
  assert.equal((await crashed.status('/image'))?.size, 0)
  await file.close()
  simulated.crash('none')
  assert.equal((await simulated.status('/image'))?.size, 3)
  assert.deepEqual(
    CACHE_MODES.filter((mode) => warningOf(mode) !== undefined),
    ['unsafe'],
  )
})
