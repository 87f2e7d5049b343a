// Exports that are served elsewhere: who is passed on there, when, and who is not.

import assert from 'node:assert/strict'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { RawPeer, serveDevice } from '../../test/support/nbd.ts'
import {
  ACK,
  ask,
  goMessage,
  greet,
  metaMessage,
  optionMessage,
  requestMessage,
  simpleReply,
} from '../../test/support/nbd-wire.ts'
import { tempFolder } from '../../test/support/temp.ts'
import { MemoryDevice } from '../block/memory.ts'
import type { ExportList } from './handshake.ts'
import { NbdServer } from './server.ts'
import { NBD_REP_ERR_POLICY } from './spec.ts'

/** A server that has nothing itself; `route` gets the socket of one that has a disk. Returns a client that was greeted. */
async function behindGate(t: TestContext, route: (socket: string) => ExportList['route']): Promise<RawPeer> {
  const { target } = await serveDevice(t, new MemoryDevice(65_536))
  assert.ok(target.transport === 'unix')
  const found = route(target.path)
  const gate = new NbdServer({
    find: () => undefined,
    list: () => [],
    ...(found === undefined ? {} : { route: found }),
  })
  t.after(() => gate.close())
  const socket = path.join(tempFolder(t), 'gate.sock')
  await gate.listenUnix(socket)
  const peer = new RawPeer({ transport: 'unix', path: socket, name: '' })
  t.after(() => peer.socket.destroy())
  await greet(peer)
  return peer
}

test('a client is passed on, and the route is told when it asks to use the export and not only about it', async (t) => {
  const asked: boolean[] = []
  const peer = await behindGate(t, (socket) => (_name, enters) => {
    asked.push(enters)
    return { socket, after: undefined }
  })
  await ask(peer, goMessage('', 6))
  await ask(peer, metaMessage(9, ''))
  assert.equal((await ask(peer, goMessage(''))).at(-1)?.type, ACK)
  assert.deepEqual(asked, [false, false, true])
  peer.send(requestMessage({ type: 0, length: 512 }))
  assert.equal(await simpleReply(peer), 0)
})

test('what a client says is held back until the route is ready for it', async (t) => {
  const ready = Promise.withResolvers<void>()
  const peer = await behindGate(t, (socket) => (_name, enters) => ({
    socket,
    after: enters ? ready.promise : undefined,
  }))
  await ask(peer, goMessage('', 6))
  let isIn = false
  const entered = ask(peer, goMessage('')).then(() => (isIn = true))
  for (let turn = 0; turn < 50; turn++) await new Promise((resolve) => setTimeout(resolve, 1))
  assert.equal(isIn, false)
  ready.resolve()
  await entered
  peer.send(requestMessage({ type: 0, length: 512 }))
  assert.equal(await simpleReply(peer), 0)
})

test('a client whose route fails is hung up on, and nothing of it was passed on', async (t) => {
  const peer = await behindGate(t, (socket) => () => ({ socket, after: Promise.reject(new Error('no')) }))
  peer.send(goMessage(''))
  assert.equal((await peer.rest()).length, 0)
})

test('an export that is not served is refused with the reason, and ends the connection where it cannot be said', async (t) => {
  const refused = { refused: 'it is held' }
  const peer = await behindGate(t, () => () => refused)
  for (const message of [goMessage(''), goMessage('', 6), metaMessage(9, '')]) {
    const [reply] = await ask(peer, message)
    assert.deepEqual([reply?.type, reply?.data.toString()], [NBD_REP_ERR_POLICY, 'it is held'])
  }
  peer.send(optionMessage(1))
  assert.equal((await peer.rest()).length, 0)
})
