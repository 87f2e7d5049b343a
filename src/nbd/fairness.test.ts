// Between two requests of a client that has one in flight, how many does the server take of another that always has 128? Counted at
// the device, in requests and not in time, on one export and on two of the same thread, for devices that answer at once and for one
// that works off a queue.

import assert from 'node:assert/strict'
import type net from 'node:net'
import path from 'node:path'
import { type TestContext, test } from 'node:test'
import { RawPeer } from '../../test/support/nbd.ts'
import { ask, goMessage, greet, requestMessage } from '../../test/support/nbd-wire.ts'
import { tempFolder } from '../../test/support/temp.ts'
import { NBD_REQUESTS_IN_FLIGHT } from '../base/limits.ts'
import type { Pending } from '../block/device.ts'
import { Filter } from '../block/filter.ts'
import { MemoryDevice } from '../block/memory.ts'
import type { Export } from './export.ts'
import { NbdServer } from './server.ts'

const MIB = 1024 * 1024
const SIZE = 4 * MIB
const DEPTH = 128
const READ = 0
const WRITE = 1
/** Where the modest client works, so that the device knows whose request it is. */
const MODEST = 2 * MIB
const MODEST_REQUESTS = 40
const REPLY = 16

interface Load {
  readonly name: string
  readonly type: typeof READ | typeof WRITE
  readonly length: number
}

const LOADS: readonly Load[] = [
  { name: 'reads of 4 KiB', type: READ, length: 4096 },
  { name: 'writes of 4 KiB', type: WRITE, length: 4096 },
  { name: 'reads of 256 KiB', type: READ, length: 256 * 1024 },
  { name: 'writes of 1 MiB', type: WRITE, length: MIB },
]

/** What the devices were asked, greedy requests between two modest ones. */
class Tally {
  readonly between: number[] = []
  #greedy = 0

  served(offset: number): void {
    if (offset < MODEST) this.#greedy++
    else {
      this.between.push(this.#greedy)
      this.#greedy = 0
    }
  }

  /** The longest wait, without the one before the first request. */
  get most(): number {
    return Math.max(...this.between.slice(1))
  }
}

/** Counts the requests as they begin, long writes by their first piece. */
class Counted extends Filter {
  readonly #tally: Tally

  constructor(tally: Tally) {
    super(new MemoryDevice(SIZE))
    this.#tally = tally
  }

  override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    this.#tally.served(offset)
    return super.read(offset, length, into, at)
  }

  override write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    if (offset % MIB === 0) this.#tally.served(offset)
    return super.write(offset, length, from, at, flags)
  }
}

/** Answers in the order of the requests, a few in each turn of the event loop. */
class Queued extends Filter {
  static readonly PER_TURN = 4
  readonly #tally: Tally
  readonly #queue: (() => void)[] = []

  constructor(tally: Tally) {
    super(new MemoryDevice(SIZE))
    this.#tally = tally
  }

  override async read(offset: number, length: number, into: Uint8Array, at: number): Promise<void> {
    await this.#turn()
    this.#tally.served(offset)
    await super.read(offset, length, into, at)
  }

  override async write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Promise<void> {
    await this.#turn()
    if (offset % MIB === 0) this.#tally.served(offset)
    await super.write(offset, length, from, at, flags)
  }

  #turn(): Promise<void> {
    return new Promise((resolve) => {
      this.#queue.push(resolve)
      if (this.#queue.length === 1) setImmediate(this.#work)
    })
  }

  readonly #work = (): void => {
    for (const next of this.#queue.splice(0, Queued.PER_TURN)) next()
    if (this.#queue.length > 0) setImmediate(this.#work)
  }
}

async function enterExport(peer: RawPeer, name: string): Promise<void> {
  await greet(peer)
  assert.equal((await ask(peer, goMessage(name))).at(-1)?.type, 1)
}

/** Has `DEPTH` requests in flight until its socket ends; takes replies by their length alone. */
async function flood(t: TestContext, socket: string, name: string, { type, length }: Load): Promise<net.Socket> {
  const greedy = new RawPeer({ transport: 'unix', path: socket, name })
  t.after(() => greedy.socket.destroy())
  await enterExport(greedy, name)
  const replySize = type === READ ? REPLY + length : REPLY
  const message =
    type === READ ? requestMessage({ type, length }) : requestMessage({ type, data: Buffer.alloc(length) })
  greedy.socket.removeAllListeners('data')
  let received = 0
  greedy.socket.on('data', (chunk: Buffer) => {
    received += chunk.length
    for (; received >= replySize; received -= replySize) greedy.socket.write(message)
  })
  for (let i = 0; i < DEPTH; i++) greedy.socket.write(message)
  return greedy.socket
}

/** Runs the greedy client on `greedyOn` and the modest one on `modestOn` of one server; returns the tally. */
async function contend(t: TestContext, tally: Tally, load: Load, greedyOn: Export, modestOn: Export): Promise<void> {
  const exports = new Set([greedyOn, modestOn])
  const server = new NbdServer({
    find: (name) => [...exports].find((each) => each.name === name),
    list: () => [...exports],
  })
  t.after(() => server.close())
  const socket = path.join(tempFolder(t), 'nbd.sock')
  await server.listenUnix(socket)
  const modest = new RawPeer({ transport: 'unix', path: socket, name: modestOn.name })
  t.after(() => modest.socket.destroy())
  await enterExport(modest, modestOn.name)
  const greedy = await flood(t, socket, greedyOn.name, load)
  for (let i = 0; i < MODEST_REQUESTS; i++) {
    modest.send(requestMessage({ type: READ, offset: MODEST, length: 512 }))
    await modest.receive(REPLY + 512)
  }
  greedy.destroy()
  assert.equal(tally.between.length, MODEST_REQUESTS)
  t.diagnostic(`between two requests at most ${tally.most} of the greedy client: ${tally.between.slice(1).join(' ')}`)
}

for (const load of LOADS) {
  test(`${load.name} at depth 128 let a client at depth 1 of the same export have its turn`, async (t) => {
    const tally = new Tally()
    const served = { name: 'disk', device: new Counted(tally) }
    await contend(t, tally, load, served, served)
    // What was in flight when the request came, and what came in the same turn.
    assert.ok(tally.most <= 2 * DEPTH, `${tally.most} requests came first`)
  })

  test(`${load.name} at depth 128 let a client at depth 1 of another export have its turn`, async (t) => {
    const tally = new Tally()
    const one = { name: 'one', device: new Counted(tally) }
    const other = { name: 'other', device: new Counted(tally) }
    await contend(t, tally, load, one, other)
    assert.ok(tally.most <= 2 * DEPTH, `${tally.most} requests came first`)
  })

  test(`${load.name} at depth 128 on a slow device are no more before a client at depth 1 than may be in flight`, async (t) => {
    const tally = new Tally()
    const served = { name: 'disk', device: new Queued(tally) }
    await contend(t, tally, load, served, served)
    assert.ok(tally.most <= NBD_REQUESTS_IN_FLIGHT + 2 * Queued.PER_TURN, `${tally.most} requests came first`)
  })

  test(`${load.name} at depth 128 on a slow device are not before those of another export`, async (t) => {
    const tally = new Tally()
    const slow = { name: 'slow', device: new Queued(tally) }
    const quick = { name: 'quick', device: new Counted(tally) }
    await contend(t, tally, load, slow, quick)
    assert.ok(tally.most <= 4 * Queued.PER_TURN, `${tally.most} requests came first`)
  })
}
