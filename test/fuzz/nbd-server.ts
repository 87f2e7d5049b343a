// One trial of the server's fuzz: a client's conversation, damaged and cut, is given to a connection without a socket, over a device
// that checks what it is asked, fails and dawdles. However it ends: no fault is reported, the device is asked for nothing
// outside, what waits to be sent is bounded, and every buffer comes back.

import assert from 'node:assert/strict'
import { EventEmitter } from 'node:events'
import type net from 'node:net'
import { NBD_CONNECTION_BYTES, NBD_REPLY_BUFFER } from '../../src/base/limits.ts'
import { Random } from '../../src/base/random.ts'
import {
  type BlockDevice,
  type Capabilities,
  type ExtentVisitor,
  HOLE,
  type Pending,
  ZERO,
} from '../../src/block/device.ts'
import { BlockError, ERROR_KINDS } from '../../src/block/error.ts'
import { Connection } from '../../src/nbd/connection.ts'
import type { Export } from '../../src/nbd/export.ts'
import { sharedBuffersInUse } from '../../src/nbd/shared-buffer.ts'
import { inPieces, WireWriter } from './nbd-bytes.ts'

const SIZE = 128 * 1024

/** Turns of the event loop after which a connection that was left must be over. */
const TURNS_MAX = 1000

/** The parts of a socket that a connection uses. What is written is counted and taken when the trial says so. */
class FakeSocket extends EventEmitter {
  unsent = 0
  said = 0
  writableEnded = false
  destroyed = false
  isPaused = true
  readonly #taken: (() => void)[] = []
  #kept: Uint8Array | undefined
  #ended: (() => void) | undefined

  setNoDelay(): this {
    return this
  }
  setKeepAlive(): this {
    return this
  }
  cork(): void {}
  uncork(): void {}
  pause(): this {
    this.isPaused = true
    return this
  }
  unshift(rest: Uint8Array): void {
    this.#kept = rest
  }
  resume(): this {
    this.isPaused = false
    const kept = this.#kept
    this.#kept = undefined
    if (kept !== undefined) this.emit('data', kept)
    return this
  }
  write(bytes: Uint8Array, taken: () => void): boolean {
    this.unsent += bytes.length
    this.said += bytes.length
    this.#taken.push(() => {
      this.unsent -= bytes.length
      taken()
    })
    return true
  }
  end(done?: () => void): this {
    this.writableEnded = true
    this.#ended = done
    return this
  }
  destroy(): this {
    if (this.destroyed) return this
    this.destroyed = true
    process.nextTick(() => this.emit('close'))
    return this
  }
  /** True when nothing more can be given: the connection is over or does not read. */
  get isDeaf(): boolean {
    return this.destroyed || this.isPaused
  }
  /** The peer reads what was written. */
  take(): void {
    for (const taken of this.#taken.splice(0)) taken()
    if (!this.writableEnded) return
    this.#ended?.()
    this.#ended = undefined
  }
}

/** Asserts what every device may rely on below a guard; answers at once, later, or with an error. */
class CheckingDevice implements BlockDevice {
  readonly name = 'checked'
  readonly size = SIZE
  readonly can: Capabilities
  readonly #random: Random
  readonly #trouble: number
  readonly #slowness: number

  constructor(random: Random) {
    this.#random = random
    this.#trouble = random.pick([0, 0, 0.1])
    this.#slowness = random.pick([0, 0, 0.3, 1])
    const support = (): 'none' | 'emulated' | 'native' =>
      random.pick(['native', 'native', 'native', 'emulated', 'none'])
    this.can = {
      write: random.chance(0.95),
      fua: random.pick(['native', 'emulated']),
      zero: support(),
      trim: support(),
      extents: support(),
      minimumBlock: random.pick([1, 1, 1, 512, 4096]),
      bestBlock: 4096,
    }
  }

  #answer(offset: number, length: number): Pending {
    assert.ok(Number.isSafeInteger(offset) && Number.isSafeInteger(length), 'whole numbers')
    assert.ok(offset >= 0 && length > 0 && offset + length <= SIZE, `${length} at ${offset} is outside`)
    assert.ok(offset % this.can.minimumBlock === 0 && length % this.can.minimumBlock === 0, 'aligned')
    return this.#settle()
  }

  #settle(): Pending {
    const failure = this.#random.chance(this.#trouble)
      ? new BlockError(this.#random.pick(ERROR_KINDS), 'it failed, as told')
      : undefined
    if (!this.#random.chance(this.#slowness)) {
      if (failure !== undefined) throw failure
      return undefined
    }
    return Promise.resolve().then(() => {
      if (failure !== undefined) throw failure
    })
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    assert.ok(at >= 0 && at + length <= into.length, 'the buffer holds it')
    into.fill(0, at, at + length)
    return this.#answer(offset, length)
  }
  write(offset: number, length: number, from: Uint8Array, at: number): Pending {
    assert.ok(this.can.write, 'writable')
    assert.ok(at >= 0 && at + length <= from.length, 'the buffer has it')
    return this.#answer(offset, length)
  }
  zero(offset: number, length: number): Pending {
    assert.ok(this.can.write && this.can.zero !== 'none', 'can be zeroed')
    return this.#answer(offset, length)
  }
  trim(offset: number, length: number): Pending {
    assert.ok(this.can.write && this.can.trim !== 'none', 'can be trimmed')
    return this.#answer(offset, length)
  }
  flush(): Pending {
    return this.#settle()
  }
  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    const pending = this.#answer(offset, length)
    for (let at = 0; at < length; at += 4096)
      if (!visit(Math.min(4096, length - at), (at >> 12) & 1 ? HOLE | ZERO : 0)) break
    return pending
  }
  close(): Promise<void> {
    return Promise.resolve()
  }
}

const writer = new WireWriter()

function option(number: number, data: () => void): void {
  writer.text('IHAVEOPT').u32(number).u32(0)
  const from = writer.length
  data()
  writer.patchLength(from - 4, from)
}

function writeOption(random: Random): void {
  const name = random.pick(['', '', 'disk', 'other'])
  switch (random.below(7)) {
    case 0:
      return option(random.pick([2, 3, 5, 11, 99]), () => writer.fill(random.pick([0, 0, 1, 40]), 7))
    case 1:
      return option(6, () => writer.string(name).u16(2).u16(3).u16(random.below(5)))
    case 2:
      return option(random.pick([3, 6, 9, 77]), () => writer.fill(random.pick([0, 5000, 20_000]), 0x41))
    default: {
      const queries = random.pick([
        ['base:allocation'],
        ['base:'],
        ['base:allocation', 'x-fuzz:odd'],
        [],
        ['x-fuzz:', 'q'],
      ])
      return option(random.pick([9, 10, 10]), () => {
        writer.string(name).u32(queries.length)
        for (const query of queries) writer.string(query)
      })
    }
  }
}

function writeRequest(random: Random, cookie: number): void {
  const type = random.pick([0, 0, 0, 1, 1, 1, 3, 4, 5, 6, 7, 7, 8])
  const unit = random.pick([1, 512, 4096])
  const length = type === 3 ? 0 : random.pick([0, 1, 1, 2, 8, 16, 20]) * unit
  const offset = type === 3 ? 0 : random.pick([random.below(SIZE / unit) * unit, SIZE - length, SIZE, 2 ** 45])
  writer
    .u32(0x2560_9513)
    .u16(random.pick([0, 0, 0, 1, 2, 4, 8, 16]))
    .u16(type)
    .u64(cookie)
    .u64(offset)
    .u32(length)
  if (type === 1) writer.fill(length, cookie)
}

/** A conversation of a client that means well. */
function writeConversation(random: Random): void {
  writer.reset()
  writer.u32(random.pick([3, 3, 3, 1, 0]))
  if (random.chance(0.7)) option(8, () => {})
  for (let i = random.pick([0, 0, 1, 1, 2, 4]); i > 0; i--) writeOption(random)
  if (random.chance(0.9))
    option(7, () =>
      writer
        .string(random.pick(['', 'disk']))
        .u16(1)
        .u16(3),
    )
  else option(1, () => writer.text(random.pick(['', 'disk', 'none'])))
  const requests = random.pick([0, 1, 3, 8, 30])
  for (let i = 0; i < requests; i++) writeRequest(random, i)
  if (random.chance(0.3)) writer.u32(0x2560_9513).u16(0).u16(2).u64(0).u64(0).u32(0)
}

export interface ServerTrial {
  /** How far the conversation came. */
  readonly outcome: 'no export' | 'served' | 'served and damaged' | 'refused and damaged'
  /** Bytes that the server said. */
  readonly said: number
}

/** Runs the trial of a seed; throws when a rule is broken. */
export async function runServerTrial(seed: number): Promise<ServerTrial> {
  const random = new Random(seed)
  const before = sharedBuffersInUse()
  writeConversation(random)
  const isDamaged = random.chance(0.9) && writer.damage(random) > 0
  const device = new CheckingDevice(random)
  let opened = 0
  const odd = {
    name: 'x-fuzz:odd',
    extents: (_offset: number, length: number, visit: ExtentVisitor): Pending => void visit(length, 1),
  }
  const served: Export = {
    name: 'disk',
    device,
    readOnly: random.chance(0.1),
    contexts: [odd],
    opened: () => void opened++,
    closed: () => void opened--,
  }
  const socket = new FakeSocket()
  const faults: unknown[] = []
  const exports = {
    find: (name: string) => (name === '' || name === 'disk' ? served : undefined),
    list: () => [served],
  }
  const events = { onClosed: () => {}, report: (error: unknown) => void faults.push(error) }
  const connection = new Connection(socket as unknown as net.Socket, exports, events)
  const reads = random.chance(0.8)
  const withdraws = random.chance(0.05)
  let wasServed = false
  inPieces(writer.bytes, random, (piece) => {
    socket.emit('data', piece)
    wasServed ||= opened > 0
    assert.ok(socket.unsent <= NBD_CONNECTION_BYTES + 2 * NBD_REPLY_BUFFER, 'what waits to be sent is bounded')
    if (reads) socket.take()
    if (withdraws && random.chance(0.3)) connection.shutDown()
    return !socket.isDeaf
  })
  await seeOut(socket, connection, random)
  assert.deepEqual(faults, [], 'no fault is reported')
  assert.equal(opened, 0, 'opened and closed as often')
  assert.equal(sharedBuffersInUse(), before, 'every buffer came back')
  if (!isDamaged) return { outcome: wasServed ? 'served' : 'no export', said: socket.said }
  return { outcome: wasServed ? 'served and damaged' : 'refused and damaged', said: socket.said }
}

/** The client goes, kindly or not, and the connection must be over soon. */
async function seeOut(socket: FakeSocket, connection: Connection, random: Random): Promise<void> {
  if (random.chance(0.5)) socket.emit('end')
  else socket.destroy()
  let isClosed = false
  void connection.closed.then(() => (isClosed = true))
  for (let turn = 0; !isClosed; turn++) {
    assert.ok(turn < TURNS_MAX, 'the connection ends')
    socket.take()
    // A few turns of the promises are enough for most; the event loop is for what waits for its turn.
    if (turn < 3) await Promise.resolve()
    else await new Promise((resolve) => setImmediate(resolve))
  }
}
