// Other people's NBD programs against our server by every way that a client has: Unix and TCP, plain, with TLS by certificates and by
// keys.

import assert from 'node:assert/strict'
import { execFile, spawn } from 'node:child_process'
import fs from 'node:fs'
import net from 'node:net'
import path from 'node:path'
import { test } from 'node:test'
import { promisify } from 'node:util'
import { Random } from '../../src/base/random.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { connectNbd } from '../../src/nbd/client.ts'
import { NbdServer } from '../../src/nbd/server.ts'
import type { NbdUri } from '../../src/nbd/uri.ts'
import { missing } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'
import { isSecure, nbdkitTo, placeOf, qemuImage, reachedBy, secureBy, serveBy, verifyByFio, WAYS } from './nbd-ways.ts'

const MIB = 1024 * 1024
const SIZE = 8 * MIB
const run = promisify(execFile)

async function output(program: string, ...args: string[]): Promise<string> {
  return (await run(program, args, { timeout: 60_000, maxBuffer: 64 * MIB })).stdout
}

/** True when the program says yes by its exit status 0; false for 2, its no. */
async function says(program: string, ...args: string[]): Promise<boolean> {
  try {
    await output(program, ...args)
    return true
  } catch (error) {
    if ((error as { code?: unknown }).code === 2) return false
    throw error
  }
}

/** 8 MiB: noise in the second and third. */
async function makeDisk(): Promise<MemoryDevice> {
  const memory = new MemoryDevice(SIZE)
  await memory.write(MIB, 2 * MIB, new Random(1).fill(Buffer.alloc(2 * MIB)), 0, 0)
  return memory
}

for (const way of WAYS) {
  const needs = isSecure(way) ? ['openssl'] : []

  test(`nbdinfo: map, list, what it is and what it can, by ${way}`, {
    skip: missing('nbdinfo', ...needs),
  }, async (t) => {
    const { uri } = await serveBy(t, way, await makeDisk(), { name: 'vm1', description: 'a test disk' })
    const map = JSON.parse(await output('nbdinfo', '--map', '--json', uri)) as Record<string, number>[]
    assert.deepEqual(
      map.map(({ offset, length, type }) => [offset, length, type]),
      [
        [0, MIB, 3],
        [MIB, 2 * MIB, 0],
        [3 * MIB, 5 * MIB, 3],
      ],
    )
    const list = await output('nbdinfo', '--list', uri)
    for (const word of ['export="vm1"', 'a test disk', 'base:allocation']) assert.ok(list.includes(word), list)
    assert.equal(Number(await output('nbdinfo', '--size', uri)), SIZE)
    for (const ability of ['cache', 'df', 'fast-zero', 'flush', 'fua', 'multi-conn', 'trim', 'zero'])
      assert.ok(await says('nbdinfo', '--can', ability, uri), ability)
    assert.equal(await says('nbdinfo', '--is', 'read-only', uri), false)
    assert.equal(await says('nbdinfo', '--is', 'rotational', uri), false)
    assert.equal(await says('nbdinfo', '--is', 'tls', uri), isSecure(way))
    assert.equal(await says('nbdinfo', '--can', 'structured-reply', uri), true)
  })

  test(`nbdinfo: a read-only export is one, by ${way}`, { skip: missing('nbdinfo', ...needs) }, async (t) => {
    const { uri } = await serveBy(t, way, await makeDisk(), { readOnly: true })
    assert.ok(await says('nbdinfo', '--is', 'read-only', uri))
    for (const ability of ['write', 'trim', 'zero']) assert.equal(await says('nbdinfo', '--can', ability, uri), false)
  })

  test(`nbdcopy: out and in, on several connections, by ${way}`, { skip: missing('nbdcopy', ...needs) }, async (t) => {
    const memory = await makeDisk()
    const { uri } = await serveBy(t, way, memory)
    const file = path.join(tempFolder(t), 'copy.raw')
    await output('nbdcopy', '--connections=4', uri, file)
    assert.ok(fs.readFileSync(file).equals(memory.bytes))
    const other = new MemoryDevice(SIZE)
    const { uri: target } = await serveBy(t, way, other)
    await output('nbdcopy', '--connections=4', '--flush', '--destination-is-zero', file, target)
    assert.ok(Buffer.from(other.bytes).equals(memory.bytes))
  })

  test(`nbdkit's nbd plugin: what it passes on is right, by ${way}`, {
    skip: missing('nbdkit', 'nbdcopy', ...needs),
  }, async (t) => {
    const memory = await makeDisk()
    const reached = await serveBy(t, way, memory, { name: 'vm1' })
    const file = path.join(tempFolder(t), 'copy.raw')
    const noise = new Random(2).fill(Buffer.alloc(SIZE))
    fs.writeFileSync(`${file}.in`, noise)
    const script = `nbdcopy "$uri" ${file} && nbdcopy --flush ${file}.in "$uri"`
    const before = Buffer.from(memory.bytes)
    await output('nbdkit', '-U', '-', ...nbdkitTo(reached), '--run', script)
    assert.ok(fs.readFileSync(file).equals(before))
    assert.ok(Buffer.from(memory.bytes).equals(noise))
  })

  test(`qemu-nbd --list: names, flags, sizes and contexts, by ${way}`, {
    skip: missing('qemu-nbd', ...needs),
  }, async (t) => {
    const options = { name: 'vm1', description: 'a test disk' }
    const { target, tlsObject } = await serveBy(t, way, await makeDisk(), options)
    const where = target.transport === 'unix' ? ['-k', target.path] : ['-b', target.host, '-p', String(target.port)]
    const hostname = target.tls?.hostname === undefined ? [] : ['--tls-hostname', target.tls.hostname]
    const tls = tlsObject === undefined ? [] : ['--object', tlsObject, '--tls-creds', 'tls', ...hostname]
    const list = await output('qemu-nbd', '--list', ...where, ...tls)
    for (const word of ["'vm1'", 'a test disk', String(SIZE), 'base:allocation', 'fast-zero', 'multi', 'df'])
      assert.ok(list.includes(word), `${word} in ${list}`)
  })

  test(`qemu-img and qemu-io: copies, maps, writes and reads, by ${way}`, {
    skip: missing('qemu-img', 'qemu-io', ...needs),
  }, async (t) => {
    const memory = await makeDisk()
    const reached = await serveBy(t, way, memory)
    const { tlsObject } = reached
    const image = qemuImage(reached)
    const objects = tlsObject === undefined ? [] : ['--object', tlsObject]
    const file = path.join(tempFolder(t), 'copy.raw')
    await output('qemu-img', 'convert', ...objects, '--image-opts', image, '-O', 'raw', file)
    assert.ok(fs.readFileSync(file).equals(memory.bytes))
    const commands = [
      'write -P 7 4M 1M',
      'write -z -u 5M 64k',
      'discard 6M 64k',
      'flush',
      'read -P 7 4M 1M',
      'read -P 0 5M 64k',
    ]
    const args = commands.flatMap((command) => ['-c', command])
    const said = await output('qemu-io', ...objects, '--image-opts', ...args, image)
    assert.ok(!said.includes('failed'), said)
    assert.ok(memory.bytes.subarray(4 * MIB, 5 * MIB).every((byte) => byte === 7))
  })

  for (const verify of ['md5', 'crc32c'] as const) {
    test(`fio: every block of a mixed load is as written (${verify}), by ${way}`, {
      skip: missing('fio', 'nbdkit', ...needs),
    }, async (t) => {
      const reached = await serveBy(t, way, new MemoryDevice(SIZE))
      const { reads, writes } = await verifyByFio(reached, {
        verify,
        size: SIZE,
        ioSize: 16 * MIB,
        seed: 1,
        folder: tempFolder(t),
      })
      assert.ok(writes > 30 && reads > writes, `${reads} reads, ${writes} writes`)
    })
  }

  test(`nbdkit's retry filter: a server that went away and came back is found again, by ${way}`, {
    skip: missing('nbdkit', ...needs),
  }, async (t) => {
    const folder = tempFolder(t)
    const [ours, theirs] = [path.join(folder, 'ours.sock'), path.join(folder, 'theirs.sock')]
    const served = { name: '', device: await makeDisk() }
    const security = await secureBy(t, way)
    const secured = security === undefined ? {} : { tls: security.server }
    let port = 0
    const listen = async (): Promise<NbdServer> => {
      const server = new NbdServer({ find: () => served, list: () => [served] })
      if (placeOf(way) === 'unix') await server.listenUnix(ours, secured)
      else port = await server.listenTcp('127.0.0.1', port, secured)
      return server
    }
    const first = await listen()
    const target: NbdUri =
      placeOf(way) === 'unix'
        ? { transport: 'unix', path: ours, name: '' }
        : { transport: 'tcp', host: '127.0.0.1', port, name: '' }
    const retries = ['retries=20', 'retry-delay=1', 'retry-exponential=no']
    const nbdkit = spawn('nbdkit', ['-f', '-U', theirs, ...nbdkitTo(reachedBy(target, security), 'retry'), ...retries])
    t.after(() => nbdkit.kill())
    while (!(await answers(theirs))) await new Promise((resolve) => setTimeout(resolve, 20))
    const client = await connectNbd({ transport: 'unix', path: theirs, name: '' })
    const noise = Buffer.from(new Random(3).fill(Buffer.alloc(65_536)))
    await client.write(0, noise.length, noise, 0, 0)
    await first.close()
    const second = await listen()
    t.after(() => second.close())
    const back = Buffer.alloc(noise.length)
    await client.read(0, back.length, back, 0)
    assert.ok(back.equals(noise))
    await client.write(MIB, noise.length, noise, 0, 0)
    await client.close()
    assert.ok(noise.equals(served.device.bytes.subarray(MIB, MIB + noise.length)))
  })
}

async function answers(socket: string): Promise<boolean> {
  const probe = net.connect(socket)
  const isThere = await new Promise<boolean>((resolve) => {
    probe.once('connect', () => resolve(true))
    probe.once('error', () => resolve(false))
  })
  probe.destroy()
  return isThere
}
