// The client: splitting, bounds, contexts, reconnecting, and servers that break the protocol.

import assert from 'node:assert/strict'
import net from 'node:net'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { serveDevice } from '../../test/support/nbd.ts'
import { ACK, u16, u32, u64 } from '../../test/support/nbd-wire.ts'
import { tempFolder } from '../../test/support/temp.ts'
import { NBD_CLIENT_IN_FLIGHT } from '../base/limits.ts'
import { Random, seedOfRun } from '../base/random.ts'
import { type Capabilities, type Pending, ZERO } from '../block/device.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { listExtents } from '../block/extents.ts'
import { Filter } from '../block/filter.ts'
import { MemoryDevice } from '../block/memory.ts'
import { againstModel } from '../../test/contract/device.ts'
import { connectNbd } from './client.ts'
import { type Export, NbdServer } from './server.ts'
import { formatNbdUri } from './uri.ts'

const MIB = 1024 * 1024

function fails(kind: BlockError['kind'], text = ''): (error: unknown) => boolean {
  return (error) => isBlockError(error, kind) && error.message.includes(text)
}

test('connecting fails with the reason: nobody listens, no such export, no URI, TLS', async (t) => {
  const { target } = await serveDevice(t, new MemoryDevice(MIB), { name: 'disk' })
  const wrong = { ...target, name: 'other' }
  await assert.rejects(connectNbd(wrong), fails('not-found', 'other'))
  await assert.rejects(connectNbd('nbd+unix:///x?socket=/nowhere/at/all'), fails('not-found', '/nowhere/at/all'))
  await assert.rejects(connectNbd('nbd://127.0.0.1:1/'), fails('io', '127.0.0.1:1'))
  await assert.rejects(connectNbd('/dev/sda'), fails('invalid-argument'))
  await assert.rejects(connectNbd('nbds://localhost/?tls-certificates=/nowhere'), fails('not-found', 'ca-cert.pem'))
  const client = await connectNbd(formatNbdUri(target))
  assert.equal(client.name, formatNbdUri(target))
  await client.close()
})

test('a request longer than the server takes is split and arrives whole', async (t) => {
  const memory = new MemoryDevice(80 * MIB)
  const { target } = await serveDevice(t, memory)
  const client = await connectNbd(target)
  const data = Buffer.alloc(70 * MIB, 'varve')
  await client.write(12_345, data.length, data, 0, 0)
  const back = Buffer.alloc(data.length)
  await client.read(12_345, back.length, back, 0)
  assert.ok(back.equals(data))
  await client.close()
})

test('what the server can is what the client can', async (t) => {
  class Poor extends Filter {
    override get can(): Capabilities {
      return { ...super.can, zero: 'none', trim: 'none', minimumBlock: 512, bestBlock: 65_536 }
    }
  }
  const poor = await serveDevice(t, new Poor(new MemoryDevice(MIB)))
  const client = await connectNbd(poor.target)
  const expected = { write: true, fua: 'native', zero: 'emulated', trim: 'none', extents: 'native' }
  assert.deepEqual(client.can, { ...expected, minimumBlock: 512, bestBlock: 65_536 })
  await client.write(0, MIB, Buffer.alloc(MIB, 1), 0, 0)
  await client.zero(512, MIB - 1024, 0)
  const back = Buffer.alloc(MIB)
  await client.read(0, MIB, back, 0)
  assert.ok(back.every((byte, at) => byte === (at < 512 || at >= MIB - 512 ? 1 : 0)))
  await client.close()
  const readOnly = await serveDevice(t, new MemoryDevice(MIB), { readOnly: true })
  const reader = await connectNbd(readOnly.target)
  assert.equal(reader.can.write, false)
  await assert.rejects(async () => reader.write(0, 512, Buffer.alloc(512), 0, 0), fails('read-only'))
  await reader.close()
})

test('an error of the server keeps its kind and its words', async (t) => {
  class Full extends Filter {
    override write(): Pending {
      throw new BlockError('no-space', 'the thin pool is full')
    }
  }
  const { target } = await serveDevice(t, new Full(new MemoryDevice(MIB)))
  const client = await connectNbd(target)
  await assert.rejects(async () => client.write(0, 512, Buffer.alloc(512), 0, 0), fails('no-space', 'thin pool'))
  await client.read(0, 512, Buffer.alloc(512), 0)
  await client.close()
})

test('extents of a range with thousands of pieces are complete, though a reply holds only some', async (t) => {
  const memory = new MemoryDevice(80 * MIB)
  for (let at = 0; at < memory.size; at += 8192) await memory.write(at, 1, Buffer.of(1), 0, 0)
  const { target } = await serveDevice(t, memory)
  const client = await connectNbd(target)
  const found = await listExtents(client, 4096, memory.size - 4096)
  assert.deepEqual(found, await listExtents(memory, 4096, memory.size - 4096))
  assert.equal(found.length, memory.size / 4096 - 1)
  await client.close()
})

test('another metadata context is asked by its name, and an unknown one is unsupported', async (t) => {
  const daily = {
    name: 'qemu:dirty-bitmap:daily',
    extents: (_offset: number, length: number, visit: (length: number, status: number) => boolean): Pending => {
      if (visit(512, 1)) visit(length - 512, 0)
      return undefined
    },
  }
  const { target } = await serveDevice(t, new MemoryDevice(MIB), { contexts: [daily] })
  const client = await connectNbd(target, { contexts: [daily.name, 'qemu:dirty-bitmap:none'] })
  assert.deepEqual([...client.contexts].sort(), ['base:allocation', daily.name])
  const found: number[][] = []
  await client.status(daily.name, 4096, 8192, (length, status) => found.push([length, status]) > 0)
  assert.deepEqual(found, [
    [512, 1],
    [7680, 0],
  ])
  assert.equal((await listExtents(client, 0, MIB))[0]?.extent, 1 | ZERO)
  await assert.rejects(
    client.status('qemu:dirty-bitmap:none', 0, 512, () => true),
    fails('unsupported'),
  )
  await client.close()
})

test('requests beyond the bound wait their turn, and all complete', async (t) => {
  let [now, most] = [0, 0]
  class Slow extends Filter {
    override async read(offset: number, length: number, into: Uint8Array, at: number): Promise<void> {
      most = Math.max(most, ++now)
      await new Promise((resolve) => setImmediate(resolve))
      await super.read(offset, length, into, at)
      now--
    }
  }
  const memory = new MemoryDevice(4 * MIB)
  new Random(1).fill(memory.bytes)
  const { target } = await serveDevice(t, new Slow(memory))
  const client = await connectNbd(target)
  const count = NBD_CLIENT_IN_FLIGHT * 10
  const back = Buffer.alloc(count * 512)
  await Promise.all(Array.from({ length: count }, (_, i) => client.read(i * 512, 512, back, i * 512)))
  assert.ok(back.equals(memory.bytes.subarray(0, count * 512)))
  assert.ok(most <= NBD_CLIENT_IN_FLIGHT, `${most} at once`)
  await client.close()
})

interface Restartable {
  readonly uri: string
  start(): Promise<void>
  stop(): void
}

/** A server on one socket that can be cut off, as by kill -9, and started again. */
function restartable(t: TestContext, makeExport: () => Export): Restartable {
  const socket = path.join(tempFolder(t), 'nbd.sock')
  const servers: NbdServer[] = []
  const proxied = new Set<net.Socket>()
  let front: net.Server | undefined
  t.after(async () => {
    front?.close()
    for (const each of proxied) each.destroy()
    await Promise.all(servers.map((server) => server.close()))
  })
  return {
    uri: formatNbdUri({ transport: 'unix', path: socket, name: '' }),
    start: async () => {
      const served = makeExport()
      const server = new NbdServer({ find: () => served, list: () => [served] })
      servers.push(server)
      const port = await server.listenTcp('127.0.0.1', 0)
      front = net.createServer((client) => {
        const back = net.connect(port, '127.0.0.1')
        for (const [from, to] of [
          [client, back],
          [back, client],
        ] as const) {
          proxied.add(from)
          from.pipe(to)
          from.on('error', () => to.destroy())
          from.on('close', () => to.destroy())
        }
      })
      await new Promise<void>((resolve) => front?.listen(socket, resolve))
    },
    stop: () => {
      front?.close()
      for (const each of proxied) each.destroy()
      proxied.clear()
    },
  }
}

test('without reconnecting, a lost connection fails what is in flight and all that follows', async (t) => {
  const cut = restartable(t, () => ({ name: '', device: new MemoryDevice(MIB) }))
  await cut.start()
  const client = await connectNbd(cut.uri)
  const pending = Promise.all([client.read(0, 512, Buffer.alloc(512), 0), client.flush()])
  cut.stop()
  await assert.rejects(pending, fails('io'))
  await assert.rejects(async () => client.flush(), fails('io'))
  await client.close()
})

for (const connections of [1, 4]) {
  test(`random work over ${connections} connections that are cut off again and again loses nothing`, async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    const memory = new MemoryDevice(2 * MIB)
    const cut = restartable(t, () => ({ name: '', device: memory }))
    await cut.start()
    const client = await connectNbd(cut.uri, { reconnectMs: 10_000, connections })
    let isDone = false
    const trouble = (async () => {
      while (!isDone) {
        await new Promise((resolve) => setTimeout(resolve, random.between(5, 40)))
        cut.stop()
        await new Promise((resolve) => setTimeout(resolve, random.below(20)))
        await cut.start()
      }
    })()
    await againstModel(client, random, 300)
    const buffers = Array.from({ length: 64 }, (_, i) => Buffer.alloc(32_768, i + 1))
    await Promise.all(buffers.map((buffer, i) => client.write(i * 32_768, 32_768, buffer, 0, 0)))
    assert.ok(buffers.every((buffer, i) => buffer.equals(memory.bytes.subarray(i * 32_768, (i + 1) * 32_768))))
    isDone = true
    await trouble
    assert.ok(client.reconnections > 0, `${client.reconnections} reconnections`)
    await client.close()
  })
}

test('several connections share the work, to a server that promises that they see the same', async (t) => {
  for (const multiConn of [true, false]) {
    const { server, target } = await serveDevice(t, new MemoryDevice(MIB), { multiConn })
    const client = await connectNbd(target, { connections: 3 })
    assert.equal(client.connections, multiConn ? 3 : 1)
    assert.equal(server.connections, client.connections)
    const data = Buffer.alloc(MIB, 9)
    await Promise.all(Array.from({ length: 256 }, (_, i) => client.write(i * 4096, 4096, data, i * 4096, 0)))
    await client.flush()
    const back = Buffer.alloc(MIB)
    await client.read(0, MIB, back, 0)
    assert.ok(back.equals(data))
    await client.close()
  }
})

test('when the server stays away, requests fail with timeout after the time given', async (t) => {
  const cut = restartable(t, () => ({ name: '', device: new MemoryDevice(MIB) }))
  await cut.start()
  const client = await connectNbd(cut.uri, { reconnectMs: 150 })
  cut.stop()
  const began = performance.now()
  await assert.rejects(async () => client.read(0, 512, Buffer.alloc(512), 0), fails('timeout', 'did not come back'))
  assert.ok(performance.now() - began < 3000)
  await client.close()
})

test('an export that changed its size meanwhile is not taken for the same', async (t) => {
  let size = MIB
  const cut = restartable(t, () => ({ name: '', device: new MemoryDevice(size) }))
  await cut.start()
  const client = await connectNbd(cut.uri, { reconnectMs: 5000 })
  cut.stop()
  size = 2 * MIB
  await cut.start()
  await assert.rejects(async () => client.read(0, 512, Buffer.alloc(512), 0), fails('protocol', 'another one'))
  await client.close()
})

test('a client that gives a silent server up fails what is in flight and all that follows with its reason', async (t) => {
  const held: (() => void)[] = []
  class Silent extends Filter {
    override read(): Pending {
      return new Promise((resolve) => held.push(resolve))
    }
  }
  const { target } = await serveDevice(t, new Silent(new MemoryDevice(MIB)), { multiConn: true })
  const client = await connectNbd(target, { connections: 2, reconnectMs: 60_000 })
  const into = Buffer.alloc(4096)
  const reads = [0, 4096, 8192].map((offset) => client.read(offset, 4096, into, 0) as Promise<void>)
  client.abandon(new BlockError('timeout', 'no answer'))
  for (const read of reads) await assert.rejects(read, fails('timeout', 'no answer'))
  await assert.rejects(async () => client.flush(), fails('timeout', 'no answer'))
  await client.close()
  for (const end of held) end()
})

test('close waits for what is in flight', async (t) => {
  const { target } = await serveDevice(t, new MemoryDevice(MIB))
  const client = await connectNbd(target)
  const back = Buffer.alloc(4096, 1)
  const read = client.read(0, 4096, back, 0)
  await client.close()
  await read
  assert.ok(back.every((byte) => byte === 0))
})

const GREETING = Buffer.concat([Buffer.from('NBDMAGICIHAVEOPT'), u16(3)])

function optionReply(option: number, type: number, data: Buffer = Buffer.alloc(0)): Buffer {
  return Buffer.concat([Buffer.from('0003e889045565a9', 'hex'), u32(option), u32(type), u32(data.length), data])
}

const GO_INFO = optionReply(7, 3, Buffer.concat([u16(0), u64(65_536), u16(0b101101)]))
const SHORT_INFO = optionReply(7, 3, Buffer.concat([u16(0), u32(1)]))
const META = optionReply(10, 4, Buffer.concat([u32(3), Buffer.from('base:allocation')]))

/** A server that says what it is told to say, one message per message received. */
async function liar(t: TestContext, answers: ((received: Buffer) => Buffer)[]): Promise<string> {
  const socket = path.join(tempFolder(t), 'nbd.sock')
  const server = net.createServer((client) => {
    let turn = 0
    client.on('error', () => {})
    client.on('data', (received) => {
      const answer = answers[turn++]
      if (answer !== undefined) client.write(answer(received))
    })
    client.write(GREETING)
  })
  await new Promise<void>((resolve) => server.listen(socket, resolve))
  t.after(() => server.close())
  return formatNbdUri({ transport: 'unix', path: socket, name: '' })
}

/** The handshake of a server with structured replies and base:allocation; the first message has two parts. */
const HANDSHAKE = [
  () => optionReply(8, ACK),
  () => Buffer.concat([META, optionReply(10, ACK)]),
  () => Buffer.concat([GO_INFO, optionReply(7, ACK)]),
]

/** A chunk with the cookie of the request received. */
function lyingChunk(received: Buffer, flags: number, type: number, payload: Buffer, length = payload.length): Buffer {
  return Buffer.concat([u32(0x668e_33ef), u16(flags), u16(type), received.subarray(8, 16), u32(length), payload])
}

test('a server that breaks the protocol in transmission is a protocol error, and the connection ends', async (t) => {
  const data = (offset: number, length: number): Buffer => Buffer.concat([u64(offset), Buffer.alloc(length, 7)])
  const lies: [string, (received: Buffer) => Buffer][] = [
    ['garbage', () => Buffer.alloc(64, 0x55)],
    ['another cookie', (r) => Buffer.concat([u32(0x6744_6698), u32(0), u64(r.readBigUInt64BE(8) + 1n)])],
    ['a simple reply to a structured read', (r) => Buffer.concat([u32(0x6744_6698), u32(0), r.subarray(8, 16)])],
    ['data before the range', (r) => lyingChunk(r, 1, 1, data(0, 512))],
    ['data after the range', (r) => lyingChunk(r, 1, 1, data(4096 + 512, 1))],
    ['too much data', (r) => lyingChunk(r, 1, 1, data(4096, 513))],
    ['an enormous length', (r) => lyingChunk(r, 1, 1, data(4096, 1), 0xffff_ffff)],
    ['no data in a data chunk', (r) => lyingChunk(r, 1, 1, u64(4096))],
    ['too little data', (r) => lyingChunk(r, 1, 1, data(4096, 511))],
    [
      'the same data twice',
      (r) => Buffer.concat([lyingChunk(r, 0, 1, data(4096, 512)), lyingChunk(r, 1, 1, data(4096, 512))]),
    ],
    ['success without data', (r) => lyingChunk(r, 1, 0, Buffer.alloc(0))],
    ['a hole of the wrong form', (r) => lyingChunk(r, 1, 2, u64(4096))],
    ['a hole outside', (r) => lyingChunk(r, 1, 2, Buffer.concat([u64(0), u32(512)]))],
    ['a block status for a read', (r) => lyingChunk(r, 1, 5, Buffer.concat([u32(3), u32(512), u32(0)]))],
    ['an unknown chunk', (r) => lyingChunk(r, 1, 99, Buffer.alloc(0))],
    ['an error without a number', (r) => lyingChunk(r, 1, 0x8001, Buffer.alloc(6))],
    ['an error message longer than its chunk', (r) => lyingChunk(r, 1, 0x8001, Buffer.concat([u32(5), u16(9)]))],
    ['an endless error', (r) => lyingChunk(r, 1, 0x8001, Buffer.alloc(6), 0x7fff_ffff)],
  ]
  for (const [what, lie] of lies) {
    const client = await connectNbd(await liar(t, [...HANDSHAKE, lie]), { reconnectMs: 60_000 })
    await assert.rejects(async () => client.read(4096, 512, Buffer.alloc(512), 0), fails('protocol'), what)
    await client.close()
  }
})

test('chunks of a read in any order, with holes, are put together', async (t) => {
  const client = await connectNbd(
    await liar(t, [
      ...HANDSHAKE,
      (r) =>
        Buffer.concat([
          lyingChunk(r, 0, 1, Buffer.concat([u64(4096 + 300), Buffer.alloc(212, 3)])),
          lyingChunk(r, 0, 2, Buffer.concat([u64(4096 + 100), u32(200)])),
          lyingChunk(r, 0, 1, Buffer.concat([u64(4096), Buffer.alloc(100, 1)])),
          lyingChunk(r, 1, 0, Buffer.alloc(0)),
        ]),
    ]),
  )
  const into = Buffer.alloc(520, 9)
  await client.read(4096, 512, into, 4)
  const expected = [
    Buffer.alloc(4, 9),
    Buffer.alloc(100, 1),
    Buffer.alloc(200),
    Buffer.alloc(212, 3),
    Buffer.alloc(4, 9),
  ]
  assert.ok(into.equals(Buffer.concat(expected)))
  await client.close()
})

test('a server that breaks the protocol in the handshake is a protocol error', async (t) => {
  const lies: [string, (() => Buffer)[]][] = [
    ['garbage', [() => Buffer.alloc(64, 0x55)]],
    ['a reply to another option', [() => optionReply(3, ACK)]],
    ['an enormous reply', [() => Buffer.concat([optionReply(8, ACK).subarray(0, 16), u32(0x7fff_ffff)])]],
    ['no size', [...HANDSHAKE.slice(0, 2), () => optionReply(7, ACK)]],
    ['a short size', [...HANDSHAKE.slice(0, 2), () => Buffer.concat([SHORT_INFO, optionReply(7, ACK)])]],
    [
      'absurd block sizes',
      [
        ...HANDSHAKE.slice(0, 2),
        () =>
          Buffer.concat([
            GO_INFO,
            optionReply(7, 3, Buffer.concat([u16(3), u32(3), u32(4096), u32(65_536)])),
            optionReply(7, ACK),
          ]),
      ],
    ],
  ]
  for (const [what, answers] of lies) {
    await assert.rejects(connectNbd(await liar(t, answers)), fails('protocol'), what)
  }
})

test('a server that knows neither structured replies nor GO is served by EXPORT_NAME', async (t) => {
  const unsupported = (option: number) => () => optionReply(option, 0x8000_0001)
  const uri = await liar(t, [
    unsupported(8),
    unsupported(7),
    () => Buffer.concat([u64(65_536), u16(0b101)]),
    (received) => Buffer.concat([u32(0x6744_6698), u32(0), received.subarray(8, 16), Buffer.alloc(512, 4)]),
  ])
  const client = await connectNbd(uri)
  assert.equal(client.size, 65_536)
  assert.deepEqual([client.can.extents, client.can.zero, client.can.trim], ['none', 'emulated', 'none'])
  const into = Buffer.alloc(512)
  await client.read(0, 512, into, 0)
  assert.ok(into.every((byte) => byte === 4))
  await client.close()
})

test('an old server is unsupported, and one that is no NBD server a protocol error', async (t) => {
  for (const [greeting, kind] of [
    [Buffer.concat([Buffer.from('NBDMAGIC'), Buffer.from('0000420281861253', 'hex'), u64(1)]), 'unsupported'],
    [Buffer.from('SSH-2.0-OpenSSH_9.2p1 Debian-2'), 'protocol'],
  ] as const) {
    const socket = path.join(tempFolder(t), 'nbd.sock')
    const server = net.createServer((client) => client.on('error', () => {}).end(greeting))
    await new Promise<void>((resolve) => server.listen(socket, resolve))
    t.after(() => server.close())
    await assert.rejects(connectNbd(`nbd+unix:///?socket=${socket}`), fails(kind))
  }
})
