// Other people's NBD clients against our server. The programs run beside the test, not in its way: the server is in this
// process.

import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { promisify } from 'node:util'
import { Random } from '../../src/base/random.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { formatNbdUri } from '../../src/nbd/uri.ts'
import { serveDevice } from '../support/nbd.ts'
import { missing } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'

const MIB = 1024 * 1024
const run = promisify(execFile)

async function output(program: string, ...args: string[]): Promise<string> {
  return (await run(program, args, { timeout: 60_000, maxBuffer: 64 * MIB })).stdout
}

interface Setup {
  readonly memory: MemoryDevice
  readonly uri: string
  readonly folder: string
}

/** Serves 32 MiB: data in the 2nd, 3rd and 20th MiB, holes elsewhere. */
async function setUp(t: TestContext, place: 'unix' | 'tcp' = 'unix'): Promise<Setup> {
  const memory = new MemoryDevice(32 * MIB)
  const random = new Random(1)
  await memory.write(MIB, 2 * MIB, random.fill(Buffer.alloc(2 * MIB)), 0, 0)
  await memory.write(19 * MIB, MIB, random.fill(Buffer.alloc(MIB)), 0, 0)
  const { target } = await serveDevice(t, memory, { place, name: 'vm1', description: 'a test disk' })
  return { memory, uri: formatNbdUri(target), folder: tempFolder(t) }
}

const EXPECTED_MAP = [
  [0, MIB, 3],
  [MIB, 2 * MIB, 0],
  [3 * MIB, 16 * MIB, 3],
  [19 * MIB, MIB, 0],
  [20 * MIB, 12 * MIB, 3],
]

test('qemu-io writes, zeroes, discards, flushes and reads back', { skip: missing('qemu-io') }, async (t) => {
  const { memory, uri } = await setUp(t)
  const commands = [
    'write -P 7 1000 70000',
    'read -P 7 1000 70000',
    'write -f -P 8 2M 512k',
    'write -z -u 4M 1M',
    'write -z 5M 1M',
    'read -P 0 4M 2M',
    'discard 6M 1M',
    'flush',
    'aio_write -P 9 8M 1M',
    'aio_write -P 10 9M 1M',
    'aio_flush',
    'read -P 9 8M 1M',
    'read -P 10 9M 1M',
    'write -P 11 10M 20M',
    'read -P 11 10M 20M',
  ]
  const said = await output('qemu-io', '-f', 'raw', ...commands.flatMap((command) => ['-c', command]), uri)
  assert.ok(!said.includes('failed'), said)
  assert.ok(memory.bytes.subarray(10 * MIB, 30 * MIB).every((byte) => byte === 11))
  assert.ok(memory.bytes.subarray(1000, 71_000).every((byte) => byte === 7))
})

test('qemu-img sees the size and the map, and copies out and in', { skip: missing('qemu-img') }, async (t) => {
  const { memory, uri, folder } = await setUp(t)
  const info = JSON.parse(await output('qemu-img', 'info', '--output=json', uri)) as { 'virtual-size': number }
  assert.equal(info['virtual-size'], memory.size)
  const map = JSON.parse(await output('qemu-img', 'map', '--output=json', uri)) as {
    start: number
    length: number
    zero: boolean
  }[]
  assert.deepEqual(
    map.map(({ start, length, zero }) => [start, length, zero ? 3 : 0]),
    EXPECTED_MAP,
  )
  const copy = path.join(folder, 'copy.qcow2')
  await output('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', uri, copy)
  await output('qemu-img', 'compare', '-f', 'raw', '-F', 'qcow2', uri, copy)
  const other = await serveDevice(t, new MemoryDevice(32 * MIB))
  const target = formatNbdUri(other.target)
  await output('qemu-img', 'convert', '-n', '-f', 'qcow2', '-O', 'raw', copy, target)
  assert.ok(Buffer.from(memory.bytes).equals((other.served.device as MemoryDevice).bytes))
})

test('nbdinfo lists the export, its abilities and its map, on Unix and TCP', {
  skip: missing('nbdinfo'),
}, async (t) => {
  for (const place of ['unix', 'tcp'] as const) {
    const { memory, uri } = await setUp(t, place)
    const list = await output('nbdinfo', '--list', uri)
    for (const word of ['export="vm1"', 'a test disk', 'base:allocation', `${memory.size}`])
      assert.ok(list.includes(word), list)
    const info = JSON.parse(await output('nbdinfo', '--json', uri)) as { exports: Record<string, unknown>[] }
    const abilities = [
      'can_cache',
      'can_df',
      'can_fast_zero',
      'can_flush',
      'can_fua',
      'can_multi_conn',
      'can_trim',
      'can_zero',
    ]
    for (const ability of abilities) assert.equal(info.exports[0]?.[ability], true, ability)
    const map = JSON.parse(await output('nbdinfo', '--map', '--json', uri)) as Record<
      'offset' | 'length' | 'type',
      number
    >[]
    assert.deepEqual(
      map.map(({ offset, length, type }) => [offset, length, type]),
      EXPECTED_MAP,
    )
  }
})

test('nbdcopy copies out and in over several connections', { skip: missing('nbdcopy') }, async (t) => {
  const { memory, uri, folder } = await setUp(t)
  const file = path.join(folder, 'copy.raw')
  await output('nbdcopy', uri, file)
  assert.ok(fs.readFileSync(file).equals(memory.bytes))
  const other = await serveDevice(t, new MemoryDevice(32 * MIB))
  await output('nbdcopy', '--connections=4', '--flush', file, formatNbdUri(other.target))
  assert.ok(Buffer.from(memory.bytes).equals((other.served.device as MemoryDevice).bytes))
})

test('fio writes at random and verifies every block', { skip: missing('fio') }, async (t) => {
  const { uri, folder } = await setUp(t)
  const job = ['--ioengine=nbd', `--uri=${uri}`, '--rw=randrw', '--bsrange=4k-128k', '--iodepth=16', '--size=32m']
  const verify = ['--verify=crc32c', '--do_verify=1', '--verify_fatal=1', '--verify_backlog=64', '--io_size=64m']
  const said = await run('fio', ['--name=verify', ...job, ...verify, '--output-format=json'], { cwd: folder })
  const report = JSON.parse(said.stdout.slice(said.stdout.indexOf('{'))) as {
    jobs: { error: number; write: { total_ios: number } }[]
  }
  assert.equal(report.jobs[0]?.error, 0)
  assert.ok((report.jobs[0]?.write.total_ios ?? 0) > 100)
})
