// One trial of the client's fuzz: a server's side of a conversation, damaged and cut, is given to the client's handshake and to its
// parser of replies, without a socket. However it ends: as understood or as a BlockError, no request finishes twice or after
// the end, no byte beside a caller's buffer changes, and every buffer comes back.

import assert from 'node:assert/strict'
import { NBD_OPTION_MAX, NBD_RECEIVE_BUFFER } from '../../src/base/limits.ts'
import { Random } from '../../src/base/random.ts'
import { BlockError } from '../../src/block/error.ts'
import { type ExportInfo, negotiate, type Wire } from '../../src/nbd/client-handshake.ts'
import { ReplyParser } from '../../src/nbd/client-replies.ts'
import { ClientRequest } from '../../src/nbd/client-request.ts'
import { Receiver } from '../../src/nbd/receiver.ts'
import { sharedBuffersInUse } from '../../src/nbd/shared-buffer.ts'
import { inPieces, WireWriter } from './nbd-bytes.ts'

const SIZE = 1024 * 1024
const [READ, WRITE, FLUSH, STATUS] = [0, 1, 3, 7] as const
const CONTEXT = 'base:allocation'

/** Bytes before and behind each caller's part of a buffer, which nothing may change. */
const MARGIN = 64
const UNTOUCHED = 0xa5
/** What a read brings, unless the reply was damaged. */
const DATA = 0x5a

const writer = new WireWriter()
const buffers = Array.from({ length: 8 }, () => Buffer.alloc(2 * MARGIN + 65_536))

function reply(option: number, type: number, data: () => void = () => {}): void {
  writer.u32(0x0003_e889).u32(0x0455_65a9).u32(option).u32(type).u32(0)
  const from = writer.length
  data()
  writer.patchLength(from - 4, from)
}

interface Kind {
  readonly structured: boolean
  readonly hasGo: boolean
}

/** The handshake of a server that means well. */
function writeHandshake(random: Random, { structured, hasGo }: Kind): void {
  const noZeroes = random.chance(0.5)
  writer.reset()
  writer.text('NBDMAGICIHAVEOPT').u16(noZeroes ? 3 : 1)
  reply(8, structured ? 1 : 0x8000_0001)
  if (structured) {
    if (random.chance(0.9)) reply(10, 4, () => writer.u32(1).text(CONTEXT))
    reply(10, random.chance(0.95) ? 1 : 0x8000_0003)
  }
  if (!hasGo) {
    reply(7, 0x8000_0001, () => writer.text('old'))
    writer
      .u64(SIZE)
      .u16(0xfff)
      .fill(noZeroes ? 0 : 124, 0)
    return
  }
  for (let i = random.below(3); i > 0; i--) reply(7, 3, () => writer.u16(random.pick([1, 2, 50])).text('words'))
  if (random.chance(0.7))
    reply(7, 3, () =>
      writer
        .u16(3)
        .u32(random.pick([1, 512]))
        .u32(4096)
        .u32(65_536),
    )
  reply(7, 3, () => writer.u16(0).u64(SIZE).u16(0xfff))
  reply(7, 1)
}

function makeRequests(random: Random, info: ExportInfo): ClientRequest[] {
  const types = info.contexts.has(CONTEXT) ? [READ, READ, WRITE, FLUSH, STATUS] : [READ, READ, WRITE, FLUSH]
  return Array.from({ length: random.between(1, buffers.length) }, (_, slot) => {
    const type = random.pick(types)
    const length = type === FLUSH ? 0 : random.pick([1, 512, 4096, 10_000, 65_536])
    const offset = type === FLUSH ? 0 : random.below(SIZE - length)
    const bytes = buffers[slot] as Buffer
    if (type === READ) bytes.fill(UNTOUCHED, 0, MARGIN + 1).fill(UNTOUCHED, MARGIN + length - 1, length + 2 * MARGIN)
    const fields = { type, flags: 0, offset, length, context: CONTEXT }
    return new ClientRequest(type === READ ? { ...fields, bytes, at: MARGIN } : fields, slot + 100)
  })
}

function chunk(request: ClientRequest, slot: number, flags: number, type: number, length: number): void {
  writer.u32(0x668e_33ef).u16(flags).u16(type).u32(request.sequence).u32(slot).u32(length)
}

function simple(request: ClientRequest, slot: number, errno: number): void {
  writer.u32(0x6744_6698).u32(errno).u32(request.sequence).u32(slot)
}

function writeError(random: Random, request: ClientRequest, slot: number): void {
  const withOffset = random.chance(0.4)
  const message = random.pick(['', 'it failed', 'x'.repeat(200)])
  chunk(request, slot, 1, withOffset ? 0x8002 : 0x8001, 6 + message.length + (withOffset ? 8 : 0))
  writer
    .u32(random.pick([1, 5, 22, 28, 108, 4711]))
    .u16(message.length)
    .text(message)
  if (withOffset) writer.u64(request.offset)
}

/** Data and holes that cover the read, in order or backwards. */
function writeRead(random: Random, request: ClientRequest, slot: number): void {
  const { offset, length } = request
  const cuts = [0, length]
  for (let i = random.pick([0, 0, 1, 3]); i > 0 && length > 1; i--) cuts.push(random.between(1, length - 1))
  const ends = [...new Set(cuts)].sort((a, b) => a - b)
  const pieces = ends.slice(1).map((end, i) => [ends[i] as number, end] as const)
  if (random.chance(0.3)) pieces.reverse()
  const endsWithNone = random.chance(0.3)
  for (const [i, [from, to]] of pieces.entries()) {
    const flags = i === pieces.length - 1 && !endsWithNone ? 1 : 0
    if (random.chance(0.2)) {
      chunk(request, slot, flags, 2, 12)
      writer.u64(offset + from).u32(to - from)
    } else {
      chunk(request, slot, flags, 1, 8 + to - from)
      writer.u64(offset + from).fill(to - from, DATA)
    }
  }
  if (endsWithNone) chunk(request, slot, 1, 0, 0)
}

function writeReply(random: Random, request: ClientRequest, slot: number, structured: boolean, fails: boolean): void {
  if (fails) {
    if (structured) writeError(random, request, slot)
    else simple(request, slot, random.pick([1, 5, 22, 108]))
  } else if (request.type === STATUS) {
    const half = request.length >>> 1
    const extents = half > 0 && random.chance(0.5) ? [half, 3, request.length - half, 0] : [request.length, 1]
    chunk(request, slot, 1, 5, 4 + extents.length * 4)
    writer.u32(1)
    for (const each of extents) writer.u32(each)
  } else if (request.type !== READ) {
    if (structured && random.chance(0.5)) chunk(request, slot, 1, 0, 0)
    else simple(request, slot, 0)
  } else if (structured) writeRead(random, request, slot)
  else {
    simple(request, slot, 0)
    writer.fill(request.length, DATA)
  }
}

function wireOf(bytes: Uint8Array): Wire {
  let at = 0
  return {
    name: 'fuzzed',
    send: (message) => assert.ok(message.length <= NBD_OPTION_MAX + 16),
    receive: (count) => {
      assert.ok(count <= NBD_OPTION_MAX, `${count} bytes at once`)
      if (at + count > bytes.length) return Promise.reject(new BlockError('io', 'the conversation is over'))
      at += count
      return Promise.resolve(bytes.slice(at - count, at))
    },
  }
}

export interface ClientTrial {
  /** 'answered' when all requests were, 'handshake refused', 'violation', 'left' for ESHUTDOWN, or 'unanswered'. */
  readonly outcome: string
  readonly isDamaged: boolean
}

/** Runs the trial of a seed; throws when a rule is broken. */
export async function runClientTrial(seed: number): Promise<ClientTrial> {
  const random = new Random(seed)
  const hasGo = random.chance(0.9)
  const kind = { hasGo, structured: random.chance(0.8) }
  writeHandshake(random, kind)
  const damagedFirst = random.chance(0.3) && writer.damage(random) > 0
  let info: ExportInfo
  try {
    info = await negotiate(wireOf(writer.bytes), 'disk', [CONTEXT])
  } catch (error) {
    if (!(error instanceof BlockError)) throw error
    const wasRefused = damagedFirst || error.kind !== 'io'
    assert.ok(wasRefused, 'a whole handshake is understood')
    return { outcome: 'handshake refused', isDamaged: damagedFirst }
  }
  return transmit(random, info, damagedFirst)
}

function transmit(random: Random, info: ExportInfo, damagedFirst: boolean): ClientTrial {
  const before = sharedBuffersInUse()
  const requests = makeRequests(random, info)
  const open: (ClientRequest | undefined)[] = [...requests]
  const failing = requests.map(() => random.chance(0.1))
  writer.reset()
  const order = [...requests.keys()]
  if (random.chance(0.5)) order.reverse()
  for (const slot of order)
    writeReply(random, requests[slot] as ClientRequest, slot, info.structured, failing[slot] as boolean)
  const isDamaged = (random.chance(0.85) && writer.damage(random) > 0) || damagedFirst
  let violation: string | undefined
  let isLeaving = false
  const receiver = new Receiver(NBD_RECEIVE_BUFFER)
  const parser = new ReplyParser('fuzzed', info, receiver, {
    find: (slot) => open[slot],
    finished: (slot, error) => {
      const request = open[slot]
      assert.ok(request !== undefined && violation === undefined, 'each request finishes once, before the end')
      assert.ok(error !== undefined || request.isComplete)
      if (!isDamaged) assertAnswered(request, error, failing[slot] as boolean)
      open[slot] = undefined
    },
    leaving: () => void (isLeaving = true),
    violated: (what) => {
      assert.equal(violation, undefined, 'a connection ends once')
      violation = what
    },
  })
  inPieces(writer.bytes, random, (piece) => {
    for (let at = 0; at < piece.length && violation === undefined; ) {
      const room = receiver.room()
      assert.ok(room.length > 0, 'there is always room')
      const count = Math.min(room.length, piece.length - at)
      room.set(piece.subarray(at, at + count))
      receiver.arrived(count)
      parser.parse()
      at += count
    }
    return violation === undefined
  })
  parser.dispose()
  receiver.dispose()
  for (const [slot, request] of requests.entries()) if (request.type === READ) assertMargins(slot, request)
  assert.equal(sharedBuffersInUse(), before, 'every buffer came back')
  const isAnswered = open.every((request) => request === undefined)
  assert.ok(isDamaged || isAnswered || isLeaving, `what is right is understood: ${violation}`)
  const outcome = violation !== undefined ? 'violation' : isLeaving ? 'left' : isAnswered ? 'answered' : 'unanswered'
  return { outcome, isDamaged }
}

function assertAnswered(request: ClientRequest, error: BlockError | undefined, fails: boolean): void {
  assert.equal(error !== undefined, fails)
  if (request.type !== READ || fails) return
  const { bytes, at, length } = request
  for (const byte of [bytes?.[at], bytes?.[at + length - 1]]) assert.ok(byte === DATA || byte === 0, 'the data arrived')
}

function assertMargins(slot: number, { at, length }: ClientRequest): void {
  const bytes = buffers[slot] as Buffer
  let isUntouched = true
  for (let i = 0; i < MARGIN; i++)
    isUntouched &&= bytes[at - 1 - i] === UNTOUCHED && bytes[at + length + i] === UNTOUCHED
  assert.ok(isUntouched, 'nothing beside the buffer changes')
}
