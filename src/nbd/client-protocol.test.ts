// What the specification asks of a client, sentence by sentence: each test names the section that it states. What the client
// promises of its own is in client.test.ts; the table of sentences is docs/internals/nbd-protocol.md.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import {
  type Script,
  saysChunk,
  saysData,
  saysOption,
  saysSimple,
  saysSize,
  scripted,
} from '../../test/support/nbd-scripted.ts'
import { ACK, u16, u32, u64 } from '../../test/support/nbd-wire.ts'
import { type BlockError, isBlockError } from '../block/error.ts'
import { connectNbd } from './client.ts'
import {
  NBD_OPT_ABORT,
  NBD_REP_ERR_BLOCK_SIZE_REQD,
  NBD_REP_ERR_INVALID,
  NBD_REP_ERR_POLICY,
  NBD_REP_ERR_SHUTDOWN,
  NBD_REP_ERR_TLS_REQD,
  NBD_REP_ERR_UNKNOWN,
  NBD_REP_ERR_UNSUP,
} from './spec.ts'

const [READ, WRITE, DISC] = [0, 1, 2] as const

function fails(kind: BlockError['kind'], text = ''): (error: unknown) => boolean {
  return (error) => isBlockError(error, kind) && error.message.includes(text)
}

async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 2))
}

function readOnce(script: Script['request'] | undefined) {
  return script === undefined ? {} : { request: script }
}

test('Client flags: unknown handshake flags are ignored, and NO_ZEROES is said only to who offers it', async (t) => {
  for (const [flags, expected] of [
    [0xffff, 3],
    [3, 3],
    [1, 1],
  ] as const) {
    const server = await scripted(t, { flags })
    await (await connectNbd(server.uri)).close()
    assert.deepEqual(server.clientFlags, [expected])
  }
})

test('Termination of the session: a client that is refused says ABORT before it goes, and tells why', async (t) => {
  const refusals: [number, BlockError['kind']][] = [
    [NBD_REP_ERR_UNKNOWN, 'not-found'],
    [NBD_REP_ERR_POLICY, 'permission'],
    [NBD_REP_ERR_TLS_REQD, 'permission'],
    [NBD_REP_ERR_SHUTDOWN, 'closed'],
    [NBD_REP_ERR_BLOCK_SIZE_REQD, 'protocol'],
    [NBD_REP_ERR_INVALID, 'protocol'],
  ]
  for (const [type, kind] of refusals) {
    for (const abort of [saysOption(NBD_OPT_ABORT, ACK), 'hang-up'] as const) {
      const server = await scripted(t, { options: { 7: () => saysOption(7, type, Buffer.from('so')), 2: () => abort } })
      await assert.rejects(connectNbd(server.uri), fails(kind, 'so'))
      assert.equal(server.options.at(-1)?.option, NBD_OPT_ABORT)
    }
  }
})

test('Termination of the session: ERR_SHUTDOWN to any option makes the client leave', async (t) => {
  for (const option of [8, 10]) {
    const server = await scripted(t, { options: { [option]: () => saysOption(option, NBD_REP_ERR_SHUTDOWN) } })
    await assert.rejects(connectNbd(server.uri), fails('closed'))
    assert.deepEqual(
      server.options.slice(-2).map((said) => said.option),
      [option, NBD_OPT_ABORT],
    )
  }
})

test('INFO and GO: information and flags that the client does not know are ignored', async (t) => {
  const server = await scripted(t, {
    options: {
      7: () =>
        Buffer.concat([
          saysOption(7, 3, Buffer.concat([u16(77), Buffer.from('news')])),
          saysOption(7, 3, u16(2)),
          saysSize(0xffff & ~2),
          saysOption(7, 3, u16(1)),
          saysOption(7, ACK),
        ]),
    },
  })
  const client = await connectNbd(server.uri)
  assert.equal(client.size, 65_536)
  await client.close()
})

test('EXPORT_NAME: what a server without GO says ends with 124 zeros unless both agreed on none', async (t) => {
  for (const flags of [1, 3]) {
    const server = await scripted(t, {
      flags,
      options: {
        7: () => saysOption(7, NBD_REP_ERR_UNSUP),
        8: () => saysOption(8, NBD_REP_ERR_UNSUP),
        1: () => Buffer.concat([u64(4096), u16(1), Buffer.alloc(flags === 1 ? 124 : 0)]),
      },
      request: (request) => saysSimple(request, 0, Buffer.alloc(request.length, 9)),
    })
    const client = await connectNbd(server.uri)
    const into = Buffer.alloc(512)
    await client.read(0, 512, into, 0)
    assert.ok(into.every((byte) => byte === 9))
    await client.close()
  }
})

test('SET_META_CONTEXT: contexts before an error do not count', async (t) => {
  const context = saysOption(10, 4, Buffer.concat([u32(1), Buffer.from('base:allocation')]))
  const server = await scripted(t, {
    options: { 10: () => Buffer.concat([context, saysOption(10, NBD_REP_ERR_INVALID)]) },
  })
  const client = await connectNbd(server.uri)
  assert.equal(client.can.extents, 'none')
  await client.close()
})

test('Transmission flags: what the server does not offer is not sent', async (t) => {
  const server = await scripted(t, { options: { 7: () => Buffer.concat([saysSize(1), saysOption(7, ACK)]) } })
  const client = await connectNbd(server.uri)
  await client.flush()
  await client.write(0, 512, Buffer.alloc(512), 0, 0)
  await client.zero(0, 512, 0)
  assert.deepEqual([client.can.trim, client.can.fua], ['none', 'emulated'])
  await client.close()
  await until(() => server.ended === 1)
  assert.deepEqual(
    server.requests.map(({ type, flags }) => [type, flags]),
    [
      [WRITE, 0],
      [WRITE, 0],
      [DISC, 0],
    ],
  )
})

test('Size constraints: requests are no longer than the server takes, in multiples of its minimum block', async (t) => {
  const sizes = saysOption(7, 3, Buffer.concat([u16(3), u32(512), u32(4096), u32(5000)]))
  const server = await scripted(t, {
    options: { 7: () => Buffer.concat([sizes, saysSize(), saysOption(7, ACK)]) },
  })
  const client = await connectNbd(server.uri)
  await client.read(0, 16_384, Buffer.alloc(16_384), 0)
  await client.write(512, 8192, Buffer.alloc(8192), 0, 0)
  await client.close()
  for (const { type, offset, length } of server.requests) {
    if (type === DISC) continue
    assert.ok(length <= 5000 && length % 512 === 0 && offset % 512 === 0, `${length} at ${offset}`)
  }
})

test('NBD_CMD_DISC: it comes last, with no offset and no length, after what was in flight', async (t) => {
  const server = await scripted(t)
  const client = await connectNbd(server.uri)
  const reads = Array.from({ length: 20 }, (_, i) => client.read(i * 512, 512, Buffer.alloc(512), 0))
  await client.close()
  await Promise.all(reads)
  await until(() => server.ended === 1)
  assert.equal(server.requests.length, 21)
  const { type, flags, offset, length } = server.requests.at(-1) ?? {}
  assert.deepEqual([type, flags, offset, length], [DISC, 0, 0, 0])
})

test('Terminating the transmission phase: ESHUTDOWN makes the client say DISC, after which it still takes replies', async (t) => {
  const server = await scripted(t, {
    request: (request) => (request.type === READ ? saysData(request) : saysSimple(request, 108)),
  })
  const client = await connectNbd(server.uri)
  const flush = assert.rejects(async () => client.flush(), fails('closed', 'shutting down'))
  const into = Buffer.alloc(512)
  await client.read(0, 512, into, 0)
  await flush
  assert.ok(into.every((byte) => byte === 7))
  await until(() => server.ended === 1)
  assert.equal(server.requests.at(-1)?.type, DISC)
  await assert.rejects(async () => client.read(0, 512, into, 0), fails('closed'))
  await client.close()
})

test('Terminating the transmission phase: a client that may connect again asks again what ESHUTDOWN refused', async (t) => {
  const server = await scripted(t, { request: (request, number) => saysSimple(request, number === 0 ? 108 : 0) })
  const client = await connectNbd(server.uri, { reconnectMs: 5000 })
  await Promise.all([client.flush(), client.write(0, 512, Buffer.alloc(512), 0, 0)])
  assert.equal(client.reconnections, 1)
  await client.close()
})

const error = (errno: number, message: string, more: Buffer = Buffer.alloc(0)): Buffer =>
  Buffer.concat([u32(errno), u16(message.length), Buffer.from(message), more])

test('Structured reply types: an error fails its request, of any error type, before or after data, and nothing else', async (t) => {
  const replies: [string, NonNullable<Script['request']>][] = [
    ['an error', (r) => saysChunk(r, 1, 0x8001, error(5, 'broken'))],
    ['an error with an offset', (r) => saysChunk(r, 1, 0x8002, error(5, 'broken', u64(r.offset + 5)))],
    ['an unknown error', (r) => saysChunk(r, 1, 0x80ff, error(5, 'broken', Buffer.from('more fields')))],
    [
      'an error after data',
      (r) => Buffer.concat([withoutDone(saysData(r)), saysChunk(r, 1, 0x8001, error(5, 'broken'))]),
    ],
    ['an error before data', (r) => Buffer.concat([saysChunk(r, 0, 0x8001, error(5, 'broken')), saysData(r)])],
    ['an error and NONE', (r) => Buffer.concat([saysChunk(r, 0, 0x8001, error(5, 'broken')), saysChunk(r, 1, 0)])],
    [
      'two errors with offsets',
      (r) =>
        Buffer.concat([
          saysChunk(r, 0, 0x8002, error(5, 'broken', u64(r.offset))),
          saysChunk(r, 1, 0x8002, error(22, 'again', u64(r.offset + 9))),
        ]),
    ],
  ]
  for (const [what, reply] of replies) {
    let count = 0
    const server = await scripted(t, { request: (r, n) => (count++ === 0 ? reply(r, n) : saysData(r)) })
    const client = await connectNbd(server.uri)
    await assert.rejects(async () => client.read(512, 512, Buffer.alloc(512), 0), fails('io', 'broken'), what)
    await client.read(0, 512, Buffer.alloc(512), 0)
    await client.close()
  }
})

test('Structured reply types: an error that does not fit its chunk or its request, or has no number, ends the connection', async (t) => {
  const lies: [string, NonNullable<Script['request']>][] = [
    ['too short', (r) => saysChunk(r, 1, 0x8001, u32(5))],
    ['no number', (r) => saysChunk(r, 1, 0x8001, error(0, ''))],
    ['a longer message', (r) => saysChunk(r, 1, 0x8001, Buffer.concat([u32(5), u16(3), Buffer.from('ab')]))],
    ['no offset', (r) => saysChunk(r, 1, 0x8002, error(5, ''))],
    ['a message over the offset', (r) => saysChunk(r, 1, 0x8002, error(5, '12345678'))],
    ['an offset before', (r) => saysChunk(r, 1, 0x8002, error(5, '', u64(511)))],
    ['an offset after', (r) => saysChunk(r, 1, 0x8002, error(5, '', u64(1025)))],
    ['an offset far away', (r) => saysChunk(r, 1, 0x8002, error(5, '', u64(2n ** 64n - 1n)))],
    ['nothing', (r) => saysChunk(r, 1, 0x8001)],
  ]
  for (const [what, lie] of lies) {
    const client = await connectNbd((await scripted(t, readOnce(lie))).uri)
    await assert.rejects(async () => client.read(512, 512, Buffer.alloc(512), 0), fails('protocol'), what)
    await client.close()
  }
})

test('Structured reply flags: unknown ones are ignored', async (t) => {
  const server = await scripted(t, {
    request: (r) => {
      const bytes = saysData(r)
      bytes.writeUInt16BE(0xffff, 4)
      return bytes
    },
  })
  const client = await connectNbd(server.uri)
  const into = Buffer.alloc(512)
  await client.read(0, 512, into, 0)
  assert.ok(into.every((byte) => byte === 7))
  await client.close()
})

test('Error values: a number that nobody defined is as EINVAL, and the connection goes on', async (t) => {
  const server = await scripted(t, { request: (r) => (r.type === READ ? saysData(r) : saysSimple(r, 4711)) })
  const client = await connectNbd(server.uri)
  await assert.rejects(async () => client.flush(), fails('invalid-argument', '4711'))
  await client.read(0, 512, Buffer.alloc(512), 0)
  await client.close()
})

test('NBD_CMD_BLOCK_STATUS: the last descriptor may reach past the range; a context that was not selected is a violation', async (t) => {
  const status = (id: number): Buffer => Buffer.concat([u32(id), u32(4096), u32(3), u32(1_000_000), u32(0)])
  for (const id of [3, 4]) {
    const client = await connectNbd((await scripted(t, { request: (r) => saysChunk(r, 1, 5, status(id)) })).uri)
    const found: number[][] = []
    const asked = client.status('base:allocation', 0, 8192, (length, bits) => found.push([length, bits]) > 0)
    if (id === 3) {
      await asked
      assert.deepEqual(found, [
        [4096, 3],
        [4096, 0],
      ])
    } else await assert.rejects(asked, fails('protocol'))
    await client.close()
  }
})

test('Ordering of messages: replies in any order, and chunks of several replies between each other, are understood', async (t) => {
  const waiting: Buffer[][] = []
  const server = await scripted(t, {
    request: (r) => {
      const half = r.length / 2
      const part = (at: number): Buffer => Buffer.concat([u64(r.offset + at), Buffer.alloc(half, r.offset / 512 + 1)])
      waiting.push([saysChunk(r, 0, 1, part(half)), saysChunk(r, 1, 1, part(0))])
      if (waiting.length < 8) return Buffer.alloc(0)
      return Buffer.concat([
        ...waiting.map(([first]) => first as Buffer),
        ...waiting.reverse().map((all) => all[1] as Buffer),
      ])
    },
  })
  const client = await connectNbd(server.uri)
  const into = Buffer.alloc(8 * 512)
  await Promise.all(Array.from({ length: 8 }, (_, i) => client.read(i * 512, 512, into, i * 512)))
  for (let i = 0; i < 8; i++) assert.ok(into.subarray(i * 512, i * 512 + 512).every((byte) => byte === i + 1))
  await client.close()
})

test('Reserved magic values: replies of other forms of the protocol end the connection', async (t) => {
  for (const magic of [0x9674_4668, 0x6e8a_278c, 0]) {
    const server = await scripted(t, {
      request: (r) => Buffer.concat([u32(magic), u32(0), r.cookie, Buffer.alloc(16)]),
    })
    const client = await connectNbd(server.uri)
    await assert.rejects(async () => client.flush(), fails('protocol'))
    await client.close()
  }
})

function withoutDone(chunk: Buffer): Buffer {
  chunk.writeUInt16BE(0, 4)
  return chunk
}
