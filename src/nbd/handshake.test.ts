// The server's handshake, driven byte by byte, against the text of the specification: the sections are named.

import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { Filter } from '../block/filter.ts'
import type { Capabilities } from '../block/device.ts'
import { MemoryDevice } from '../block/memory.ts'
import { RawPeer, type ServeOptions, serveDevice } from '../../test/support/nbd.ts'
import {
  ACK,
  ask,
  chunk,
  enter,
  goMessage,
  greet,
  metaMessage,
  optionMessage,
  requestMessage,
  simpleReply,
  u16,
  u32,
} from '../../test/support/nbd-wire.ts'
import { NbdServer } from './server.ts'
import {
  NBD_REP_ERR_BLOCK_SIZE_REQD,
  NBD_REP_ERR_INVALID,
  NBD_REP_ERR_TOO_BIG,
  NBD_REP_ERR_UNKNOWN,
  NBD_REP_ERR_UNSUP,
} from './spec.ts'

const SIZE = 1024 * 1024

class CoarseDevice extends Filter {
  override get can(): Capabilities {
    return { ...super.can, minimumBlock: 4096 }
  }
}

async function connect(t: TestContext, options: ServeOptions = {}, device = new MemoryDevice(SIZE)): Promise<RawPeer> {
  const { target } = await serveDevice(t, device, options)
  const peer = new RawPeer(target)
  t.after(() => peer.socket.destroy())
  return peer
}

test('the greeting is that of fixed newstyle, with NO_ZEROES (Newstyle negotiation)', async (t) => {
  const peer = await connect(t)
  const greeting = await greet(peer)
  assert.equal(greeting.toString('latin1', 0, 16), 'NBDMAGICIHAVEOPT')
  assert.equal(greeting.readUInt16BE(16), 3)
})

test('a client flag that nobody defined ends the connection (Client flags)', async (t) => {
  const peer = await connect(t)
  await greet(peer, 4)
  assert.equal((await peer.rest()).length, 0)
})

test('EXPORT_NAME enters transmission with size, flags and 124 zeros unless both agreed on none', async (t) => {
  for (const [flags, zeros] of [
    [1, 124],
    [3, 0],
  ] as const) {
    const peer = await connect(t, { name: 'disk' })
    await greet(peer, flags)
    peer.send(optionMessage(1, Buffer.from('disk')))
    const reply = await peer.receive(10 + zeros)
    assert.equal(reply.readBigUInt64BE(0), BigInt(SIZE))
    assert.ok(reply.subarray(10).every((byte) => byte === 0))
    peer.send(requestMessage({ type: 3 }))
    assert.equal(await simpleReply(peer), 0)
  }
})

test('EXPORT_NAME of an unknown export ends the connection, since it cannot be answered', async (t) => {
  const peer = await connect(t, { name: 'disk' })
  await greet(peer)
  peer.send(optionMessage(1, Buffer.from('other')))
  assert.equal((await peer.rest()).length, 0)
})

test('ABORT is acknowledged, then the connection ends', async (t) => {
  const peer = await connect(t)
  await greet(peer)
  assert.deepEqual(
    (await ask(peer, optionMessage(2))).map((reply) => reply.type),
    [ACK],
  )
  assert.equal((await peer.rest()).length, 0)
})

test('LIST names every export with its description', async (t) => {
  const peer = await connect(t, { name: 'größe', description: 'the disk of vm7' })
  await greet(peer)
  const [server, end] = await ask(peer, optionMessage(3))
  assert.equal(server?.type, 2)
  const length = server?.data.readUInt32BE(0) ?? 0
  assert.equal(server?.data.toString('utf8', 4, 4 + length), 'größe')
  assert.equal(server?.data.toString('utf8', 4 + length), 'the disk of vm7')
  assert.equal(end?.type, ACK)
})

test('LIST with data is invalid', async (t) => {
  const peer = await connect(t)
  await greet(peer)
  assert.equal((await ask(peer, optionMessage(3, u32(1)))).at(-1)?.type, NBD_REP_ERR_INVALID)
})

test('INFO gives size, flags, name, description and block sizes when asked, and stays in the handshake', async (t) => {
  const peer = await connect(t, { name: 'disk', description: 'hello' })
  await greet(peer)
  const replies = await ask(peer, goMessage('disk', 6, [1, 2, 3, 99]))
  const infos = new Map(replies.slice(0, -1).map(({ data }) => [data.readUInt16BE(0), data.subarray(2)]))
  assert.deepEqual(
    [...infos.keys()].toSorted((a, b) => a - b),
    [0, 1, 2, 3],
  )
  assert.equal(infos.get(0)?.readBigUInt64BE(0), BigInt(SIZE))
  assert.equal(infos.get(1)?.toString(), 'disk')
  assert.equal(infos.get(2)?.toString(), 'hello')
  assert.deepEqual(
    [0, 4, 8].map((at) => infos.get(3)?.readUInt32BE(at)),
    [1, 4096, 32 * 1024 * 1024],
  )
  assert.equal((await ask(peer, goMessage('disk'))).at(-1)?.type, ACK)
})

test('INFO and GO of an unknown export are answered with ERR_UNKNOWN, and the handshake goes on', async (t) => {
  const peer = await connect(t, { name: 'disk' })
  await greet(peer)
  for (const option of [6, 7]) {
    assert.deepEqual(
      (await ask(peer, goMessage('nope', option))).map(({ type }) => type),
      [NBD_REP_ERR_UNKNOWN],
    )
  }
  assert.equal((await ask(peer, goMessage('disk'))).at(-1)?.type, ACK)
})

test('an option whose lengths do not fit together is invalid, and the handshake goes on', async (t) => {
  const peer = await connect(t)
  await greet(peer)
  const bad = [
    optionMessage(7),
    optionMessage(7, u32(5), u16(0)),
    optionMessage(7, u32(0), u16(2), u16(3)),
    optionMessage(7, u32(0), u16(0), u16(3)),
    optionMessage(7, u32(0xffff_ffff), u16(0)),
    optionMessage(8, u16(1)),
    optionMessage(9, u32(0), u32(1), u32(9)),
    optionMessage(9, u32(0), u32(0xffff_ffff)),
  ]
  for (const message of bad) assert.equal((await ask(peer, message)).at(-1)?.type, NBD_REP_ERR_INVALID)
  assert.equal((await ask(peer, goMessage(''))).at(-1)?.type, ACK)
})

test('an unknown option and STARTTLS are answered with ERR_UNSUP, and data that is too long is skipped', async (t) => {
  const peer = await connect(t)
  await greet(peer)
  for (const option of [5, 11, 4242]) {
    assert.deepEqual(
      (await ask(peer, optionMessage(option))).map(({ type }) => type),
      [NBD_REP_ERR_UNSUP],
    )
  }
  assert.equal((await ask(peer, optionMessage(7, Buffer.alloc(300_000)))).at(-1)?.type, NBD_REP_ERR_TOO_BIG)
  assert.equal((await ask(peer, goMessage(''))).at(-1)?.type, ACK)
})

test('a message that is no option ends the connection', async (t) => {
  const peer = await connect(t)
  await greet(peer)
  peer.send(Buffer.from('IHAVENOTOPT.....'))
  assert.equal((await peer.rest()).length, 0)
})

test('options sent in one piece and byte by byte are understood alike', async (t) => {
  const messages = Buffer.concat([u32(3), optionMessage(8), goMessage(''), requestMessage({ type: 0, length: 512 })])
  const together = await connect(t)
  together.send(messages)
  const bytewise = await connect(t)
  for (const byte of messages) {
    bytewise.send(Buffer.from([byte]))
    await new Promise((resolve) => setImmediate(resolve))
  }
  const length = 18 + 20 + (20 + 12) + 20 + (28 + 512)
  assert.deepEqual(await bytewise.receive(length), await together.receive(length))
})

test('an export with a coarse minimum block is refused to those who do not ask for block sizes', async (t) => {
  const peer = await connect(t, {}, new CoarseDevice(new MemoryDevice(SIZE)) as unknown as MemoryDevice)
  await greet(peer)
  const refused = await ask(peer, goMessage(''))
  assert.deepEqual(
    refused.map(({ type }) => type),
    [3, NBD_REP_ERR_BLOCK_SIZE_REQD],
  )
  assert.equal((await ask(peer, goMessage('', 7, [3]))).at(-1)?.type, ACK)
  peer.send(requestMessage({ type: 0, offset: 512, length: 512 }))
  assert.equal(await simpleReply(peer), 22)
})

test('contexts are listed by name, by namespace, and all without a query (Metadata querying)', async (t) => {
  const daily = { name: 'qemu:dirty-bitmap:daily', extents: () => undefined }
  const peer = await connect(t, { contexts: [daily] })
  await greet(peer)
  const list = async (...queries: string[]): Promise<string[]> => {
    const replies = await ask(peer, metaMessage(9, '', ...queries))
    assert.equal(replies.at(-1)?.type, ACK)
    return replies.slice(0, -1).map(({ data }) => data.toString('utf8', 4))
  }
  assert.deepEqual(await list(), ['base:allocation', daily.name])
  assert.deepEqual(await list('base:'), ['base:allocation'])
  assert.deepEqual(await list('qemu:'), [daily.name])
  assert.deepEqual(await list(daily.name, 'foreign:thing'), [daily.name])
  assert.equal((await ask(peer, metaMessage(9, '', 'nocolon'))).at(-1)?.type, NBD_REP_ERR_INVALID)
  assert.equal((await ask(peer, metaMessage(9, 'nope'))).at(-1)?.type, NBD_REP_ERR_UNKNOWN)
})

test('SET_META_CONTEXT needs structured replies first, takes no wildcard, and its last use counts', async (t) => {
  const peer = await connect(t)
  await greet(peer)
  assert.equal((await ask(peer, metaMessage(10, '', 'base:allocation'))).at(-1)?.type, NBD_REP_ERR_INVALID)
  await ask(peer, optionMessage(8))
  assert.equal((await ask(peer, metaMessage(10, '', 'base:'))).length, 1)
  assert.equal((await ask(peer, metaMessage(10, '', 'base:allocation'))).length, 2)
  assert.equal((await ask(peer, metaMessage(10, ''))).length, 1)
  await ask(peer, goMessage(''))
  peer.send(requestMessage({ type: 7, length: 4096 }))
  assert.equal((await chunk(peer)).data.readUInt32BE(0), 22)
})

test('contexts that were selected for another export than the one entered do not count', async (t) => {
  const exports = ['one', 'two'].map((name) => ({ name, device: new MemoryDevice(SIZE) }))
  const server = new NbdServer({ find: (wanted) => exports.find(({ name }) => name === wanted), list: () => exports })
  const port = await server.listenTcp('127.0.0.1', 0)
  t.after(() => server.close())
  for (const [entered, errors] of [
    ['one', 0],
    ['two', 1],
  ] as const) {
    const peer = new RawPeer({ transport: 'tcp', host: '127.0.0.1', port, name: entered })
    await greet(peer)
    await ask(peer, optionMessage(8))
    assert.equal((await ask(peer, metaMessage(10, 'one', 'base:allocation'))).length, 2)
    await ask(peer, goMessage(entered))
    peer.send(requestMessage({ type: 7, length: 4096 }))
    assert.equal((await chunk(peer)).type >> 15, errors)
    peer.socket.destroy()
  }
})

test('transmission flags say what the export can', async (t) => {
  const flagsOf = async (options: ServeOptions, structured: boolean): Promise<number> => {
    const peer = await connect(t, options)
    await greet(peer)
    if (structured) await ask(peer, optionMessage(8))
    const info = (await ask(peer, goMessage('', 6))).find(({ type }) => type === 3)
    return info?.data.readUInt16BE(10) ?? 0
  }
  // Bits: 0 flags, 1 read-only, 2 flush, 3 FUA, 5 trim, 6 zeroes, 7 DF, 8 multi-conn, 10 cache, 11 fast zero.
  assert.equal(await flagsOf({}, false), 0b1101_0110_1101)
  assert.equal(await flagsOf({}, true), 0b1101_1110_1101)
  assert.equal(await flagsOf({ readOnly: true, multiConn: false }, false), 0b0100_0000_1111)
})

test('opened and closed are called once for a connection that entered transmission', async (t) => {
  const calls: string[] = []
  const hooks = { opened: () => calls.push('opened'), closed: () => calls.push('closed') }
  const { target, server } = await serveDevice(t, new MemoryDevice(SIZE), hooks as never)
  const stays = new RawPeer(target)
  await greet(stays)
  const enters = new RawPeer(target)
  await enter(enters)
  assert.deepEqual(calls, ['opened'])
  enters.socket.destroy()
  stays.socket.destroy()
  while (server.connections > 0) await new Promise((resolve) => setTimeout(resolve, 5))
  assert.deepEqual(calls, ['opened', 'closed'])
})
