// Listening, closing, and what hostile or broken clients can do to a server: nothing.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import net from 'node:net'
import path from 'node:path'
import { test } from 'node:test'
import { RawPeer, serveDevice } from '../../test/support/nbd.ts'
import { enter, goMessage, metaMessage, optionMessage, requestMessage, u32 } from '../../test/support/nbd-wire.ts'
import { tempFolder } from '../../test/support/temp.ts'
import { NBD_CONNECTIONS, NBD_DRAIN_MS, NBD_HANDSHAKE_MS } from '../base/limits.ts'
import { Random, seedOfRun } from '../base/random.ts'
import { isBlockError } from '../block/error.ts'
import { MemoryDevice } from '../block/memory.ts'
import { NbdServer } from './server.ts'
import { sharedBuffersInUse } from './shared-buffer.ts'

const MIB = 1024 * 1024
const nothing = { find: () => undefined, list: () => [] }

test('a socket has mode 0600 unless told, and its file is gone after close', async (t) => {
  const folder = tempFolder(t)
  const server = new NbdServer(nothing)
  await server.listenUnix(path.join(folder, 'a'))
  await server.listenUnix(path.join(folder, 'b'), { mode: 0o660 })
  assert.deepEqual(
    ['a', 'b'].map((name) => fs.statSync(path.join(folder, name)).mode & 0o777),
    [0o600, 0o660],
  )
  await server.close()
  assert.deepEqual(fs.readdirSync(folder), [])
})

test('a socket path that is too long is refused before anything is made', async (t) => {
  const folder = tempFolder(t)
  const server = new NbdServer(nothing)
  const long = path.join(folder, 'x'.repeat(108 - folder.length - 1))
  await assert.rejects(server.listenUnix(long), (error) => isBlockError(error, 'invalid-argument'))
  assert.deepEqual(fs.readdirSync(folder), [])
})

test('a dead server leaves a socket that is replaced; a live one is busy; another file is left alone', async (t) => {
  const folder = tempFolder(t)
  const socket = path.join(folder, 'nbd.sock')
  const first = new NbdServer(nothing)
  await first.listenUnix(socket)
  t.after(() => first.close())
  const second = new NbdServer(nothing)
  t.after(() => second.close())
  await assert.rejects(second.listenUnix(socket), (error) => isBlockError(error, 'busy'))
  // Closing removes the file by its name: a hard link keeps a socket on which nobody listens.
  fs.linkSync(socket, `${socket}.kept`)
  await first.close()
  fs.renameSync(`${socket}.kept`, socket)
  await second.listenUnix(socket)
  const file = path.join(folder, 'image')
  fs.writeFileSync(file, 'precious')
  await assert.rejects(second.listenUnix(file), (error) => isBlockError(error, 'exists'))
  assert.equal(fs.readFileSync(file, 'utf8'), 'precious')
})

test('TCP is served on loopback only, and a port in use is busy', async (t) => {
  const server = new NbdServer(nothing)
  t.after(() => server.close())
  for (const host of ['0.0.0.0', '192.0.2.1', 'example.com', '::']) {
    await assert.rejects(server.listenTcp(host, 0), (error) => isBlockError(error, 'permission'))
  }
  const port = await server.listenTcp('127.0.0.1', 0)
  assert.ok(port > 0)
  await assert.rejects(server.listenTcp('127.0.0.1', port), (error) => isBlockError(error, 'busy'))
})

test('after close nobody can connect, and listening again fails as closed', async (t) => {
  const { server, target } = await serveDevice(t, new MemoryDevice(4096), { place: 'tcp' })
  await server.close()
  const refused = new RawPeer(target)
  assert.equal((await refused.rest()).length, 0)
  await assert.rejects(server.listenTcp('127.0.0.1', 0), (error) => isBlockError(error, 'closed'))
})

test('close ends connections in the handshake and in transmission', async (t) => {
  const { server, target } = await serveDevice(t, new MemoryDevice(4096))
  const [idle, active] = [new RawPeer(target), new RawPeer(target)]
  await enter(active)
  await idle.receive(18)
  await server.close()
  assert.equal((await idle.rest()).length, 0)
  assert.equal((await active.rest()).length, 0)
  assert.equal(server.connections, 0)
})

test('fifty connections at once each get their own answers', async (t) => {
  const { target } = await serveDevice(t, new MemoryDevice(50 * 4096))
  await Promise.all(
    Array.from({ length: 50 }, async (_, i) => {
      const peer = new RawPeer(target)
      await enter(peer)
      peer.send(requestMessage({ type: 1, offset: i * 4096, data: Buffer.alloc(4096, i + 1) }))
      await peer.receive(16)
      peer.send(requestMessage({ type: 0, offset: i * 4096, length: 4096 }))
      assert.ok((await peer.receive(16 + 4096)).subarray(16).every((byte) => byte === i + 1))
      peer.socket.destroy()
    }),
  )
})

test('a client that does not finish its handshake is disconnected when its time is over', async (t) => {
  t.mock.timers.enable({ apis: ['setTimeout'] })
  const { target } = await serveDevice(t, new MemoryDevice(4096))
  const peer = new RawPeer(target)
  await peer.receive(18)
  peer.send('0000')
  t.mock.timers.tick(NBD_HANDSHAKE_MS - 1)
  peer.send('00')
  assert.equal(peer.isEnded, false)
  t.mock.timers.tick(1)
  assert.equal((await peer.rest()).length, 0)
})

test('close does not wait for ever for a client that does not take its replies', async (t) => {
  t.mock.timers.enable({ apis: ['setTimeout'] })
  const { server, target } = await serveDevice(t, new MemoryDevice(MIB * 8))
  const peer = new RawPeer(target)
  await enter(peer)
  peer.socket.pause()
  peer.send(requestMessage({ type: 0, length: MIB * 8 }))
  while (peer.socket.bytesRead === 0) await new Promise((resolve) => setImmediate(resolve))
  const closed = server.close()
  await new Promise((resolve) => setImmediate(resolve))
  t.mock.timers.tick(NBD_DRAIN_MS)
  await closed
  assert.equal(sharedBuffersInUse(), 0)
  peer.socket.destroy()
})

test('connections beyond the limit are hung up on, and the others go on', async (t) => {
  const { server, target } = await serveDevice(t, new MemoryDevice(4096))
  const peers = Array.from({ length: NBD_CONNECTIONS }, () => new RawPeer(target))
  await Promise.all(peers.map((peer) => peer.receive(18)))
  assert.equal(server.connections, NBD_CONNECTIONS)
  assert.equal((await new RawPeer(target).rest()).length, 0)
  peers[0]?.send(u32(3), goMessage(''))
  assert.equal((await peers[0]?.receive(32))?.length, 32)
  for (const peer of peers) peer.socket.destroy()
})

/** A conversation as a client would have it, then broken in a random way. */
function mutated(random: Random): Buffer {
  const parts = [u32(3)]
  if (random.chance(0.5)) parts.push(optionMessage(8))
  if (random.chance(0.3)) parts.push(metaMessage(random.pick([9, 10]), '', 'base:allocation'))
  if (random.chance(0.2))
    parts.push(optionMessage(random.below(14), random.fill(Buffer.alloc(random.below(40))) as Buffer))
  parts.push(random.chance(0.8) ? goMessage('', 7, [3]) : optionMessage(1))
  for (let i = random.below(6); i > 0; i--) {
    const type = random.below(9)
    const length = random.pick([0, 1, 512, 4096, 70_000])
    const data = type === 1 ? Buffer.alloc(length) : Buffer.alloc(0)
    const fields = { type, flags: random.pick([0, 0, 1, 4, 8, 16, 0xffff]), offset: random.below(80_000) }
    parts.push(requestMessage({ ...fields, length, data, cookie: random.next() }))
  }
  let bytes = Buffer.concat(parts)
  for (let i = random.below(3); i > 0; i--) bytes[random.below(bytes.length)] = random.next()
  if (random.chance(0.3)) bytes = bytes.subarray(0, random.below(bytes.length))
  return bytes
}

test('twenty thousand broken conversations leave the server alive, its buffers returned and its device whole', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const { server, target } = await serveDevice(t, new MemoryDevice(65_536))
  assert.equal(target.transport, 'unix')
  const socketPath = target.transport === 'unix' ? target.path : ''
  const converse = (bytes: Buffer): Promise<void> =>
    new Promise((resolve) => {
      const socket = net.connect({ path: socketPath, allowHalfOpen: true })
      socket.on('error', () => {})
      socket.on('close', () => resolve())
      socket.on('end', () => socket.destroy())
      socket.resume()
      if (random.chance(0.1)) socket.end(bytes, () => socket.destroy())
      else socket.end(bytes)
    })
  const lanes = Array.from({ length: 16 }, async () => {
    for (let i = 0; i < 1250; i++) await converse(mutated(random))
  })
  await Promise.all(lanes)
  while (server.connections > 0) await new Promise((resolve) => setTimeout(resolve, 5))
  assert.equal(sharedBuffersInUse(), 0)
  const peer = new RawPeer(target)
  await enter(peer)
  peer.send(requestMessage({ type: 0, length: 512 }))
  assert.equal((await peer.receive(16 + 512)).readUInt32BE(4), 0)
  peer.socket.destroy()
})
