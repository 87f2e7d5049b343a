// The options of the handshake, sentence by sentence: each test names the section of the specification that it states. What
// the handshake is for is in handshake.test.ts; the table of sentences is docs/internals/nbd-protocol.md.

import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { RawPeer, type ServeOptions, serveDevice } from '../../test/support/nbd.ts'
import {
  ACK,
  ask,
  chunk,
  goMessage,
  greet,
  metaMessage,
  type OptionReply,
  optionMessage,
  optionReply,
  requestMessage,
  str,
  u16,
  u32,
} from '../../test/support/nbd-wire.ts'
import type { Pending } from '../block/device.ts'
import { Filter } from '../block/filter.ts'
import { MemoryDevice } from '../block/memory.ts'
import { NbdServer } from './server.ts'
import {
  NBD_REP_ERR_INVALID,
  NBD_REP_ERR_SHUTDOWN,
  NBD_REP_ERR_TLS_REQD,
  NBD_REP_ERR_TOO_BIG,
  NBD_REP_ERR_UNKNOWN,
  NBD_REP_ERR_UNSUP,
} from './spec.ts'
import { sharedBuffersInUse } from './shared-buffer.ts'

const SIZE = 1024 * 1024
/** Longer than any option that is read. */
const LONG = Buffer.alloc(300_000, 'x')

/** A connection whose greeting is answered. */
async function begin(t: TestContext, options: ServeOptions = {}, clientFlags = 3): Promise<RawPeer> {
  const { target } = await serveDevice(t, new MemoryDevice(SIZE), options)
  const peer = new RawPeer(target)
  t.after(() => peer.socket.destroy())
  await greet(peer, clientFlags)
  return peer
}

function types(replies: readonly OptionReply[]): number[] {
  return replies.map(({ type }) => type)
}

async function typesOf(peer: RawPeer, message: Buffer): Promise<number[]> {
  return types(await ask(peer, message))
}

test('Conventions: a name that is no UTF-8, has a NUL or more than 4096 bytes is invalid, and ends EXPORT_NAME', async (t) => {
  const names = [Buffer.from([0xff, 0xfe]), Buffer.from('a\0b'), Buffer.alloc(4097, 'n'), Buffer.from([0xc3])]
  for (const name of names) {
    const peer = await begin(t)
    for (const option of [6, 7, 9]) {
      const rest = option === 9 ? u32(0) : u16(0)
      const message = optionMessage(option, u32(name.length), name, rest)
      assert.deepEqual(await typesOf(peer, message), [NBD_REP_ERR_INVALID])
    }
    peer.send(optionMessage(1, name))
    assert.equal((await peer.rest()).length, 0)
  }
})

test('Conventions: a name of 4096 bytes is looked for, and the message about it is a string too', async (t) => {
  const name = `xx${'é'.repeat(2047)}`
  const peer = await begin(t, { name })
  assert.deepEqual((await typesOf(peer, goMessage(name, 6))).at(-1), ACK)
  const [reply] = await ask(peer, goMessage(`xy${'é'.repeat(2047)}`, 6))
  assert.equal(reply?.type, NBD_REP_ERR_UNKNOWN)
  const said = reply?.data ?? Buffer.alloc(0)
  assert.ok(said.length > 4000 && said.length <= 4096, `${said.length} bytes`)
  assert.ok(!said.toString().includes('\u{fffd}'), 'it is cut between two characters')
})

test('Newstyle negotiation: a flag that the server did not offer ends the connection, each one', async (t) => {
  for (const flags of [4, 0x8000_0000, 0x1_0003]) {
    const peer = await begin(t, {}, flags)
    assert.equal((await peer.rest()).length, 0)
  }
})

test('Fixed newstyle negotiation: options of a client that did not say that it knows it are honoured', async (t) => {
  const peer = await begin(t, {}, 0)
  assert.deepEqual(await typesOf(peer, optionMessage(8)), [ACK])
  assert.equal((await typesOf(peer, goMessage(''))).at(-1), ACK)
})

test('Fixed newstyle negotiation: stateful options may be sent again, and the last one counts', async (t) => {
  const peer = await begin(t)
  assert.deepEqual(await typesOf(peer, optionMessage(8)), [ACK])
  assert.deepEqual(await typesOf(peer, optionMessage(8)), [ACK])
  assert.deepEqual((await typesOf(peer, goMessage(''))).at(-1), ACK)
})

test('Baseline: what the server does not know is ERR_UNSUP, however long, and the next option is understood', async (t) => {
  const peer = await begin(t)
  for (const option of [0, 4, 11, 12, 0x7fff_ffff, 0xffff_ffff]) {
    assert.deepEqual(await typesOf(peer, optionMessage(option)), [NBD_REP_ERR_UNSUP])
    assert.deepEqual(await typesOf(peer, optionMessage(option, Buffer.from('data'))), [NBD_REP_ERR_UNSUP])
    assert.deepEqual(await typesOf(peer, optionMessage(option, LONG)), [NBD_REP_ERR_UNSUP])
  }
  assert.equal((await typesOf(peer, goMessage(''))).at(-1), ACK)
})

test('EXPORT_NAME: a name longer than any option ends the connection', async (t) => {
  const peer = await begin(t)
  peer.send(optionMessage(1, LONG))
  assert.equal((await peer.rest()).length, 0)
})

test('EXPORT_NAME: the empty name is the default export', async (t) => {
  const peer = await begin(t)
  peer.send(optionMessage(1))
  assert.equal((await peer.receive(10)).readBigUInt64BE(0), BigInt(SIZE))
})

test('ABORT: data is ignored, of any length, and the reply is ACK', async (t) => {
  for (const data of [Buffer.alloc(0), Buffer.from('why'), LONG]) {
    const peer = await begin(t)
    assert.deepEqual(await typesOf(peer, optionMessage(2, data)), [ACK])
    assert.equal((await peer.rest()).length, 0)
  }
})

test('ABORT: a client that goes without waiting for the reply leaves nothing behind', async (t) => {
  const { target, server } = await serveDevice(t, new MemoryDevice(SIZE))
  for (let i = 0; i < 20; i++) {
    const peer = new RawPeer(target)
    await greet(peer)
    peer.socket.write(optionMessage(2), () => peer.socket.destroy())
  }
  const peer = new RawPeer(target)
  await greet(peer)
  while (server.connections > 1) await new Promise((resolve) => setTimeout(resolve, 2))
  assert.equal((await typesOf(peer, goMessage(''))).at(-1), ACK)
  peer.socket.destroy()
  while (server.connections > 0) await new Promise((resolve) => setTimeout(resolve, 2))
  assert.equal(sharedBuffersInUse(), 0)
})

test('LIST and STRUCTURED_REPLY: data is invalid, of any length', async (t) => {
  const peer = await begin(t)
  for (const option of [3, 8])
    for (const data of [Buffer.from([0]), LONG])
      assert.deepEqual(await typesOf(peer, optionMessage(option, data)), [NBD_REP_ERR_INVALID])
})

test('LIST: one reply for each export, then ACK; no export, no reply', async (t) => {
  for (const names of [[], ['a'], ['a', '', 'ö']]) {
    const exports = names.map((name) => ({ name, device: new MemoryDevice(512) }))
    const server = new NbdServer({ find: () => undefined, list: () => exports })
    t.after(() => server.close())
    const peer = new RawPeer({
      transport: 'tcp',
      host: '127.0.0.1',
      port: await server.listenTcp('127.0.0.1', 0),
      name: '',
    })
    t.after(() => peer.socket.destroy())
    await greet(peer)
    const replies = await ask(peer, optionMessage(3))
    assert.deepEqual(
      replies.slice(0, -1).map(({ type, data }) => [type, data.toString('utf8', 4)]),
      names.map((name) => [2, name]),
    )
    assert.equal(replies.at(-1)?.type, ACK)
  }
})

test('INFO and GO: without information requests the export is described all the same', async (t) => {
  const peer = await begin(t)
  const replies = await ask(peer, goMessage('', 6))
  assert.deepEqual(types(replies), [3, ACK])
  assert.deepEqual([replies[0]?.data.length, replies[0]?.data.readUInt16BE(0)], [12, 0])
})

test('INFO and GO: what is asked twice is answered once, what is unknown is ignored', async (t) => {
  const peer = await begin(t, { description: 'd' })
  const replies = await ask(peer, goMessage('', 6, [3, 3, 0, 0, 1, 2, 1, 4, 0xffff]))
  const infos = replies.slice(0, -1).map(({ data }) => data.readUInt16BE(0))
  assert.deepEqual(
    infos.toSorted((a, b) => a - b),
    [0, 1, 2, 3],
  )
  assert.equal(replies.at(-1)?.type, ACK)
})

test('INFO and GO: a name longer than the data less 6 bytes is invalid', async (t) => {
  const peer = await begin(t)
  for (const option of [6, 7]) {
    assert.deepEqual(await typesOf(peer, optionMessage(option, u32(3), Buffer.from('abc'), u16(0).subarray(1))), [
      NBD_REP_ERR_INVALID,
    ])
    assert.deepEqual(await typesOf(peer, optionMessage(option, LONG)), [NBD_REP_ERR_TOO_BIG])
  }
})

test('INFO and GO: an export that does not exist is ERR_UNKNOWN, without information', async (t) => {
  const peer = await begin(t, { name: 'disk' })
  for (const option of [6, 7])
    assert.deepEqual(await typesOf(peer, goMessage('', option, [0, 1, 2, 3])), [NBD_REP_ERR_UNKNOWN])
})

test('INFO and GO: GO right after INFO with the same parameters says the same, and pads nothing', async (t) => {
  const peer = await begin(t, { name: 'disk', description: 'd' }, 1)
  const sorted = (replies: readonly OptionReply[]): string[] =>
    replies.map(({ type, data }) => `${type} ${data.toString('hex')}`).toSorted()
  const info = await ask(peer, goMessage('disk', 6, [1, 2, 3]))
  const go = await ask(peer, goMessage('disk', 7, [1, 2, 3]))
  assert.deepEqual(sorted(go), sorted(info))
  peer.send(requestMessage({ type: 3, cookie: 5 }))
  assert.equal((await peer.receive(16)).readUInt32BE(0), 0x6744_6698)
})

test('Size constraints: what is advertised are powers of two, the preferred at least 512 and the minimum', async (t) => {
  const peer = await begin(t)
  const info = (await ask(peer, goMessage('', 6, [3]))).find(({ data }) => data.length === 14)
  const [minimum, preferred, maximum] = [2, 6, 10].map((at) => info?.data.readUInt32BE(at) ?? 0)
  assert.deepEqual([minimum, preferred, maximum], [1, 4096, 32 * 1024 * 1024])
})

test('STARTTLS: ERR_UNSUP where there is no TLS, invalid with data, and nothing else answers ERR_TLS_REQD', async (t) => {
  const peer = await begin(t)
  assert.deepEqual(await typesOf(peer, optionMessage(5)), [NBD_REP_ERR_UNSUP])
  for (const data of [Buffer.from('x'), LONG])
    assert.deepEqual(await typesOf(peer, optionMessage(5, data)), [NBD_REP_ERR_INVALID])
  for (const option of [3, 6, 8, 9, 10, 99])
    assert.ok(!(await typesOf(peer, optionMessage(option))).includes(NBD_REP_ERR_TLS_REQD))
})

test('LIST_META_CONTEXT: zero queries list everything, a wildcard its namespace, and a name itself', async (t) => {
  const contexts = ['qemu:dirty-bitmap:a', 'qemu:dirty-bitmap:b', 'qemu:allocation-depth'].map((name) => ({
    name,
    extents: () => undefined,
  }))
  const names = contexts.map(({ name }) => name)
  const peer = await begin(t, { contexts })
  const list = async (...queries: string[]): Promise<string[]> => {
    const replies = await ask(peer, metaMessage(9, '', ...queries))
    assert.equal(replies.at(-1)?.type, ACK)
    assert.ok(replies.slice(0, -1).every(({ type, data }) => type === 4 && data.readUInt32BE(0) === 0))
    return replies.slice(0, -1).map(({ data }) => data.toString('utf8', 4))
  }
  assert.deepEqual(await list(), ['base:allocation', ...names])
  assert.deepEqual(await list('base:'), ['base:allocation'])
  assert.deepEqual(await list('qemu:'), names)
  assert.deepEqual(await list('qemu:dirty-bitmap:'), names.slice(0, 2))
  assert.deepEqual(await list('qemu:dirty-bitmap:b', 'qemu:dirty-bitmap:b'), names.slice(1, 2))
  assert.deepEqual(await list('qemu:dirty-bitmap:c', 'qemu:dirty', 'base:alloc', 'base:new'), [])
  assert.deepEqual(await list('x-unknown:', 'nbd-server:'), [], 'unknown namespaces are ignored')
})

test('LIST_META_CONTEXT: each of its errors has its number, and the next option is understood', async (t) => {
  const peer = await begin(t)
  const failing: [string, Buffer, number][] = [
    ['an unknown export', metaMessage(9, 'nope'), NBD_REP_ERR_UNKNOWN],
    ['no colon', metaMessage(9, '', 'base'), NBD_REP_ERR_INVALID],
    ['no number of queries', optionMessage(9, str('')), NBD_REP_ERR_INVALID],
    ['bytes too many', optionMessage(9, str(''), u32(0), u32(0)), NBD_REP_ERR_INVALID],
    ['a query longer than the data', optionMessage(9, str(''), u32(1), u32(9)), NBD_REP_ERR_INVALID],
    ['too much', optionMessage(9, LONG), NBD_REP_ERR_TOO_BIG],
  ]
  for (const [what, message, error] of failing) assert.deepEqual(await typesOf(peer, message), [error], what)
  assert.deepEqual(await typesOf(peer, metaMessage(9, '', 'base:')), [4, ACK])
})

test('SET_META_CONTEXT: no query selects nothing, and takes back what was selected', async (t) => {
  const peer = await begin(t)
  await ask(peer, optionMessage(8))
  assert.deepEqual(await typesOf(peer, metaMessage(10, '', 'base:allocation')), [4, ACK])
  assert.deepEqual(await typesOf(peer, metaMessage(10, '')), [ACK])
  await ask(peer, goMessage(''))
  peer.send(requestMessage({ type: 7, length: 4096 }))
  assert.equal((await chunk(peer)).data.readUInt32BE(0), 22)
})

test('SET_META_CONTEXT: what fails, whyever, leaves no context selected', async (t) => {
  const failing: [string, Buffer, number][] = [
    ['an unknown export', metaMessage(10, 'nope', 'base:allocation'), NBD_REP_ERR_UNKNOWN],
    ['no colon', metaMessage(10, '', 'base'), NBD_REP_ERR_INVALID],
    ['bytes too many', optionMessage(10, str(''), u32(0), u32(0)), NBD_REP_ERR_INVALID],
    ['a query longer than the data', optionMessage(10, str(''), u32(1), u32(9)), NBD_REP_ERR_INVALID],
    ['a query longer than a string', metaMessage(10, '', `base:${'x'.repeat(4092)}`), NBD_REP_ERR_INVALID],
    ['too much', optionMessage(10, LONG), NBD_REP_ERR_TOO_BIG],
  ]
  for (const [what, message, error] of failing) {
    const peer = await begin(t)
    await ask(peer, optionMessage(8))
    assert.deepEqual(await typesOf(peer, metaMessage(10, '', 'base:allocation')), [4, ACK], what)
    assert.deepEqual(await typesOf(peer, message), [error], what)
    await ask(peer, goMessage(''))
    peer.send(requestMessage({ type: 7, length: 4096 }))
    assert.equal((await chunk(peer)).data.readUInt32BE(0), 22, what)
  }
})

test('SET_META_CONTEXT: each context has a number of its own, asked twice it is selected once', async (t) => {
  const contexts = ['x-a:1', 'x-a:2'].map((name) => ({ name, extents: () => undefined }))
  const peer = await begin(t, { contexts })
  await ask(peer, optionMessage(8))
  const replies = await ask(peer, metaMessage(10, '', 'x-a:2', 'base:allocation', 'x-a:1', 'x-a:2'))
  assert.equal(replies.length, 4)
  assert.equal(new Set(replies.slice(0, 3).map(({ data }) => data.readUInt32BE(0))).size, 3)
})

test('SET_META_CONTEXT: wildcards and unknown names select nothing, which is no error', async (t) => {
  const peer = await begin(t, { contexts: [{ name: 'qemu:dirty-bitmap:a', extents: () => undefined }] })
  await ask(peer, optionMessage(8))
  const queries = ['base:', 'qemu:', 'qemu:dirty-bitmap:', 'base:later', 'x-other:thing']
  assert.deepEqual(await typesOf(peer, metaMessage(10, '', ...queries)), [ACK])
})

test('Termination of the session: half an option and then the end leaves nothing behind', async (t) => {
  const { target, server } = await serveDevice(t, new MemoryDevice(SIZE))
  const whole = Buffer.concat([u32(3), goMessage('', 6, [3])])
  for (let length = 0; length < whole.length; length++) {
    const peer = new RawPeer(target)
    await peer.receive(18)
    peer.socket.end(whole.subarray(0, length))
    assert.equal((await peer.rest()).length, 0)
  }
  while (server.connections > 0) await new Promise((resolve) => setTimeout(resolve, 2))
  assert.equal(sharedBuffersInUse(), 0)
})

/** A device whose flush takes until it is told. */
class SlowFlush extends Filter {
  readonly begun = Promise.withResolvers<void>()
  readonly end = Promise.withResolvers<void>()
  override flush(): Pending {
    this.begun.resolve()
    return this.end.promise
  }
}

/** A server that ends, and cannot yet: `device` still flushes for another client. */
async function beginWhileEnding(t: TestContext): Promise<{ peers: RawPeer[]; device: SlowFlush; end: Promise<void> }> {
  const device = new SlowFlush(new MemoryDevice(SIZE))
  const { server, target } = await serveDevice(t, device)
  const [busy, ...peers] = [0, 1, 2].map(() => new RawPeer(target)) as [RawPeer, ...RawPeer[]]
  for (const peer of [busy, ...peers]) {
    t.after(() => peer.socket.destroy())
    await greet(peer)
  }
  await ask(busy, goMessage(''))
  busy.send(requestMessage({ type: 3 }))
  await device.begun.promise
  // What was sent before is understood before.
  for (const peer of peers) assert.deepEqual(await typesOf(peer, optionMessage(8)), [ACK])
  return { peers, device, end: server.close() }
}

test('Termination of the session: while the server ends, all but ABORT is ERR_SHUTDOWN, long and unknown options too', async (t) => {
  const { peers, device, end } = await beginWhileEnding(t)
  const [peer, leaving] = peers as [RawPeer, RawPeer]
  for (const message of [goMessage(''), goMessage('', 6), metaMessage(10, ''), metaMessage(9, '')])
    assert.deepEqual(await typesOf(peer, message), [NBD_REP_ERR_SHUTDOWN])
  for (const option of [3, 5, 8, 7, 99]) {
    assert.deepEqual(await typesOf(peer, optionMessage(option)), [NBD_REP_ERR_SHUTDOWN], `option ${option}`)
    assert.deepEqual(await typesOf(peer, optionMessage(option, LONG)), [NBD_REP_ERR_SHUTDOWN], `long option ${option}`)
  }
  assert.deepEqual(await typesOf(leaving, optionMessage(2)), [ACK])
  assert.equal((await leaving.rest()).length, 0)
  device.end.resolve()
  await end
  assert.equal((await peer.rest()).length, 0, 'when nobody is served any more the server hangs up')
})

test('Termination of the session: while the server ends, EXPORT_NAME ends the connection, since it cannot be answered', async (t) => {
  const { peers, device, end } = await beginWhileEnding(t)
  const [peer] = peers as [RawPeer]
  peer.send(optionMessage(1))
  assert.equal((await peer.rest()).length, 0)
  device.end.resolve()
  await end
})

test('Fixed newstyle negotiation: options sent ahead of their replies are answered in order', async (t) => {
  const peer = await begin(t)
  peer.send(optionMessage(99), optionMessage(8), optionMessage(3, u32(1)), goMessage(''))
  const found: number[][] = []
  for (let i = 0; i < 5; i++) {
    const { option, type } = await optionReply(peer)
    found.push([option, type])
  }
  assert.deepEqual(found, [
    [99, NBD_REP_ERR_UNSUP],
    [8, ACK],
    [3, NBD_REP_ERR_INVALID],
    [7, 3],
    [7, ACK],
  ])
})
