// The transmission phase of one connection, server's side: takes complete requests from the receiver, asks the device, and
// builds replies in the outbox. A request that the device finishes within the call allocates nothing; a slow one gets
// a pooled SlowRequest. Knows no sockets: whoever calls `consume` reads and flushes.
//
//   receiver -> consume -> device -> reply in place -> outbox
//                             \-> promise -> SlowRequest -> outbox

import { assert } from '../base/assert.ts'
import { getUint16, getUint32, getUint64 } from '../base/bytes.ts'
import {
  BREATH_MS,
  NBD_CONNECTION_BYTES,
  NBD_REQUESTS_IN_FLIGHT,
  NBD_WRITE_PIECE,
  REQUEST_MAX,
} from '../base/limits.ts'
import { type BlockDevice, FUA, MAY_UNMAP, type Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { guard } from '../block/guard.ts'
import { pool } from '../block/pool.ts'
import { blockStatus, type StatusAnswer } from './block-status.ts'
import { isReadOnly, type Session } from './export.ts'
import { LongWrite } from './long-write.ts'
import type { Outbox } from './outbox.ts'
import type { Receiver } from './receiver.ts'
import { beingShutDown, Refusal } from './refusal.ts'
import { readHeaderSize, simple, statusChunk, statusChunkSize, structuredError, structuredRead } from './replies.ts'
import type { SharedBuffer } from './shared-buffer.ts'
import {
  CHUNK_SIZE,
  COMMAND_FLAGS,
  KIND_ERRNO,
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_CACHE,
  NBD_CMD_DISC,
  NBD_CMD_FLAG_DF,
  NBD_CMD_FLAG_FAST_ZERO,
  NBD_CMD_FLAG_FUA,
  NBD_CMD_FLAG_NO_HOLE,
  NBD_CMD_FLAG_REQ_ONE,
  NBD_CMD_FLUSH,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
  NBD_CMD_WRITE_ZEROES,
  NBD_EINVAL,
  NBD_EIO,
  NBD_ENOSPC,
  NBD_ENOTSUP,
  NBD_EOVERFLOW,
  NBD_EPERM,
  NBD_REQUEST_MAGIC,
  REQUEST_SIZE,
  SIMPLE_REPLY_SIZE,
} from './spec.ts'
import { wireText } from './wire-text.ts'

/**
 * Why `consume` stopped: 'more' bytes are needed; 'blocked' until replies are sent or requests complete; the time slice is
 * used up ('yield'); the client said goodbye ('disconnect') or broke the protocol ('violation').
 */
export type Outcome = 'more' | 'blocked' | 'yield' | 'disconnect' | 'violation'

/** Requests, each with its data in units of 4 KiB, between two looks at the clock. */
const WORK_PER_LOOK = 32

/** Where the fields of a request are, from its start. */
const AT_FLAGS = 4
const AT_TYPE = 6
const AT_COOKIE = 8
const AT_OFFSET = 16
const AT_LENGTH = 24

/** Bytes that a CACHE request brings in at a time. */
const CACHE_PIECE = 256 * 1024

/** What the transmission asks of the connection around it. */
export interface TransmissionEvents {
  /** A slow request completed: a blocked connection may go on, a closing one may be done. */
  readonly onProgress: () => void
  /** An error that is no BlockError: the client is told EIO, and somebody should look. */
  readonly report: (error: unknown) => void
}

/** A request that the device answers later. Its two callbacks are made once and serve many requests. */
class SlowRequest {
  readonly cookie = new Uint8Array(8)
  type = 0
  offset = 0
  length = 0
  mayHole = false
  /** What must live until the end: a write's data, or a read's reply, which lies at `at`. */
  buffer: SharedBuffer | undefined
  at = 0
  answers: StatusAnswer[] | undefined
  /** The write that this is a piece of. */
  long: LongWrite | undefined
  readonly done: () => void
  readonly failed: (error: unknown) => void

  constructor(finish: (request: SlowRequest, isDone: boolean, error: unknown) => void) {
    this.done = () => finish(this, true, undefined)
    this.failed = (error) => finish(this, false, error)
  }
}

export class Transmission {
  readonly #session: Session
  readonly #device: BlockDevice
  readonly #readOnly: boolean
  readonly #structured: boolean
  readonly #outbox: Outbox
  readonly #events: TransmissionEvents
  readonly #idle: SlowRequest[] = []
  #slowCount = 0
  #slowBytes = 0
  #isShutDown = false
  /** Requests that the last `consume` took. */
  taken = 0
  /** A long write whose data is still arriving. */
  #arriving: LongWrite | undefined
  readonly #idleLong: LongWrite[] = []

  constructor(session: Session, outbox: Outbox, events: TransmissionEvents) {
    this.#session = session
    this.#device = guard(session.export.device)
    this.#readOnly = isReadOnly(session.export)
    this.#structured = session.structured
    this.#outbox = outbox
    this.#events = events
  }

  /** Requests that the device has not finished. */
  get inFlight(): number {
    return this.#slowCount
  }

  /** Handles the complete requests in the receiver, as many as the bounds admit. */
  consume(receiver: Receiver): Outcome {
    const began = performance.now()
    let work = 0
    this.taken = 0
    for (;;) {
      const long = this.#arriving
      if (long === undefined ? receiver.length < REQUEST_SIZE : !long.isReady(receiver)) return 'more'
      if (work >= WORK_PER_LOOK) {
        if (performance.now() - began >= BREATH_MS) return 'yield'
        work = 0
      }
      if (long !== undefined) {
        if (!this.#advance(long, receiver)) return 'blocked'
        work += 1 + (long.length >>> 12)
        continue
      }
      const { bytes, start } = receiver
      if (getUint32(bytes, start) !== NBD_REQUEST_MAGIC) return 'violation'
      const type = getUint16(bytes, start + AT_TYPE)
      const length = getUint32(bytes, start + AT_LENGTH)
      const data = type === NBD_CMD_READ || type === NBD_CMD_WRITE ? length : 0
      if (!this.#admits(data)) return 'blocked'
      work += 1 + (data >>> 12)
      this.taken++
      if (type === NBD_CMD_DISC) return 'disconnect'
      if (type === NBD_CMD_WRITE) {
        if (length > REQUEST_MAX) return 'violation'
        if (receiver.length < REQUEST_SIZE + length) {
          if (length <= NBD_WRITE_PIECE) return 'more'
          this.#beginLong(bytes, start, length)
          receiver.start += REQUEST_SIZE
          continue
        }
        receiver.start += REQUEST_SIZE + length
        this.#write(bytes, start, receiver.buffer, start + REQUEST_SIZE)
      } else {
        receiver.start += REQUEST_SIZE
        if (type === NBD_CMD_READ) this.#read(bytes, start)
        else this.#other(bytes, start)
      }
    }
  }

  /** From here on every request is refused as a server that ends does it; those in flight are still answered. */
  shutDown(): void {
    this.#isShutDown = true
    if (this.#arriving !== undefined) this.#arriving.failure ??= beingShutDown()
  }

  /** Gives back what no slow request uses. The socket must be closed. */
  dispose(): void {
    this.#arriving?.drop()
    this.#arriving = undefined
  }

  #admits(data: number): boolean {
    if (this.#slowCount >= NBD_REQUESTS_IN_FLIGHT) return false
    const load = this.#outbox.unsent + this.#slowBytes
    return load === 0 || load + data <= NBD_CONNECTION_BYTES
  }

  #read(bytes: Uint8Array, start: number): void {
    try {
      const flags = getUint16(bytes, start + AT_FLAGS)
      const offset = getUint64(bytes, start + AT_OFFSET)
      const length = getUint32(bytes, start + AT_LENGTH)
      this.#checkFlags(NBD_CMD_READ, flags)
      const mayHole = (flags & NBD_CMD_FLAG_DF) === 0
      if (length > REQUEST_MAX) throw this.#readTooLong(offset, length)
      const header = readHeaderSize(this.#structured)
      const at = this.#outbox.reserve(header + length)
      const to = this.#outbox.bytes
      const pending = this.#device.read(offset, length, to, at + header)
      if (pending === undefined) {
        this.#outbox.commit(this.#finishRead(to, at, bytes, start + AT_COOKIE, offset, length, mayHole))
        return
      }
      const request = this.#slow(bytes, start, length)
      request.buffer = this.#outbox.detach(header + length)
      request.at = at
      request.offset = offset
      request.mayHole = mayHole
      pending.then(request.done, request.failed)
    } catch (error) {
      this.#fail(bytes, start + AT_COOKIE, NBD_CMD_READ, error)
    }
  }

  /** "Too long" is the answer only to who can ask for less and get it, and who knows of it: with structured replies. */
  #readTooLong(offset: number, length: number): Refusal {
    this.#checkRange(offset, length)
    return new Refusal(this.#structured ? NBD_EOVERFLOW : NBD_EINVAL, `a read has at most ${REQUEST_MAX} bytes`)
  }

  #finishRead(
    to: Uint8Array,
    at: number,
    cookie: Uint8Array,
    from: number,
    offset: number,
    length: number,
    mayHole: boolean,
  ): number {
    if (this.#structured) return structuredRead(to, at, cookie, from, offset, length, mayHole)
    return simple(to, at, cookie, from, 0) + length
  }

  #write(bytes: Uint8Array, start: number, data: SharedBuffer, at: number): void {
    try {
      const flags = getUint16(bytes, start + AT_FLAGS)
      const length = getUint32(bytes, start + AT_LENGTH)
      this.#checkFlags(NBD_CMD_WRITE, flags)
      this.#checkWritable()
      const offset = getUint64(bytes, start + AT_OFFSET)
      const pending = this.#device.write(offset, length, data.bytes, at, flags & NBD_CMD_FLAG_FUA ? FUA : 0)
      if (pending === undefined) {
        this.#succeed(bytes, start + AT_COOKIE)
        return
      }
      const request = this.#slow(bytes, start, length)
      request.buffer = data.retain()
      pending.then(request.done, request.failed)
    } catch (error) {
      this.#fail(bytes, start + AT_COOKIE, NBD_CMD_WRITE, error)
    }
  }

  /** A write whose data arrives in pieces. What can be known before the first one is written is checked before. */
  #beginLong(bytes: Uint8Array, start: number, length: number): void {
    const long = this.#idleLong.pop() ?? new LongWrite()
    const { bestBlock, minimumBlock } = this.#device.can
    const offset = getUint64(bytes, start + AT_OFFSET)
    long.begin(bytes, start, offset, length, Math.max(bestBlock, minimumBlock))
    this.#arriving = long
    try {
      const flags = getUint16(bytes, start + AT_FLAGS)
      this.#checkFlags(NBD_CMD_WRITE, flags)
      this.#checkWritable()
      this.#checkRange(offset, length, NBD_ENOSPC)
      long.needsFlush = (flags & NBD_CMD_FLAG_FUA) !== 0
    } catch (error) {
      long.failure = error
    }
  }

  /** Deals with the piece that is ready; false when the bounds do not admit it now. */
  #advance(long: LongWrite, receiver: Receiver): boolean {
    if (long.failure === undefined) {
      if (!this.#admits(long.length)) return false
      this.#writePiece(long)
    }
    long.take(receiver)
    if (long.left === 0) {
      this.#arriving = undefined
      if (long.inFlight === 0) this.#endLong(long)
    }
    return true
  }

  #writePiece(long: LongWrite): void {
    const { offset, length, buffer, at } = long
    assert(buffer !== undefined, 'a piece that is ready has its data')
    try {
      const pending = this.#device.write(offset, length, buffer.bytes, at, 0)
      if (pending !== undefined) this.#await(long, pending, length, buffer.retain())
    } catch (error) {
      long.failure ??= error
    }
  }

  /** All data has arrived and no piece is in flight: flushes if that is owed, and answers. */
  #endLong(long: LongWrite): void {
    if (long.needsFlush && long.failure === undefined) {
      long.needsFlush = false
      try {
        const pending = this.#device.flush()
        if (pending !== undefined) return this.#await(long, pending, 0, undefined)
      } catch (error) {
        long.failure = error
      }
    }
    if (long.failure === undefined) this.#succeed(long.header, AT_COOKIE)
    else this.#fail(long.header, AT_COOKIE, NBD_CMD_WRITE, long.failure)
    this.#idleLong.push(long)
  }

  #await(long: LongWrite, pending: Promise<void>, length: number, buffer: SharedBuffer | undefined): void {
    const request = this.#slow(long.header, 0, length)
    request.buffer = buffer
    request.long = long
    long.inFlight++
    pending.then(request.done, request.failed)
  }

  #finishPiece(long: LongWrite, isDone: boolean, error: unknown): void {
    long.inFlight--
    if (!isDone) long.failure ??= error
    if (long.left === 0 && long.inFlight === 0) this.#endLong(long)
  }

  /** The commands without data. */
  #other(bytes: Uint8Array, start: number): void {
    const type = getUint16(bytes, start + AT_TYPE)
    try {
      const flags = getUint16(bytes, start + AT_FLAGS)
      const offset = getUint64(bytes, start + AT_OFFSET)
      const length = getUint32(bytes, start + AT_LENGTH)
      this.#checkFlags(type, flags)
      const answers: StatusAnswer[] | undefined = type === NBD_CMD_BLOCK_STATUS ? [] : undefined
      const pending = this.#start(type, flags, offset, length, answers)
      if (pending === undefined) {
        if (answers === undefined) this.#succeed(bytes, start + AT_COOKIE)
        else this.#sendStatus(bytes, start + AT_COOKIE, answers)
        return
      }
      const request = this.#slow(bytes, start, 0)
      request.answers = answers
      pending.then(request.done, request.failed)
    } catch (error) {
      this.#fail(bytes, start + AT_COOKIE, type, error)
    }
  }

  #start(type: number, flags: number, offset: number, length: number, answers: StatusAnswer[] | undefined): Pending {
    const fua = flags & NBD_CMD_FLAG_FUA ? FUA : 0
    switch (type) {
      case NBD_CMD_FLUSH:
        if (offset !== 0 || length !== 0) throw new Refusal(NBD_EINVAL, 'a flush has neither offset nor length')
        return this.#device.flush()
      case NBD_CMD_TRIM:
        this.#checkWritable()
        return this.#device.trim(offset, length, fua)
      case NBD_CMD_WRITE_ZEROES: {
        this.#checkWritable()
        const { zero } = this.#device.can
        // Where zeroing is not advertised at all, neither is its fast form: the device refuses both as invalid.
        const isSlow = zero === 'emulated' && (flags & NBD_CMD_FLAG_FAST_ZERO) !== 0
        if (isSlow) throw new Refusal(NBD_ENOTSUP, 'zeroing is not fast here')
        return this.#device.zero(offset, length, fua | (flags & NBD_CMD_FLAG_NO_HOLE ? 0 : MAY_UNMAP))
      }
      case NBD_CMD_CACHE:
        this.#checkRange(offset, length)
        if (length > REQUEST_MAX) throw new Refusal(NBD_EOVERFLOW, `at most ${REQUEST_MAX} bytes are cached at once`)
        return this.#cache(offset, length)
      default: {
        const { contexts } = this.#session
        if (contexts.length === 0) throw new Refusal(NBD_EINVAL, 'no metadata context was selected')
        this.#checkRange(offset, length)
        if (length === 0) throw new Refusal(NBD_EINVAL, 'block status of no bytes')
        return blockStatus(contexts, offset, length, (flags & NBD_CMD_FLAG_REQ_ONE) !== 0, answers ?? [])
      }
    }
  }

  /** Reads the range for the sake of the page cache below. */
  async #cache(offset: number, length: number): Promise<void> {
    const scratch = pool.take(CACHE_PIECE)
    try {
      const end = offset + length
      for (let at = offset; at < end; at += CACHE_PIECE) {
        await this.#device.read(at, Math.min(CACHE_PIECE, end - at), scratch, 0)
      }
    } finally {
      pool.give(scratch)
    }
  }

  /** For what the device does not check itself. */
  #checkRange(offset: number, length: number, outside: number = NBD_EINVAL): void {
    const { size, can } = this.#device
    if (offset < 0 || offset + length > size) throw new Refusal(outside, `the export has ${size} bytes`)
    const unit = can.minimumBlock
    if (offset % unit !== 0 || length % unit !== 0)
      throw new Refusal(NBD_EINVAL, `requests are multiples of ${unit} bytes`)
  }

  #checkFlags(type: number, flags: number): void {
    if (this.#isShutDown) throw beingShutDown()
    const allowed = COMMAND_FLAGS[type]
    if (allowed === undefined) throw new Refusal(NBD_EINVAL, `command ${type} is unknown`)
    const usable = this.#structured ? allowed : allowed & ~NBD_CMD_FLAG_DF
    if ((flags & ~usable) !== 0) throw new Refusal(NBD_EINVAL, `flags ${flags} are not valid for command ${type}`)
  }

  #checkWritable(): void {
    if (this.#readOnly) throw new Refusal(NBD_EPERM, 'the export is read-only')
  }

  #slow(bytes: Uint8Array, start: number, length: number): SlowRequest {
    const request = this.#idle.pop() ?? new SlowRequest(this.#finish)
    for (let i = 0; i < 8; i++) request.cookie[i] = bytes[start + AT_COOKIE + i] as number
    request.type = getUint16(bytes, start + AT_TYPE)
    request.length = length
    this.#slowCount++
    this.#slowBytes += length
    return request
  }

  readonly #finish = (request: SlowRequest, isDone: boolean, error: unknown): void => {
    const { cookie, buffer, answers, length, long } = request
    if (long !== undefined) this.#finishPiece(long, isDone, error)
    else if (!isDone) this.#fail(cookie, 0, request.type, error)
    else if (answers !== undefined) this.#sendStatus(cookie, 0, answers)
    else if (request.type === NBD_CMD_READ && buffer !== undefined) {
      const { at, offset, mayHole } = request
      const size = this.#finishRead(buffer.bytes, at, cookie, 0, offset, length, mayHole)
      this.#outbox.send(buffer.retain(), at, size)
    } else this.#succeed(cookie, 0)
    buffer?.release()
    request.buffer = undefined
    request.answers = undefined
    request.long = undefined
    this.#slowCount--
    this.#slowBytes -= length
    this.#idle.push(request)
    this.#outbox.soon()
    this.#events.onProgress()
  }

  #succeed(cookie: Uint8Array, from: number): void {
    const at = this.#outbox.reserve(SIMPLE_REPLY_SIZE)
    this.#outbox.commit(simple(this.#outbox.bytes, at, cookie, from, 0))
  }

  #sendStatus(cookie: Uint8Array, from: number, answers: readonly StatusAnswer[]): void {
    for (const [i, { id, extents }] of answers.entries()) {
      const at = this.#outbox.reserve(statusChunkSize(extents))
      const isLast = i === answers.length - 1
      this.#outbox.commit(statusChunk(this.#outbox.bytes, at, cookie, from, id, extents, isLast))
    }
  }

  #fail(cookie: Uint8Array, from: number, type: number, error: unknown): void {
    const errno = this.#errnoOf(type, error)
    if (!this.#structured) {
      const at = this.#outbox.reserve(SIMPLE_REPLY_SIZE)
      this.#outbox.commit(simple(this.#outbox.bytes, at, cookie, from, errno))
      return
    }
    const text = error instanceof BlockError || error instanceof Refusal ? error.message : 'internal error'
    const message = wireText(text)
    const at = this.#outbox.reserve(CHUNK_SIZE + 6 + message.length)
    this.#outbox.commit(structuredError(this.#outbox.bytes, at, cookie, from, errno, message))
  }

  #errnoOf(type: number, error: unknown): number {
    if (error instanceof Refusal) return error.errno
    if (!(error instanceof BlockError)) {
      this.#events.report(error)
      return NBD_EIO
    }
    // Writing past the end is "no space", reading there is "invalid" ("Error values").
    const isWrite = type === NBD_CMD_WRITE || type === NBD_CMD_WRITE_ZEROES
    return error.kind === 'out-of-range' && isWrite ? NBD_ENOSPC : KIND_ERRNO[error.kind]
  }
}
