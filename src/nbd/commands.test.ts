// The commands of the transmission phase, sentence by sentence: each test names the section of the specification that it states.
// What the transmission promises of its own is in transmission.test.ts; the table of sentences is
// docs/internals/nbd-protocol.md.

import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { RawPeer, type Served, type ServeOptions, serveDevice } from '../../test/support/nbd.ts'
import { chunk, enter, greet, goMessage, requestMessage, simpleReply } from '../../test/support/nbd-wire.ts'
import { REQUEST_MAX } from '../base/limits.ts'
import { Random } from '../base/random.ts'
import type { BlockDevice, Capabilities, Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { Filter } from '../block/filter.ts'
import { MemoryDevice } from '../block/memory.ts'
import { KIND_ERRNO, NBD_EINVAL, NBD_ENOSPC, NBD_ENOTSUP, NBD_EOVERFLOW, NBD_EPERM, NBD_ESHUTDOWN } from './spec.ts'

const MIB = 1024 * 1024
const SIZE = MIB

const [READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS] = [0, 1, 2, 3, 4, 5, 6, 7] as const
const [FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO] = [1, 2, 4, 8, 16] as const
/** Those with a range. */
const RANGED = [READ, WRITE, TRIM, CACHE, ZEROES, STATUS]

type Parts = Parameters<typeof requestMessage>[0]

interface Setup extends Served {
  readonly peer: RawPeer
  /** The error number of a request, however it is answered; 0 is success. */
  readonly errno: (parts: Parts) => Promise<number>
}

interface SetupOptions extends ServeOptions {
  readonly structured?: boolean
  readonly select?: string[]
}

async function setUp(
  t: TestContext,
  device: BlockDevice = new MemoryDevice(SIZE),
  options: SetupOptions = {},
): Promise<Setup> {
  const { structured = false, select = structured ? ['base:allocation'] : [], ...rest } = options
  const served = await serveDevice(t, device, rest)
  const peer = new RawPeer(served.target)
  t.after(() => peer.socket.destroy())
  if (device.can.minimumBlock === 1) await enter(peer, structured, select)
  else {
    await greet(peer)
    peer.send(goMessage('', 7, [3]))
    await peer.receive(20 + 14 + 20 + 12 + 20)
  }
  return { ...served, peer, errno: (parts) => errnoOf(peer, parts) }
}

async function errnoOf(peer: RawPeer, parts: Parts): Promise<number> {
  const { cookie = 1 } = parts
  peer.send(requestMessage(parts))
  const magic = (await peer.receive(4)).readUInt32BE(0)
  if (magic === 0x6744_6698) {
    const rest = await peer.receive(12)
    assert.equal(rest.readBigUInt64BE(4), BigInt(cookie))
    if (rest.readUInt32BE(0) === 0 && parts.type === READ) await peer.receive(parts.length ?? 0)
    return rest.readUInt32BE(0)
  }
  assert.equal(magic, 0x668e_33ef)
  const header = await peer.receive(16)
  assert.equal(header.readUInt16BE(0), 1, 'one chunk')
  assert.equal(header.readBigUInt64BE(4), BigInt(cookie))
  const data = await peer.receive(header.readUInt32BE(12))
  if (header.readUInt16BE(2) < 0x8000) return 0
  assert.equal(header.readUInt16BE(2), 0x8001)
  assert.equal(data.readUInt16BE(4), data.length - 6)
  return data.readUInt32BE(0)
}

function withData(parts: Parts): Parts {
  return parts.type === WRITE ? { ...parts, data: Buffer.alloc(parts.length ?? 0, 7) } : parts
}

/** As large as an NBD export can be, and without content. */
class Huge extends Filter {
  override get size(): number {
    return Number.MAX_SAFE_INTEGER
  }
  override read(_offset: number, length: number, into: Uint8Array, at: number): Pending {
    into.fill(0, at, at + length)
    return undefined
  }
}

class Able extends Filter {
  readonly #able: Partial<Capabilities>
  constructor(able: Partial<Capabilities>) {
    super(new MemoryDevice(SIZE))
    this.#able = able
  }
  override get can(): Capabilities {
    return { ...super.can, ...this.#able }
  }
}

/** Flushes when it is let go; says what was asked of it. */
class SlowFlush extends Filter {
  readonly calls: string[] = []
  readonly held: (() => void)[] = []
  override write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    this.calls.push(`write ${offset}`)
    return super.write(offset, length, from, at, flags)
  }
  override flush(): Pending {
    this.calls.push('flush')
    return new Promise((resolve) => this.held.push(resolve))
  }
  async waits(count = 1): Promise<void> {
    while (this.held.length < count) await new Promise((resolve) => setTimeout(resolve, 1))
  }
  release(): void {
    for (const letGo of this.held.splice(0)) letGo()
  }
}

for (const structured of [false, true]) {
  const how = structured ? 'structured' : 'simple'

  test(`Command flags: each flag is accepted where the text has it and EINVAL elsewhere (${how})`, async (t) => {
    const { errno } = await setUp(t, undefined, { structured })
    const valid: Readonly<Record<number, number>> = {
      [READ]: FUA | (structured ? DF : 0),
      [WRITE]: FUA,
      [FLUSH]: FUA,
      [TRIM]: FUA,
      [CACHE]: FUA,
      [ZEROES]: FUA | NO_HOLE | FAST_ZERO,
      [STATUS]: structured ? FUA | REQ_ONE : 0,
    }
    for (const [type, flags] of Object.entries(valid).map(([key, value]) => [Number(key), value] as const)) {
      for (let bit = 0; bit < 16; bit++) {
        const length = type === FLUSH ? 0 : 512
        const found = await errno(withData({ type, flags: 1 << bit, length, cookie: bit }))
        assert.equal(found, flags & (1 << bit) ? 0 : NBD_EINVAL, `command ${type}, bit ${bit}`)
      }
    }
  })

  test(`Error values: an unknown command is EINVAL, whatever its flags, and the next is understood (${how})`, async (t) => {
    const { errno } = await setUp(t, undefined, { structured })
    for (const type of [8, 9, 255, 256, 0xffff])
      for (const flags of [0, FUA, 0xffff])
        assert.equal(await errno({ type, flags, offset: 5, length: 4096 }), NBD_EINVAL)
    assert.equal(await errno({ type: READ, length: 512 }), 0)
  })

  test(`Error values: past the end is ENOSPC for what writes and EINVAL for the others, at every distance (${how})`, async (t) => {
    const { errno } = await setUp(t, undefined, { structured })
    const offsets = [
      SIZE,
      SIZE - 511,
      2n ** 32n,
      2n ** 53n - 1n,
      2n ** 53n,
      2n ** 63n,
      2n ** 64n - 512n,
      2n ** 64n - 1n,
    ]
    for (const type of RANGED) {
      if (type === STATUS && !structured) continue
      const expected = type === WRITE || type === ZEROES ? NBD_ENOSPC : NBD_EINVAL
      for (const offset of offsets)
        assert.equal(await errno(withData({ type, offset, length: 512 })), expected, `command ${type} at ${offset}`)
      assert.equal(await errno(withData({ type, offset: SIZE - 512, length: 512 })), 0, `command ${type}`)
    }
  })

  test(`Request types: a length of 0 is no reason to disconnect (${how})`, async (t) => {
    const { errno } = await setUp(t, undefined, { structured })
    for (const type of [...RANGED, FLUSH])
      for (const offset of type === FLUSH ? [0] : [0, SIZE])
        assert.equal(await errno({ type, offset, length: 0 }), type === STATUS ? NBD_EINVAL : 0, `command ${type}`)
    assert.equal(await errno({ type: READ, length: 1 }), 0)
  })

  test(`Transmission flags: a read-only export is EPERM to what writes, with FUA too, and flushes (${how})`, async (t) => {
    const memory = new MemoryDevice(SIZE)
    const { errno } = await setUp(t, memory, { structured, readOnly: true })
    for (const type of [WRITE, TRIM, ZEROES])
      for (const flags of [0, FUA]) assert.equal(await errno(withData({ type, flags, length: 512 })), NBD_EPERM)
    assert.equal(await errno({ type: ZEROES, flags: FAST_ZERO, length: 512 }), NBD_EPERM)
    assert.equal(await errno({ type: FLUSH }), 0)
    assert.equal(await errno({ type: CACHE, length: 512 }), 0)
    assert.ok(memory.bytes.every((byte) => byte === 0))
  })

  test(`NBD_CMD_WRITE: the data of a refused write is taken away, short and long (${how})`, async (t) => {
    const { errno } = await setUp(t, undefined, { structured })
    assert.equal(await errno({ type: WRITE, data: Buffer.alloc(REQUEST_MAX) }), NBD_ENOSPC)
    for (const length of [1, 4096, 65_536, 300_000]) {
      assert.equal(await errno(withData({ type: WRITE, offset: SIZE, length })), NBD_ENOSPC)
      assert.equal(await errno(withData({ type: WRITE, flags: NO_HOLE, length })), NBD_EINVAL)
    }
    assert.equal(await errno({ type: READ, length: 512 }), 0)
  })
}

test('Size constraints: what is no multiple of the minimum block is EINVAL, for every command', async (t) => {
  const { peer, errno } = await setUp(t, new Able({ minimumBlock: 4096 }))
  for (const type of RANGED.filter((each) => each !== STATUS)) {
    for (const [offset, length] of [
      [512, 4096],
      [0, 512],
      [4095, 1],
      [4096, 4097],
    ] as const)
      assert.equal(await errno(withData({ type, offset, length })), NBD_EINVAL, `command ${type}`)
    assert.equal(await errno(withData({ type, offset: 4096, length: 8192 })), 0, `command ${type}`)
  }
  assert.equal(peer.isEnded, false)
})

test('Size constraints: block status of a part of the minimum block is EINVAL', async (t) => {
  const coarse = new Able({ minimumBlock: 1 })
  let minimumBlock = 1
  Object.defineProperty(coarse, 'can', { get: () => ({ ...new MemoryDevice(SIZE).can, minimumBlock }) })
  const { errno } = await setUp(t, coarse, { structured: true })
  minimumBlock = 4096
  assert.equal(await errno({ type: STATUS, offset: 512, length: 4096 }), NBD_EINVAL)
  assert.equal(await errno({ type: STATUS, offset: 4096, length: 512 }), NBD_EINVAL)
  assert.equal(await errno({ type: STATUS, offset: 4096, length: 4096 }), 0)
})

test('NBD_CMD_READ: longer than the maximum is EOVERFLOW with structured replies, EINVAL without and past the end', async (t) => {
  const length = REQUEST_MAX + 1
  const simple = await setUp(t, new Huge(new MemoryDevice(512)))
  assert.equal(await simple.errno({ type: READ, length }), NBD_EINVAL)
  const { errno } = await setUp(t, new Huge(new MemoryDevice(512)), { structured: true })
  for (const flags of [0, DF]) {
    assert.equal(await errno({ type: READ, flags, length }), NBD_EOVERFLOW)
    assert.equal(await errno({ type: READ, flags, length: 0xffff_ffff }), NBD_EOVERFLOW)
    assert.equal(await errno({ type: READ, flags, offset: 2n ** 53n - 4096n, length }), NBD_EINVAL)
  }
  assert.equal(await errno({ type: READ, length: REQUEST_MAX }), 0)
})

test('NBD_CMD_READ: with DF there is one chunk of data, zeros and all, at 64 KiB and beyond', async (t) => {
  const memory = new MemoryDevice(SIZE)
  await memory.write(200_000, 1000, Buffer.alloc(1000, 3), 0, 0)
  const { peer } = await setUp(t, memory, { structured: true })
  for (const length of [65_536, 300_000, SIZE]) {
    peer.send(requestMessage({ type: READ, flags: DF, length }))
    const { flags, type, data } = await chunk(peer)
    assert.deepEqual([flags, type, data.length], [1, 1, length + 8])
    assert.ok(data.subarray(8).equals(memory.bytes.subarray(0, length)))
  }
})

test('Structured replies: a read of nothing but zeros is a hole of the size asked for, and with DF it is data', async (t) => {
  const { peer } = await setUp(t, undefined, { structured: true })
  for (const length of [65_536, 65_537, SIZE]) {
    peer.send(requestMessage({ type: READ, length }))
    const hole = await chunk(peer)
    assert.deepEqual([hole.flags, hole.type, hole.data.length], [1, 2, 12])
    assert.equal(hole.data.readUInt32BE(8), length)
  }
})

test('Structured replies: a read is never answered by a simple reply, also when its flags are wrong', async (t) => {
  const { peer } = await setUp(t, undefined, { structured: true })
  for (const parts of [{ flags: REQ_ONE, length: 512 }, { offset: SIZE, length: 1 }, { length: 0 }, { length: 1 }]) {
    peer.send(requestMessage({ type: READ, ...parts }))
    assert.equal((await chunk(peer)).flags, 1)
  }
})

test('Simple replies: without negotiation nothing else is sent, and a failed read has no data', async (t) => {
  class Broken extends Filter {
    override read(): Pending {
      return Promise.reject(new BlockError('io', 'unreadable'))
    }
  }
  const { peer } = await setUp(t, new Broken(new MemoryDevice(SIZE)))
  peer.send(requestMessage({ type: READ, length: 4096 }), requestMessage({ type: FLUSH, cookie: 2 }))
  const cookies = [await peer.receive(16), await peer.receive(16)].map((reply) => {
    assert.equal(reply.readUInt32BE(0), 0x6744_6698)
    return [reply.readBigUInt64BE(8), reply.readUInt32BE(4)] as const
  })
  assert.deepEqual(
    new Map(cookies),
    new Map([
      [1n, KIND_ERRNO.io],
      [2n, 0],
    ]),
  )
})

test('NBD_REPLY_TYPE_ERROR: the message is a string: at most 4096 bytes, whole characters, no NUL', async (t) => {
  class Wordy extends Filter {
    override flush(): Pending {
      throw new BlockError('io', `x\0${'é'.repeat(5000)}`)
    }
  }
  const { peer } = await setUp(t, new Wordy(new MemoryDevice(SIZE)), { structured: true })
  peer.send(requestMessage({ type: FLUSH }))
  const { data } = await chunk(peer)
  const message = data.subarray(6)
  assert.ok(message.length > 4000 && message.length <= 4096)
  assert.ok(!message.includes(0))
  assert.equal(new TextDecoder('utf-8', { fatal: true }).decode(message).at(-1), 'é')
})

test('NBD_CMD_WRITE_ZEROES: fast zeroing that is not advertised is EINVAL, that is not fast ENOTSUP, and plain never is', async (t) => {
  const expected = { none: [NBD_EINVAL, NBD_EINVAL], emulated: [NBD_ENOTSUP, 0], native: [0, 0] } as const
  for (const zero of ['none', 'emulated', 'native'] as const) {
    const { errno } = await setUp(t, new Able({ zero }))
    for (const flags of [0, NO_HOLE, FUA, NO_HOLE | FUA]) {
      assert.equal(await errno({ type: ZEROES, flags: flags | FAST_ZERO, length: 4096 }), expected[zero][0], zero)
      assert.equal(await errno({ type: ZEROES, flags, length: 4096 }), expected[zero][1], zero)
    }
  }
})

test('NBD_CMD_TRIM: where it is not advertised it is EINVAL', async (t) => {
  const { errno } = await setUp(t, new Able({ trim: 'none' }))
  for (const flags of [0, FUA]) assert.equal(await errno({ type: TRIM, flags, length: 4096 }), NBD_EINVAL)
})

test('Size constraints: ranges without data may be longer than the maximum payload', async (t) => {
  const ranges: number[] = []
  class Long extends Huge {
    override zero(_offset: number, length: number): Pending {
      ranges.push(length)
      return undefined
    }
    override trim(_offset: number, length: number): Pending {
      ranges.push(length)
      return undefined
    }
  }
  const { errno } = await setUp(t, new Long(new MemoryDevice(512)))
  const length = 0xffff_fe00
  assert.equal(await errno({ type: ZEROES, length }), 0)
  assert.equal(await errno({ type: TRIM, length }), 0)
  assert.deepEqual(ranges, [length, length])
})

test('NBD_CMD_CACHE: too much is EOVERFLOW, past the end EINVAL, and it changes nothing', async (t) => {
  const { errno } = await setUp(t, new Huge(new MemoryDevice(512)))
  assert.equal(await errno({ type: CACHE, length: REQUEST_MAX }), 0)
  assert.equal(await errno({ type: CACHE, length: REQUEST_MAX + 512 }), NBD_EOVERFLOW)
  assert.equal(await errno({ type: CACHE, offset: 2n ** 53n - 512n, length: 0xffff_ffff }), NBD_EINVAL)
  const memory = new MemoryDevice(SIZE)
  new Random(1).fill(memory.bytes)
  const before = Buffer.from(memory.bytes)
  const small = await setUp(t, memory)
  assert.equal(await small.errno({ type: CACHE, length: SIZE }), 0)
  assert.equal(await small.errno({ type: CACHE, offset: SIZE - 512, length: 1024 }), NBD_EINVAL)
  assert.ok(before.equals(memory.bytes))
})

test('NBD_CMD_FLUSH: offset and length are reserved', async (t) => {
  const { errno } = await setUp(t)
  for (const parts of [{ offset: 1 }, { length: 1 }, { offset: 2n ** 63n }, { offset: 512, length: 512 }])
    assert.equal(await errno({ type: FLUSH, ...parts }), NBD_EINVAL)
})

test('NBD_CMD_BLOCK_STATUS: descriptors are never empty, follow each other, and end with the range or before', async (t) => {
  const memory = new MemoryDevice(SIZE)
  const random = new Random(7)
  for (let i = 0; i < 40; i++) await memory.write(random.below(255) * 4096, 4096, Buffer.alloc(4096, 1), 0, 0)
  const { peer } = await setUp(t, memory, { structured: true })
  for (let i = 0; i < 100; i++) {
    const offset = random.below(SIZE - 1)
    const length = random.between(1, SIZE - offset)
    const one = random.chance(0.5)
    peer.send(requestMessage({ type: STATUS, flags: one ? REQ_ONE : 0, offset, length }))
    const { flags, type, data } = await chunk(peer)
    assert.deepEqual([flags, type, data.length % 8], [1, 5, 4])
    const lengths = Array.from({ length: (data.length - 4) / 8 }, (_, k) => data.readUInt32BE(4 + k * 8))
    assert.ok(lengths.length > 0 && lengths.every((each) => each > 0))
    assert.ok(!one || lengths.length === 1)
    const sum = lengths.reduce((total, each) => total + each, 0)
    assert.ok(one ? sum <= length : sum === length)
  }
})

test('Metadata querying: without a selected context block status is EINVAL, with structured replies and without', async (t) => {
  for (const structured of [false, true]) {
    const { errno } = await setUp(t, undefined, { structured, select: [] })
    for (const flags of [0, REQ_ONE]) assert.equal(await errno({ type: STATUS, flags, length: 4096 }), NBD_EINVAL)
  }
})

test('Ordering of messages: a reply with FUA waits until the data is on stable storage', async (t) => {
  class Emulated extends SlowFlush {
    override get can(): Capabilities {
      return { ...super.can, fua: 'emulated' }
    }
  }
  for (const type of [WRITE, TRIM, ZEROES]) {
    const device = new Emulated(new MemoryDevice(SIZE))
    const { peer } = await setUp(t, device)
    peer.send(requestMessage(withData({ type, flags: FUA, length: 512, cookie: 1 })))
    peer.send(requestMessage(withData({ type, length: 512, cookie: 2 })))
    assert.equal(await simpleReply(peer, 2), 0)
    await device.waits()
    device.release()
    assert.equal(await simpleReply(peer, 1), 0)
  }
})

test('Ordering of messages: a flush is not answered before the device flushed; what comes meanwhile is', async (t) => {
  const device = new SlowFlush(new MemoryDevice(SIZE))
  const { peer } = await setUp(t, device)
  peer.send(
    requestMessage({ type: WRITE, cookie: 1, data: Buffer.alloc(512) }),
    requestMessage({ type: FLUSH, cookie: 2 }),
    requestMessage({ type: WRITE, cookie: 3, offset: 4096, data: Buffer.alloc(512) }),
    requestMessage({ type: READ, cookie: 4, length: 1 }),
  )
  for (const cookie of [1, 3, 4]) assert.equal(await simpleReply(peer, cookie), 0)
  await peer.receive(1)
  assert.deepEqual(device.calls, ['write 0', 'flush', 'write 4096'])
  device.release()
  assert.equal(await simpleReply(peer, 2), 0)
})

test('NBD_FLAG_CAN_MULTI_CONN: a flush on one connection comes after what was answered on another', async (t) => {
  const device = new SlowFlush(new MemoryDevice(SIZE))
  const { peer, target } = await setUp(t, device)
  const other = new RawPeer(target)
  t.after(() => other.socket.destroy())
  await enter(other)
  for (let i = 0; i < 20; i++) {
    const [writer, flusher] = i % 2 === 0 ? [peer, other] : [other, peer]
    writer.send(requestMessage({ type: WRITE, offset: i * 512, data: Buffer.alloc(512, i + 1) }))
    assert.equal(await simpleReply(writer), 0)
    flusher.send(requestMessage({ type: FLUSH, cookie: 9 }))
    await device.waits()
    assert.deepEqual(device.calls.splice(0), [`write ${i * 512}`, 'flush'])
    device.release()
    assert.equal(await simpleReply(flusher, 9), 0)
    flusher.send(requestMessage({ type: READ, offset: i * 512, length: 1 }))
    assert.equal(await simpleReply(flusher), 0)
    assert.equal((await flusher.receive(1))[0], i + 1)
  }
})

test('NBD_CMD_DISC: what is in flight is answered, nothing after it is looked at, and it has no reply', async (t) => {
  const device = new SlowFlush(new MemoryDevice(SIZE))
  const { peer } = await setUp(t, device)
  peer.send(
    requestMessage({ type: FLUSH, cookie: 1 }),
    requestMessage({ type: DISC, flags: FUA, offset: 5, length: 5, cookie: 2 }),
    requestMessage({ type: WRITE, cookie: 3, data: Buffer.alloc(512, 1) }),
    Buffer.from('no request at all, which nobody reads'),
  )
  await device.waits()
  await new Promise((resolve) => setTimeout(resolve, 10))
  assert.equal(peer.isEnded, false)
  device.release()
  assert.equal((await peer.rest()).length, 16)
  assert.deepEqual(device.calls, ['flush'])
})

test('Terminating the transmission phase: while the server ends, what is in flight is served and the rest is ESHUTDOWN', async (t) => {
  const device = new SlowFlush(new MemoryDevice(SIZE))
  const { peer, server, served } = await setUp(t, device)
  peer.send(requestMessage({ type: FLUSH, cookie: 1 }))
  await device.waits()
  const withdrawal = server.withdraw(served)
  for (const type of [...RANGED, FLUSH, 99])
    assert.equal(await errnoOf(peer, withData({ type, length: 512, cookie: 5 })), NBD_ESHUTDOWN, `command ${type}`)
  assert.equal(await errnoOf(peer, withData({ type: WRITE, length: 500_000 })), NBD_ESHUTDOWN)
  assert.deepEqual(device.calls, ['flush'])
  device.release()
  await withdrawal
  assert.equal((await peer.rest()).readUInt32BE(4), 0)
})

test('Reserved magic values: requests of other forms of the protocol end the connection', async (t) => {
  for (const magic of ['12560953', '25609514', '21e41c71', '00000000']) {
    const { peer } = await setUp(t)
    peer.send(magic, Buffer.alloc(28))
    assert.equal((await peer.rest()).length, 0)
  }
})
