// The server's transmission phase against the text of the specification ("Transmission", "Request types", "Error values"),
// and what it promises of its own: batches, slow devices, bounds, and an orderly end.

import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { Random } from '../base/random.ts'
import { type Capabilities, HOLE, type Pending, ZERO } from '../block/device.ts'
import { BlockError, ERROR_KINDS, type ErrorKind } from '../block/error.ts'
import { Filter } from '../block/filter.ts'
import { MemoryDevice } from '../block/memory.ts'
import { NBD_CONNECTION_BYTES, NBD_REQUESTS_IN_FLIGHT } from '../base/limits.ts'
import { RawPeer, type Served, type ServeOptions, serveDevice } from '../../test/support/nbd.ts'
import { chunk, enter, requestMessage, simpleReply } from '../../test/support/nbd-wire.ts'
import { sharedBuffersInUse } from './shared-buffer.ts'
import { KIND_ERRNO, kindOfErrno } from './spec.ts'

const SIZE = 4 * 1024 * 1024

interface Setup extends Served {
  readonly peer: RawPeer
}

async function setUp(
  t: TestContext,
  device: Filter | MemoryDevice = new MemoryDevice(SIZE),
  options: ServeOptions & { readonly structured?: boolean; readonly select?: string[] } = {},
): Promise<Setup> {
  const { structured = false, select = [], ...rest } = options
  const served = await serveDevice(t, device, rest)
  const peer = new RawPeer(served.target)
  t.after(() => peer.socket.destroy())
  await enter(peer, structured, select)
  return { ...served, peer }
}

async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 2))
}

/** A device whose requests wait until they are let go, or fail as told. */
class SlowDevice extends Filter {
  readonly held: (() => void)[] = []
  failure: unknown

  #hold(work: () => Pending): Promise<void> {
    return new Promise<void>((resolve) => this.held.push(resolve)).then(() => {
      if (this.failure !== undefined) throw this.failure
      return work()
    })
  }

  release(): void {
    for (const letGo of this.held.splice(0)) letGo()
  }

  override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.#hold(() => super.read(offset, length, into, at))
  }

  override write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    return this.#hold(() => super.write(offset, length, from, at, flags))
  }

  override flush(): Pending {
    return this.#hold(() => super.flush())
  }
}

class FailingDevice extends Filter {
  failure: unknown
  override read(): Pending {
    throw this.failure
  }
  override flush(): Pending {
    return Promise.reject(this.failure as Error)
  }
}

test('a simple read is answered with its data behind the header (Simple reply message)', async (t) => {
  const device = new MemoryDevice(SIZE)
  new Random(1).fill(device.bytes.subarray(0, 8192))
  const { peer } = await setUp(t, device)
  peer.send(requestMessage({ type: 0, cookie: 0xfedc_ba98_7654_3210n, offset: 100, length: 5000 }))
  assert.equal(await simpleReply(peer, 0xfedc_ba98_7654_3210n), 0)
  assert.deepEqual(await peer.receive(5000), Buffer.from(device.bytes.subarray(100, 5100)))
})

test('a structured read is one data chunk with its offset, marked as done (Structured reply types)', async (t) => {
  const device = new MemoryDevice(SIZE)
  new Random(1).fill(device.bytes.subarray(0, 8192))
  const { peer } = await setUp(t, device, { structured: true })
  peer.send(requestMessage({ type: 0, cookie: 7, offset: 4096, length: 512 }))
  const reply = await chunk(peer)
  assert.deepEqual([reply.flags, reply.type, reply.cookie], [1, 1, 7n])
  assert.equal(reply.data.readBigUInt64BE(0), 4096n)
  assert.deepEqual(reply.data.subarray(8), Buffer.from(device.bytes.subarray(4096, 4608)))
})

test('a long structured read of zeros is a hole, unless the client asks for one piece with DF', async (t) => {
  const { peer } = await setUp(t, undefined, { structured: true })
  peer.send(requestMessage({ type: 0, offset: 65_536, length: 1_000_000 }))
  const hole = await chunk(peer)
  assert.deepEqual([hole.flags, hole.type], [1, 2])
  assert.equal(hole.data.toString('hex'), '0000000000010000000f4240')
  peer.send(requestMessage({ type: 0, flags: 4, offset: 65_536, length: 1_000_000 }))
  const data = await chunk(peer)
  assert.deepEqual([data.type, data.data.length], [1, 1_000_008])
})

test('reads of no bytes are answered and harm nothing, simple and structured', async (t) => {
  const simple = await setUp(t)
  simple.peer.send(requestMessage({ type: 0, length: 0 }))
  assert.equal(await simpleReply(simple.peer), 0)
  const structured = await setUp(t, undefined, { structured: true })
  structured.peer.send(requestMessage({ type: 0, length: 0 }))
  const none = await chunk(structured.peer)
  assert.deepEqual([none.flags, none.type, none.data.length], [1, 0, 0])
})

test('writes of every size arrive whole, however they are cut on the way', async (t) => {
  const device = new MemoryDevice(SIZE)
  const { peer } = await setUp(t, device)
  const random = new Random(5)
  const expected = Buffer.alloc(SIZE)
  for (const length of [1, 512, 4096, 65_535, 65_536, 65_537, 262_144, 1_048_576, 3_000_001]) {
    const data = random.fill(Buffer.alloc(length))
    const offset = random.below(SIZE - length)
    expected.set(data, offset)
    const message = requestMessage({ type: 1, offset, data })
    for (let at = 0; at < message.length; ) {
      const piece = random.chance(0.3) ? random.between(1, 40) : random.between(1, 400_000)
      peer.send(message.subarray(at, at + piece))
      at += piece
      await new Promise((resolve) => setImmediate(resolve))
    }
    assert.equal(await simpleReply(peer), 0)
  }
  assert.ok(expected.equals(device.bytes))
})

test('a thousand requests in one piece are all answered, each with its own cookie', async (t) => {
  const device = new MemoryDevice(SIZE)
  const { peer } = await setUp(t, device)
  const messages: Buffer[] = []
  for (let i = 0; i < 500; i++) {
    messages.push(requestMessage({ type: 1, cookie: i * 2, offset: i * 4096, data: Buffer.alloc(4096, i) }))
    messages.push(requestMessage({ type: 0, cookie: i * 2 + 1, offset: i * 4096, length: 4096 }))
  }
  peer.send(...messages)
  for (let i = 0; i < 500; i++) {
    assert.equal(await simpleReply(peer, i * 2), 0)
    assert.equal(await simpleReply(peer, i * 2 + 1), 0)
    assert.ok((await peer.receive(4096)).every((byte) => byte === (i & 255)))
  }
})

test('zeroing keeps or drops the allocation as NO_HOLE says, and FAST_ZERO is refused where zeroing is not fast', async (t) => {
  const flags: number[] = []
  class Zeroing extends Filter {
    speed: Capabilities['zero'] = 'native'
    override get can(): Capabilities {
      return { ...super.can, zero: this.speed }
    }
    override zero(offset: number, length: number, flag: number): Pending {
      flags.push(flag)
      return super.zero(offset, length, flag)
    }
  }
  const device = new Zeroing(new MemoryDevice(SIZE))
  const { peer } = await setUp(t, device)
  for (const flag of [0, 2, 1 | 2, 16]) {
    peer.send(requestMessage({ type: 6, flags: flag, length: 4096 }))
    assert.equal(await simpleReply(peer), 0)
  }
  assert.deepEqual(flags, [2, 0, 1, 2])
  device.speed = 'emulated'
  peer.send(requestMessage({ type: 6, flags: 16, length: 4096 }))
  assert.equal(await simpleReply(peer), 95)
  assert.equal(flags.length, 4)
})

test('FUA reaches the device with write, zero and trim, and is accepted on every command', async (t) => {
  const seen: number[] = []
  class Watch extends Filter {
    override write(o: number, l: number, from: Uint8Array, at: number, flags: number): Pending {
      seen.push(flags)
      return super.write(o, l, from, at, flags)
    }
    override trim(o: number, l: number, flags: number): Pending {
      seen.push(flags)
      return super.trim(o, l, flags)
    }
  }
  const { peer } = await setUp(t, new Watch(new MemoryDevice(SIZE)))
  peer.send(requestMessage({ type: 1, flags: 1, data: Buffer.alloc(512) }))
  assert.equal(await simpleReply(peer), 0)
  peer.send(requestMessage({ type: 4, flags: 1, length: 512 }))
  assert.equal(await simpleReply(peer), 0)
  assert.deepEqual(seen, [1, 1])
  for (const type of [3, 5]) {
    peer.send(requestMessage({ type, flags: 1 }))
    assert.equal(await simpleReply(peer), 0)
  }
})

test('bad requests are answered with the error that the text names, and the connection goes on (Error values)', async (t) => {
  const { peer } = await setUp(t)
  const cases: [string, Parameters<typeof requestMessage>[0], number][] = [
    ['read past the end', { type: 0, offset: SIZE - 1, length: 2 }, 22],
    ['read far outside', { type: 0, offset: 2n ** 63n, length: 512 }, 22],
    ['write past the end', { type: 1, offset: SIZE - 1, data: Buffer.alloc(2) }, 28],
    ['zero past the end', { type: 6, offset: SIZE, length: 1 }, 28],
    ['trim past the end', { type: 4, offset: SIZE, length: 1 }, 22],
    ['cache past the end', { type: 5, offset: SIZE, length: 1 }, 22],
    ['read too long', { type: 0, length: 0x8000_0000 }, 22],
    ['cache far too much', { type: 5, length: 0x8000_0000 }, 22],
    ['unknown command', { type: 77 }, 22],
    ['unknown flag', { type: 0, flags: 0x8000, length: 512 }, 22],
    ['flag of another command', { type: 1, flags: 8, data: Buffer.alloc(512) }, 22],
    ['DF without structured replies', { type: 0, flags: 4, length: 512 }, 22],
    ['flush with an offset', { type: 3, offset: 4096 }, 22],
    ['block status without a context', { type: 7, length: 4096 }, 22],
  ]
  for (const [what, parts, errno] of cases) {
    peer.send(requestMessage(parts))
    assert.equal(await simpleReply(peer), errno, what)
  }
  peer.send(requestMessage({ type: 0, length: 1 }))
  assert.equal(await simpleReply(peer), 0)
})

test('a read-only export refuses every change with EPERM and takes the data of a refused write away', async (t) => {
  const device = new MemoryDevice(SIZE)
  const { peer } = await setUp(t, device, { readOnly: true })
  for (const parts of [
    { type: 1, data: Buffer.alloc(100_000, 1) },
    { type: 4, length: 512 },
    { type: 6, length: 512 },
  ]) {
    peer.send(requestMessage(parts))
    assert.equal(await simpleReply(peer), 1)
  }
  assert.ok(device.bytes.every((byte) => byte === 0))
})

test('each kind of error has an NBD error, thrown in the call or later, with its message when structured', async (t) => {
  const device = new FailingDevice(new MemoryDevice(SIZE))
  const { peer } = await setUp(t, device, { structured: true })
  for (const kind of ERROR_KINDS) {
    device.failure = new BlockError(kind, `the ${kind} happened`)
    for (const parts of [{ type: 0, length: 4096 }, { type: 3 }]) {
      peer.send(requestMessage(parts))
      const reply = await chunk(peer)
      assert.deepEqual([reply.flags, reply.type], [1, 0x8001])
      assert.equal(reply.data.readUInt32BE(0), KIND_ERRNO[kind], kind)
      assert.equal(reply.data.toString('utf8', 6), `the ${kind} happened`)
      assert.equal(reply.data.readUInt16BE(4), reply.data.length - 6)
    }
  }
})

test('every NBD error that a kind becomes comes back as a kind of the same meaning', () => {
  const meaning: Partial<Record<ErrorKind, ErrorKind>> = { io: 'io', 'no-space': 'no-space', 'read-only': 'read-only' }
  for (const [kind, back] of Object.entries(meaning)) assert.equal(kindOfErrno(KIND_ERRNO[kind as ErrorKind]), back)
  assert.equal(kindOfErrno(4711), 'invalid-argument')
})

test('a fault that is no BlockError is EIO to the client, hides its text, and is reported', async (t) => {
  const reports: unknown[] = []
  const device = new FailingDevice(new MemoryDevice(SIZE))
  device.failure = new TypeError('secret')
  const { peer } = await setUp(t, device, { structured: true, report: (error) => reports.push(error) })
  peer.send(requestMessage({ type: 0, length: 4096 }))
  const reply = await chunk(peer)
  assert.equal(reply.data.readUInt32BE(0), 5)
  assert.ok(!reply.data.includes('secret'))
  assert.deepEqual(reports, [device.failure])
})

test('block status joins extents, stops at one when asked, and answers every selected context', async (t) => {
  const device = new MemoryDevice(SIZE)
  await device.write(8192, 4096, Buffer.alloc(4096, 1), 0, 0)
  const bits = {
    name: 'x-test:bits',
    extents: (_o: number, length: number, visit: (length: number, status: number) => boolean) =>
      Promise.resolve().then(() => {
        if (visit(4096, 1)) visit(length - 4096, 0xffff_ffff)
      }),
  }
  const setup = { structured: true, contexts: [bits], select: ['base:allocation', bits.name] }
  const { peer } = await setUp(t, device, setup)
  const pairs = (data: Buffer): number[][] => {
    const found: number[][] = []
    for (let at = 4; at < data.length; at += 8) found.push([data.readUInt32BE(at), data.readUInt32BE(at + 4)])
    return found
  }
  peer.send(requestMessage({ type: 7, length: 65_536 }))
  const [base, other] = [await chunk(peer), await chunk(peer)]
  assert.deepEqual([base.type, base.flags, other.type, other.flags], [5, 0, 5, 1])
  assert.notEqual(base.data.readUInt32BE(0), other.data.readUInt32BE(0))
  assert.deepEqual(pairs(base.data), [
    [8192, HOLE | ZERO],
    [4096, 0],
    [53_248, HOLE | ZERO],
  ])
  assert.deepEqual(pairs(other.data), [
    [4096, 1],
    [61_440, 0xffff_ffff],
  ])
  peer.send(requestMessage({ type: 7, flags: 8, offset: 8192, length: 65_536 }))
  assert.deepEqual(pairs((await chunk(peer)).data), [[4096, 0]])
  assert.deepEqual(pairs((await chunk(peer)).data), [[4096, 1]])
  for (const parts of [{ offset: SIZE - 1, length: 2 }, { length: 0 }]) {
    peer.send(requestMessage({ type: 7, ...parts }))
    assert.equal((await chunk(peer)).data.readUInt32BE(0), 22)
  }
})

test('block status of more extents than one reply holds stops early', async (t) => {
  const device = new MemoryDevice(64 * 1024 * 1024)
  for (let at = 0; at < device.size; at += 8192) await device.write(at, 1, Buffer.of(1), 0, 0)
  const { peer } = await setUp(t, device, { structured: true, select: ['base:allocation'] })
  peer.send(requestMessage({ type: 7, length: device.size }))
  assert.equal((await chunk(peer)).data.length, 4 + 4096 * 8)
})

test('slow requests are answered as they complete, out of order, and read what they should', async (t) => {
  const memory = new MemoryDevice(SIZE)
  const device = new SlowDevice(memory)
  const { peer } = await setUp(t, device)
  const sent = Buffer.alloc(8192, 9)
  peer.send(
    requestMessage({ type: 1, cookie: 1, data: sent }),
    requestMessage({ type: 0, cookie: 2, offset: 65_536, length: 4096 }),
    requestMessage({ type: 3, cookie: 3 }),
    requestMessage({ type: 77, cookie: 4 }),
  )
  assert.equal(await simpleReply(peer, 4), 22)
  await until(() => device.held.length === 3)
  device.held.splice(1, 1)[0]?.()
  assert.equal(await simpleReply(peer, 2), 0)
  assert.ok((await peer.receive(4096)).every((byte) => byte === 0))
  device.release()
  assert.equal(await simpleReply(peer, 1), 0)
  assert.equal(await simpleReply(peer, 3), 0)
  assert.ok(memory.bytes.subarray(0, 8192).every((byte) => byte === 9))
})

test('data of slow writes stays as it was while more arrives in the same buffer', async (t) => {
  const memory = new MemoryDevice(SIZE)
  const device = new SlowDevice(memory)
  const { peer } = await setUp(t, device)
  const random = new Random(3)
  const model = Buffer.alloc(SIZE)
  let cookie = 0
  for (let round = 0; round < 12; round++) {
    const messages: Buffer[] = []
    for (let i = 0; i < 10; i++) {
      const data = random.fill(Buffer.alloc(random.pick([512, 4096, 30_000, 80_000])))
      const offset = (i * 100_000 + round * 4096) % (SIZE - 100_000)
      model.set(data, offset)
      messages.push(requestMessage({ type: 1, cookie: cookie++, offset, data }))
    }
    peer.send(...messages)
    // Long writes may come to the device in pieces, and writes of one round do not overlap.
    await until(() => device.held.length >= 10)
    const releasing = setInterval(() => device.release(), 1)
    const answered = new Set<bigint>()
    for (let i = 0; i < 10; i++) {
      const reply = await peer.receive(16)
      assert.equal(reply.readUInt32BE(4), 0)
      answered.add(reply.readBigUInt64BE(8))
    }
    clearInterval(releasing)
    assert.equal(answered.size, 10)
  }
  assert.ok(model.equals(memory.bytes))
})

test('a connection has a bounded number of requests in flight and goes on when they complete', async (t) => {
  const device = new SlowDevice(new MemoryDevice(SIZE))
  const { peer } = await setUp(t, device)
  const count = NBD_REQUESTS_IN_FLIGHT * 2 + 5
  for (let i = 0; i < count; i++) peer.send(requestMessage({ type: 0, cookie: i, length: 512 }))
  await until(() => device.held.length === NBD_REQUESTS_IN_FLIGHT)
  await new Promise((resolve) => setTimeout(resolve, 30))
  assert.equal(device.held.length, NBD_REQUESTS_IN_FLIGHT)
  const releasing = setInterval(() => device.release(), 1)
  t.after(() => clearInterval(releasing))
  for (let i = 0; i < count; i++) {
    assert.equal(await simpleReply(peer, i), 0)
    await peer.receive(512)
  }
})

test('a client that asks and never reads is not read from any more, and takes bounded memory', async (t) => {
  let reads = 0
  class Counting extends Filter {
    override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
      reads++
      return super.read(offset, length, into, at)
    }
  }
  const { peer, server, target } = await setUp(t, new Counting(new MemoryDevice(SIZE)))
  peer.socket.pause()
  const length = 1024 * 1024
  for (let i = 0; i < 2000; i++) peer.socket.write(requestMessage({ type: 0, length }))
  let before = -1
  while (before !== reads) {
    before = reads
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
  assert.ok(reads >= 2 && reads * length <= NBD_CONNECTION_BYTES + 4 * length, `${reads} reads of 1 MiB`)
  const other = new RawPeer(target)
  await enter(other)
  other.send(requestMessage({ type: 0, length: 4096 }))
  assert.equal(await simpleReply(other), 0)
  peer.socket.destroy()
  other.socket.destroy()
  await until(() => server.connections === 0)
})

test('DISC ends the connection after what came before it was answered', async (t) => {
  const device = new SlowDevice(new MemoryDevice(SIZE))
  const { peer } = await setUp(t, device)
  peer.send(
    requestMessage({ type: 0, length: 4096 }),
    requestMessage({ type: 2 }),
    requestMessage({ type: 0, length: 1 }),
  )
  await until(() => device.held.length === 1)
  device.release()
  assert.equal((await peer.rest()).length, 16 + 4096)
})

test('a client that closes its side only still gets its answers', async (t) => {
  const device = new SlowDevice(new MemoryDevice(SIZE))
  const { peer } = await setUp(t, device)
  peer.send(requestMessage({ type: 0, length: 4096 }))
  peer.socket.end()
  await until(() => device.held.length === 1)
  await new Promise((resolve) => setTimeout(resolve, 20))
  device.release()
  assert.equal((await peer.rest()).length, 16 + 4096)
})

test('a wrong magic number or a write longer than any buffer ends the connection', async (t) => {
  for (const message of [Buffer.alloc(28, 1), requestMessage({ type: 1, length: 0x8000_0000 })]) {
    const { peer } = await setUp(t)
    peer.send(message)
    assert.equal((await peer.rest()).length, 0)
  }
})

test('a connection that dies with requests in flight gives its buffers back when they complete', async (t) => {
  const device = new SlowDevice(new MemoryDevice(SIZE))
  const { peer, server } = await setUp(t, device)
  for (let i = 0; i < 20; i++) {
    peer.send(requestMessage({ type: 0, length: 4096 }), requestMessage({ type: 1, data: Buffer.alloc(100_000) }))
  }
  peer.send(requestMessage({ type: 1, length: 1_000_000 }), Buffer.alloc(5000))
  await until(() => device.held.length >= 40)
  peer.socket.destroy()
  await new Promise((resolve) => setTimeout(resolve, 20))
  assert.equal(server.connections, 1)
  device.release()
  await until(() => server.connections === 0)
  assert.equal(sharedBuffersInUse(), 0)
})

test('a connection that is reset with requests in flight gives its buffers back when they complete', async (t) => {
  const device = new SlowDevice(new MemoryDevice(SIZE))
  const { peer, server } = await setUp(t, device, { place: 'tcp' })
  for (let i = 0; i < 20; i++)
    peer.send(requestMessage({ type: 1, data: Buffer.alloc(4096) }), requestMessage({ type: 3 }))
  await until(() => device.held.length === 40)
  peer.socket.resetAndDestroy()
  await new Promise((resolve) => setTimeout(resolve, 50))
  device.release()
  await until(() => server.connections === 0)
  assert.equal(sharedBuffersInUse(), 0)
})

test('withdraw answers what is in flight, disconnects, and hides the export', async (t) => {
  const device = new SlowDevice(new MemoryDevice(SIZE))
  const { peer, server, served, target } = await setUp(t, device)
  peer.send(requestMessage({ type: 0, length: 4096 }))
  await until(() => device.held.length === 1)
  let isWithdrawn = false
  const withdrawal = server.withdraw(served).then(() => (isWithdrawn = true))
  await new Promise((resolve) => setTimeout(resolve, 20))
  assert.equal(isWithdrawn, false)
  device.release()
  await withdrawal
  assert.equal((await peer.rest()).length, 16 + 4096)
  await assert.rejects(enter(new RawPeer(target)))
})
