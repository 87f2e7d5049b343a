// Our NBD client against other people's servers: the device contract, and what the contract does not ask.

import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import net from 'node:net'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { ZERO } from '../../src/block/device.ts'
import { listExtents } from '../../src/block/extents.ts'
import { connectNbd } from '../../src/nbd/client.ts'
import { deviceContract } from '../contract/device.ts'
import { missing, peer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'

const MIB = 1024 * 1024

function answers(socket: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = net.connect(socket, () => resolve(true))
    probe.once('connect', () => probe.destroy()).once('error', () => resolve(false))
  })
}

/** Starts a server and waits until it answers on `socket`; it is killed after the test. */
async function start(t: TestContext, socket: string, program: string, ...args: string[]): Promise<string> {
  const child = spawn(program, args, { stdio: 'ignore' })
  t.after(() => child.kill('SIGKILL'))
  for (let waited = 0; !(await answers(socket)); waited += 5) {
    assert.ok(waited < 10_000, `${program} does not answer on ${socket}`)
    await new Promise((resolve) => setTimeout(resolve, 5))
  }
  return `nbd+unix:///?socket=${socket}`
}

async function qemuNbd(t: TestContext, size: number): Promise<string> {
  const folder = tempFolder(t)
  const image = path.join(folder, 'disk.qcow2')
  peer('qemu-img', 'create', '-q', '-f', 'qcow2', image, String(size))
  const socket = path.join(folder, 'nbd.sock')
  return start(t, socket, 'qemu-nbd', '-t', '-f', 'qcow2', '--discard=unmap', '-k', socket, image)
}

async function nbdkit(t: TestContext, size: number): Promise<string> {
  const socket = path.join(tempFolder(t), 'nbd.sock')
  return start(t, socket, 'nbdkit', '-f', '-U', socket, 'memory', String(size))
}

if (missing('qemu-nbd', 'qemu-img') === false) {
  deviceContract('NBD client to qemu-nbd', async (t, size) => connectNbd(await qemuNbd(t, size)))
}
if (missing('nbdkit') === false) {
  deviceContract('NBD client to nbdkit', async (t, size) => connectNbd(await nbdkit(t, size)))
}

test('what qemu-nbd tells of holes, data and zeros is understood', {
  skip: missing('qemu-nbd', 'qemu-img'),
}, async (t) => {
  const client = await connectNbd(await qemuNbd(t, 8 * MIB))
  await client.write(MIB, MIB, Buffer.alloc(MIB, 5), 0, 0)
  const found = await listExtents(client, 0, 8 * MIB)
  const shown = found.map(({ offset, length, extent }) => [offset, length, extent & ZERO])
  assert.deepEqual(shown, [
    [0, MIB, ZERO],
    [MIB, MIB, 0],
    [2 * MIB, 6 * MIB, ZERO],
  ])
  await client.close()
})

test('a bitmap of QEMU is read through its metadata context', {
  skip: missing('qemu-nbd', 'qemu-img', 'qemu-io'),
}, async (t) => {
  const folder = tempFolder(t)
  const image = path.join(folder, 'disk.qcow2')
  peer('qemu-img', 'create', '-q', '-f', 'qcow2', image, '8M')
  peer('qemu-img', 'bitmap', '--add', '-g', '64k', image, 'daily')
  peer('qemu-io', '-f', 'qcow2', '-c', 'write 3M 128k', image)
  peer('qemu-img', 'bitmap', '--disable', image, 'daily')
  const socket = path.join(folder, 'nbd.sock')
  const uri = await start(t, socket, 'qemu-nbd', '-t', '-r', '-f', 'qcow2', '-B', 'daily', '-k', socket, image)
  const context = 'qemu:dirty-bitmap:daily'
  const client = await connectNbd(uri, { contexts: [context] })
  assert.equal(client.can.write, false)
  const dirty: [number, number][] = []
  let at = 0
  await client.status(context, 0, 8 * MIB, (length, status) => {
    if (status !== 0) dirty.push([at, length])
    at += length
    return true
  })
  assert.deepEqual(dirty, [[3 * MIB, 128 * 1024]])
  await client.close()
})

test('a server without structured replies is read all the same', { skip: missing('nbdkit') }, async (t) => {
  const socket = path.join(tempFolder(t), 'nbd.sock')
  const uri = await start(t, socket, 'nbdkit', '-f', '--no-sr', '-U', socket, 'pattern', '1M')
  const client = await connectNbd(uri)
  const into = Buffer.alloc(64)
  await client.read(4096, 64, into, 0)
  assert.equal(into.readBigUInt64BE(8), 4104n)
  assert.equal(client.can.extents, 'none')
  await client.close()
})
