// Writes that are longer than what arrives of them at once: they reach the device in pieces, as they arrive, and are one request to
// the client all the same.

import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { RawPeer, type Served, type ServeOptions, serveDevice } from '../../test/support/nbd.ts'
import { enter, requestMessage, simpleReply } from '../../test/support/nbd-wire.ts'
import { NBD_CONNECTION_BYTES, NBD_RECEIVE_BUFFER, NBD_WRITE_PIECE } from '../base/limits.ts'
import { Random, seedOfRun } from '../base/random.ts'
import { type Capabilities, FUA, type Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { Filter } from '../block/filter.ts'
import { MemoryDevice } from '../block/memory.ts'
import { sharedBuffersInUse } from './shared-buffer.ts'
import { NBD_EINVAL, NBD_ENOSPC, NBD_EPERM, NBD_ESHUTDOWN } from './spec.ts'

const MIB = 1024 * 1024
const SIZE = 48 * MIB
const WRITE = 1
const FLUSH = 3

interface Piece {
  readonly offset: number
  readonly length: number
  readonly flags: number
}

/** Remembers what it is asked; holds writes and flushes back when told, and fails those that `refuse` names. */
class Watched extends Filter {
  readonly pieces: Piece[] = []
  readonly calls: string[] = []
  readonly held: (() => void)[] = []
  bestBlock = 4096
  holds = false
  refuse: (piece: Piece) => boolean = () => false

  override get can(): Capabilities {
    return { ...super.can, bestBlock: this.bestBlock }
  }

  release(): void {
    for (const letGo of this.held.splice(0)) letGo()
  }

  override write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    const piece = { offset, length, flags }
    this.pieces.push(piece)
    this.calls.push('write')
    return this.#maybeLater(() => {
      if (this.refuse(piece)) throw new BlockError('io', 'the disk is broken')
      return super.write(offset, length, from, at, flags)
    })
  }

  override flush(): Pending {
    this.calls.push('flush')
    return this.#maybeLater(() => super.flush())
  }

  #maybeLater(work: () => Pending): Pending {
    if (!this.holds) return work()
    return new Promise<void>((resolve) => this.held.push(resolve)).then(work)
  }
}

interface Setup extends Served {
  readonly peer: RawPeer
  readonly device: Watched
  readonly memory: MemoryDevice
}

async function setUp(t: TestContext, options: ServeOptions = {}): Promise<Setup> {
  const memory = new MemoryDevice(SIZE)
  const device = new Watched(memory)
  const served = await serveDevice(t, device, options)
  const peer = new RawPeer(served.target)
  t.after(() => peer.socket.destroy())
  await enter(peer)
  return { ...served, peer, device, memory }
}

async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 2))
}

/** Sends a message cut into pieces that the server receives one by one. */
async function drip(peer: RawPeer, message: Buffer, random: Random): Promise<void> {
  for (let at = 0; at < message.length; ) {
    const count = random.chance(0.2) ? random.between(1, 100) : random.between(1, 500_000)
    peer.send(message.subarray(at, at + count))
    at += count
    await new Promise((resolve) => setImmediate(resolve))
  }
}

/** The pieces follow each other without a gap and end on the device's blocks; all but the last are long. */
function checkPieces(pieces: readonly Piece[], offset: number, length: number, block: number): void {
  let at = offset
  for (const piece of pieces) {
    assert.equal(piece.offset, at)
    at += piece.length
    if (at === offset + length) break
    assert.equal(at % block, 0, `a piece ends at ${at}`)
    assert.ok(piece.length >= NBD_WRITE_PIECE || block > NBD_WRITE_PIECE, `a piece of ${piece.length} bytes`)
    assert.ok(piece.length <= Math.max(NBD_RECEIVE_BUFFER, block), `a piece of ${piece.length} bytes`)
  }
  assert.equal(at, offset + length)
}

for (const bestBlock of [1, 4096, 65_536, 131_072, 2 * MIB]) {
  for (const holds of [false, true]) {
    test(`a long write comes in pieces that end on blocks of ${bestBlock}, and is answered once (${holds ? 'slow' : 'quick'} device)`, async (t) => {
      const { peer, device, memory } = await setUp(t)
      const random = new Random(seedOfRun())
      t.diagnostic(`VARVE_SEED=${random.seed}`)
      device.bestBlock = bestBlock
      device.holds = holds
      const releasing = setInterval(() => device.release(), 1)
      t.after(() => clearInterval(releasing))
      const model = Buffer.alloc(SIZE)
      for (const length of [300_000, MIB, 5 * MIB + 12_345]) {
        const offset = random.below(8 * MIB)
        const data = Buffer.from(random.fill(Buffer.alloc(length)))
        data.copy(model, offset)
        device.pieces.length = 0
        await drip(peer, requestMessage({ type: WRITE, cookie: 9, offset, data }), random)
        assert.equal(await simpleReply(peer, 9), 0)
        checkPieces(device.pieces, offset, length, bestBlock)
      }
      // Nothing else was said: the next reply is the next request's.
      peer.send(requestMessage({ type: FLUSH, cookie: 10 }))
      assert.equal(await simpleReply(peer, 10), 0)
      assert.ok(model.equals(memory.bytes))
    })
  }
}

test('a piece is written before the rest of its request has arrived', async (t) => {
  const { peer, device } = await setUp(t)
  const message = requestMessage({ type: WRITE, data: Buffer.alloc(MIB, 1) })
  peer.send(message.subarray(0, 200_000))
  await until(() => device.pieces.length > 0)
  peer.send(message.subarray(200_000))
  assert.equal(await simpleReply(peer), 0)
})

test('a long write with FUA is answered after one flush, which follows the last piece', async (t) => {
  for (const holds of [false, true]) {
    const { peer, device } = await setUp(t)
    device.holds = holds
    const releasing = setInterval(() => device.release(), 1)
    t.after(() => clearInterval(releasing))
    const message = requestMessage({ type: WRITE, flags: FUA, data: Buffer.alloc(3 * MIB, 1) })
    await drip(peer, message, new Random(4))
    assert.equal(await simpleReply(peer), 0)
    assert.ok(device.pieces.length > 1)
    assert.equal(device.calls.indexOf('flush'), device.calls.length - 1)
    assert.ok(device.pieces.every(({ flags }) => flags === 0))
  }
})

test('a long write with FUA is not answered before the flush is done', async (t) => {
  const { peer, device } = await setUp(t)
  const message = requestMessage({ type: WRITE, cookie: 1, flags: FUA, data: Buffer.alloc(MIB, 1) })
  peer.send(message.subarray(0, 300_000))
  await until(() => device.pieces.length > 0)
  device.holds = true
  peer.send(message.subarray(300_000), requestMessage({ type: 0, cookie: 2, length: 0 }))
  while (device.calls.at(-1) !== 'flush') {
    const letGo = device.held.splice(0)
    if (device.calls.at(-1) !== 'flush') for (const go of letGo) go()
    await new Promise((resolve) => setTimeout(resolve, 2))
  }
  assert.equal(await simpleReply(peer, 2), 0)
  device.release()
  await until(() => device.held.length === 0)
  assert.equal(await simpleReply(peer, 1), 0)
})

test('a piece that fails fails the request, once, when all of it was read; pieces after it are not written', async (t) => {
  for (const holds of [false, true]) {
    const { peer, device } = await setUp(t)
    device.holds = holds
    device.refuse = ({ offset }) => offset > 0
    const releasing = setInterval(() => device.release(), 1)
    t.after(() => clearInterval(releasing))
    const message = requestMessage({ type: WRITE, flags: FUA, cookie: 5, data: Buffer.alloc(30 * MIB, 1) })
    peer.send(message.subarray(0, message.length - 1))
    await until(() => device.pieces.length > 1)
    peer.send(message.subarray(-1), requestMessage({ type: FLUSH, cookie: 6 }))
    assert.equal(await simpleReply(peer, 5), 5)
    assert.equal(await simpleReply(peer, 6), 0)
    assert.equal(device.calls.filter((call) => call === 'flush').length, 1, 'no flush for the write that failed')
    if (!holds) assert.equal(device.pieces.length, 2)
  }
})

test('a long write that cannot be as a whole writes no part of it', async (t) => {
  const cases = [
    [{}, { offset: SIZE - MIB, data: Buffer.alloc(2 * MIB) }, NBD_ENOSPC],
    [{}, { offset: 2n ** 63n, data: Buffer.alloc(2 * MIB) }, NBD_ENOSPC],
    [{}, { flags: 8, data: Buffer.alloc(2 * MIB) }, NBD_EINVAL],
    [{ readOnly: true }, { data: Buffer.alloc(2 * MIB) }, NBD_EPERM],
  ] as const
  for (const [options, parts, errno] of cases) {
    const { peer, device } = await setUp(t, options)
    await drip(peer, requestMessage({ type: WRITE, ...parts }), new Random(1))
    assert.equal(await simpleReply(peer), errno)
    assert.equal(device.pieces.length, 0)
  }
})

test('the pieces of long writes in flight are bounded, and go on when they complete', async (t) => {
  const { peer, device, memory } = await setUp(t)
  device.holds = true
  const data = Buffer.from(new Random(2).fill(Buffer.alloc(32 * MIB)))
  peer.send(requestMessage({ type: WRITE, data }))
  let before = -1
  while (before !== device.pieces.length || before === 0) {
    before = device.pieces.length
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
  const inFlight = device.pieces.reduce((sum, { length }) => sum + length, 0)
  assert.ok(inFlight <= NBD_CONNECTION_BYTES, `${inFlight} bytes in flight`)
  assert.ok(inFlight > NBD_CONNECTION_BYTES / 4, `${inFlight} bytes in flight`)
  const releasing = setInterval(() => device.release(), 1)
  t.after(() => clearInterval(releasing))
  assert.equal(await simpleReply(peer), 0)
  assert.ok(data.equals(memory.bytes.subarray(0, data.length)))
})

for (const bestBlock of [4096, 2 * MIB]) {
  test(`a connection that breaks within a long write gives its buffers back (blocks of ${bestBlock})`, async (t) => {
    const { peer, device, server } = await setUp(t)
    device.bestBlock = bestBlock
    device.holds = true
    peer.send(requestMessage({ type: WRITE, data: Buffer.alloc(6 * MIB, 1) }).subarray(0, 3 * MIB))
    await until(() => device.held.length > 0)
    peer.socket.destroy()
    await new Promise((resolve) => setTimeout(resolve, 20))
    assert.equal(server.connections, 1, 'it waits for the pieces in flight')
    const releasing = setInterval(() => device.release(), 1)
    t.after(() => clearInterval(releasing))
    await until(() => server.connections === 0)
    assert.equal(sharedBuffersInUse(), 0)
  })
}

test('while the server ends, a long write that has arrived is served, and one whose data still arrives is ESHUTDOWN', async (t) => {
  const { peer, device, memory, server, served } = await setUp(t)
  device.holds = true
  const [whole, half] = [1, 2].map((cookie) =>
    requestMessage({ type: WRITE, cookie, offset: cookie * 8 * MIB, data: Buffer.alloc(MIB, cookie) }),
  ) as [Buffer, Buffer]
  peer.send(whole, half.subarray(0, MIB / 2))
  await until(() => device.pieces.some(({ offset }) => offset >= 16 * MIB))
  const begun = device.pieces.length
  const withdrawal = server.withdraw(served)
  peer.send(half.subarray(MIB / 2), requestMessage({ type: FLUSH, cookie: 3 }))
  assert.equal(await simpleReply(peer, 3), NBD_ESHUTDOWN)
  assert.equal(device.pieces.length, begun, 'no piece was begun after the end')
  device.release()
  const replies = new Map<number, number>()
  for (let i = 0; i < 2; i++) {
    const reply = await peer.receive(16)
    replies.set(Number(reply.readBigUInt64BE(8)), reply.readUInt32BE(4))
  }
  await withdrawal
  assert.deepEqual([replies.get(1), replies.get(2)], [0, NBD_ESHUTDOWN])
  assert.ok(memory.bytes.subarray(8 * MIB, 9 * MIB).every((byte) => byte === 1))
})
