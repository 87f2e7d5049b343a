// What an open file of the real host promises beyond the device contract, which test/contract/format.test.ts has run over it.

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { missing } from '../../test/support/peer.ts'
import { tempFolder } from '../../test/support/temp.ts'
import { COPY_POOLED_MIN } from '../base/limits.ts'
import { Random, seedOfRun } from '../base/random.ts'
import { copyPool } from '../block/pool.ts'
import type { HostFile } from './host.ts'
import { realHost } from './real.ts'
import { syscalls } from './syscalls.ts'

const KIB = 1024
const MIB = 1024 * KIB

interface Fixture {
  readonly path: string
  readonly content: Buffer
  readonly file: HostFile
}

async function newFile(t: TestContext, size: number, background = false): Promise<Fixture> {
  const name = path.join(tempFolder(t), 'file')
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const content = Buffer.alloc(size)
  random.fill(content)
  fs.writeFileSync(name, content)
  const file = await realHost.open(name, { write: true, background })
  t.after(() => file.close())
  return { path: name, content, file }
}

for (const background of [false, true]) {
  test(`any range is read to any place of any buffer${background ? ', in the background' : ''}`, async (t) => {
    const size = 300_001
    const { content, file } = await newFile(t, size, background)
    const random = new Random(seedOfRun())
    const memory = new ArrayBuffer(2 * MIB)
    const buffers = [
      new Uint8Array(memory),
      new Uint8Array(memory, 12_345, MIB),
      Buffer.alloc(100),
      new Uint8Array(new SharedArrayBuffer(MIB)),
    ]
    for (let i = 0; i < 300; i++) {
      const into = random.pick(buffers)
      const length = random.below(Math.min(into.length, 200_000))
      const at = random.below(into.length - length)
      const offset = random.below(size + 1000)
      into.fill(0xee)
      const pending = file.read(offset, length, into, at)
      if (pending !== undefined) await pending
      const expected = Buffer.alloc(length)
      expected.set(content.subarray(offset, offset + length))
      assert.ok(Buffer.from(into.slice(at, at + length)).equals(expected), `${offset}+${length} at ${at}`)
      assert.ok(
        into.subarray(0, at).every((byte) => byte === 0xee) &&
          into.subarray(at + length).every((byte) => byte === 0xee),
      )
    }
  })
}

test('what does not fit the buffer is not read', async (t) => {
  const { file } = await newFile(t, 64 * KIB)
  await assert.rejects(async () => file.read(0, 4096, new Uint8Array(4096), 1))
  await assert.rejects(async () => file.read(0, 4096, new Uint8Array(100), 0))
  await assert.rejects(async () => file.read(0, 10, new Uint8Array(100), -1))
})

test('what is not in the page cache is read in the pool, and what is within the call', {
  skip: missing('dd'),
}, async (t) => {
  const { path: name, content, file } = await newFile(t, 4 * MIB)
  // Where files are in memory nothing ever leaves the cache, and without system calls nobody knows what is in it.
  if (syscalls === undefined || !isOnDisk(name)) return t.skip('needs system calls and a file system on a disk')
  await file.sync()
  assert.equal(spawnSync('dd', [`if=${name}`, 'iflag=nocache', 'count=0'], { stdio: 'ignore' }).status, 0)
  const into = Buffer.alloc(MIB)
  const first = file.read(MIB, MIB, into, 0)
  assert.notEqual(first, undefined)
  await first
  assert.ok(into.equals(content.subarray(MIB, 2 * MIB)))
  assert.equal(file.read(MIB, MIB, into.fill(0), 0), undefined)
  assert.ok(into.equals(content.subarray(MIB, 2 * MIB)))
})

function isOnDisk(name: string): boolean {
  return fs.statfsSync(name).type === 0xef53
}

test('requests under way when the file is closed are finished first; later ones fail', async (t) => {
  const { path: name, content, file } = await newFile(t, 4 * MIB, true)
  const into = Buffer.alloc(4 * MIB)
  const reads = Array.from({ length: 64 }, (_, i) => file.read(i * 64 * KIB, 64 * KIB, into, i * 64 * KIB))
  const write = file.write(4 * MIB, 3, Buffer.from('end'), 0)
  const syncs = [file.sync(), file.sync(), file.sync()]
  const closed = file.close()
  await assert.rejects(async () => file.read(0, 1, into, 0), { kind: 'closed' })
  await assert.rejects(async () => file.write(0, 1, into, 0), { kind: 'closed' })
  await assert.rejects(async () => file.sync(), { kind: 'closed' })
  assert.throws(() => file.size(), { kind: 'closed' })
  await closed
  await Promise.all([...reads, write, ...syncs])
  assert.ok(into.equals(content))
  assert.equal(
    fs
      .readFileSync(name)
      .subarray(4 * MIB)
      .toString(),
    'end',
  )
})

test('a failure says where it happened, in the call and in the pool', async (t) => {
  for (const background of [false, true]) {
    const { path: name } = await newFile(t, 64 * KIB)
    const file = await realHost.open(name, { background })
    // Opened for reading only: the kernel refuses.
    await assert.rejects(async () => file.write(4096, 512, Buffer.alloc(512), 0), {
      name: 'BlockError',
      message: new RegExp(`^${name}: write: `),
      place: { path: name, offset: 4096, length: 512 },
    })
    await file.close()
  }
})

test('holes and data are told as they are after every write, punch, zero and change of size', async (t) => {
  const { file } = await newFile(t, 64 * KIB)
  const told = (): string => {
    let extents = ''
    for (const from of [0, 20 * KIB]) {
      for (let at = from; at < 128 * KIB; at += 4 * KIB)
        void file.extents(at, 4 * KIB, (_, extent) => Boolean((extents += extent === 0 ? 'D' : '-')))
      extents += ' '
    }
    return extents
  }
  const shows = (expected: string): void => assert.equal(told(), `${expected} ${expected.slice(5)} `)
  if (syscalls === undefined) return t.skip('no system calls here')
  shows('D'.repeat(16) + '-'.repeat(16))
  await file.punch(16 * KIB, 8 * KIB)
  shows('DDDD--' + 'D'.repeat(10) + '-'.repeat(16))
  await file.write(112 * KIB, 4 * KIB, Buffer.alloc(4 * KIB, 1), 0)
  shows('DDDD--' + 'D'.repeat(10) + '-'.repeat(12) + 'D' + '-'.repeat(3))
  await file.punch(0, 4 * KIB)
  shows('-DDD--' + 'D'.repeat(10) + '-'.repeat(12) + 'D' + '-'.repeat(3))
  await file.truncate(32 * KIB)
  await file.truncate(128 * KIB)
  shows('-DDD--DD' + '-'.repeat(24))
})

test('what a job copies is read and written in the pool, even in memory', async (t) => {
  const { content, file } = await newFile(t, 2 * COPY_POOLED_MIN)
  const buffer = copyPool.take(COPY_POOLED_MIN)
  const read = file.read(0, COPY_POOLED_MIN, buffer, 0)
  assert.ok(read !== undefined)
  await read
  const written = file.write(COPY_POOLED_MIN, COPY_POOLED_MIN, buffer, 0)
  assert.ok(written !== undefined)
  await written
  assert.ok(fs.readFileSync(file.path).subarray(COPY_POOLED_MIN).equals(content.subarray(0, COPY_POOLED_MIN)))
  copyPool.give(buffer)
})
