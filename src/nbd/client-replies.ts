// Parses what a server says in the transmission phase, from the receiver straight into the callers' buffers. Believes nothing:
// whatever does not belong to a request in flight, or does not fit it, is a violation, and nothing more is parsed. Knows
// no sockets.
//
//   receiver -> header -> (data -> the caller's buffer | chunk -> a buffer of its own) -> request -> finished

import { getUint16, getUint32, getUint64, utf8 } from '../base/bytes.ts'
import { NBD_STATUS_REPLY_MAX } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import type { ExportInfo } from './client-handshake.ts'
import type { ClientRequest } from './client-request.ts'
import type { Receiver } from './receiver.ts'
import { SharedBuffer } from './shared-buffer.ts'
import {
  CHUNK_SIZE,
  kindOfErrno,
  NBD_CMD_READ,
  NBD_REPLY_FLAG_DONE,
  NBD_REPLY_TYPE_BLOCK_STATUS,
  NBD_REPLY_TYPE_ERROR_OFFSET,
  NBD_REPLY_TYPE_FLAG_ERROR,
  NBD_REPLY_TYPE_NONE,
  NBD_REPLY_TYPE_OFFSET_DATA,
  NBD_REPLY_TYPE_OFFSET_HOLE,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
  SIMPLE_REPLY_SIZE,
} from './spec.ts'

/** The fields of an error chunk, and of one with an offset; the longest has a message whose length fills its 16 bits. */
const ERROR_FIELDS = 6
const ERROR_OFFSET_FIELDS = 14
const ERROR_CHUNK_MAX = ERROR_OFFSET_FIELDS + 0xffff

export interface ReplyEvents {
  /** The request in flight in a slot. */
  find(slot: number): ClientRequest | undefined
  /** The request's reply is complete; `error` when it failed. */
  finished(slot: number, error: BlockError | undefined): void
  /** The server refused a request, which stays in flight, since it is shutting down (NBD_ESHUTDOWN). */
  leaving(): void
  /** The server broke the protocol: the connection must end. */
  violated(what: string): void
}

/** What the bytes now arriving belong to. */
type Incoming =
  | { readonly kind: 'header' }
  | { readonly kind: 'data'; readonly slot: number; readonly isLast: boolean }
  | {
      readonly kind: 'chunk'
      readonly slot: number
      readonly isLast: boolean
      readonly type: number
      readonly length: number
      readonly buffer: SharedBuffer
    }

const HEADER: Incoming = { kind: 'header' }

export class ReplyParser {
  readonly #name: string
  readonly #structured: boolean
  readonly #contexts: ReadonlyMap<string, number>
  readonly #contextIds: ReadonlySet<number>
  readonly #receiver: Receiver
  readonly #events: ReplyEvents
  #incoming: Incoming = HEADER
  #slot = 0
  #isOver = false

  constructor(name: string, info: ExportInfo, receiver: Receiver, events: ReplyEvents) {
    this.#name = name
    this.#structured = info.structured
    this.#contexts = info.contexts
    this.#contextIds = new Set(info.contexts.values())
    this.#receiver = receiver
    this.#events = events
  }

  /** Handles the complete replies in the receiver. */
  parse(): void {
    let goesOn = true
    while (goesOn && !this.#isOver) {
      const incoming = this.#incoming
      if (this.#receiver.isDiverting) return
      if (incoming.kind === 'header') goesOn = this.#header()
      else {
        this.#incoming = HEADER
        if (incoming.kind === 'chunk') this.#chunk(incoming.slot, incoming.type, incoming.buffer, incoming.length)
        if (incoming.isLast) this.#finish(incoming.slot)
      }
    }
  }

  /** Parses nothing more, and gives back what a chunk was arriving in. The receiver takes nothing more either. */
  dispose(): void {
    this.#isOver = true
    if (this.#incoming.kind === 'chunk') this.#incoming.buffer.release()
    this.#incoming = HEADER
  }

  /** Handles a reply's header and what is small behind it; false when more bytes are needed first. */
  #header(): boolean {
    const { bytes, start, length } = this.#receiver
    if (length < SIMPLE_REPLY_SIZE) return false
    const magic = getUint32(bytes, start)
    if (magic === NBD_SIMPLE_REPLY_MAGIC) {
      const request = this.#find(bytes, start + 8)
      this.#receiver.start += SIMPLE_REPLY_SIZE
      if (request !== undefined) this.#simple(request, getUint32(bytes, start + 4))
      return true
    }
    if (magic !== NBD_STRUCTURED_REPLY_MAGIC || !this.#structured) return this.#violate('a reply of unknown kind')
    if (length < CHUNK_SIZE) return false
    return this.#structuredReply(bytes, start)
  }

  /** The request of a cookie; leaves its slot in `#slot`. */
  #find(bytes: Uint8Array, at: number): ClientRequest | undefined {
    this.#slot = getUint32(bytes, at + 4)
    const request = this.#events.find(this.#slot)
    if (request?.sequence === getUint32(bytes, at)) return request
    this.#violate('a reply to no request')
    return undefined
  }

  #simple(request: ClientRequest, errno: number): void {
    if (errno !== 0) {
      request.error = this.#errorOf(request, errno, '')
      this.#finish(this.#slot)
      return
    }
    if (request.type !== NBD_CMD_READ) this.#finish(this.#slot)
    else if (this.#structured) this.#violate('a simple reply to a read')
    else {
      request.accept(request.offset, request.length)
      this.#data(request, request.offset, request.length, true)
    }
  }

  #data(request: ClientRequest, offset: number, length: number, isLast: boolean): void {
    if (request.bytes === undefined) return
    this.#incoming = { kind: 'data', slot: this.#slot, isLast }
    this.#receiver.divert(request.bytes, request.at + offset - request.offset, length)
  }

  #structuredReply(bytes: Uint8Array, start: number): boolean {
    const request = this.#find(bytes, start + 8)
    if (request === undefined) return false
    const isLast = (getUint16(bytes, start + 4) & NBD_REPLY_FLAG_DONE) !== 0
    const type = getUint16(bytes, start + 6)
    const length = getUint32(bytes, start + 16)
    const slot = this.#slot
    if (type === NBD_REPLY_TYPE_NONE) {
      if (length !== 0 || !isLast) return this.#violate('a chunk of type NONE that is not the last or not empty')
      this.#receiver.start += CHUNK_SIZE
      this.#finish(slot)
      return true
    }
    if (type === NBD_REPLY_TYPE_OFFSET_DATA) {
      if (length < 9) return this.#violate('a data chunk without data')
      if (this.#receiver.length < CHUNK_SIZE + 8) return false
      const offset = getUint64(bytes, start + CHUNK_SIZE)
      if (!request.accept(offset, length - 8)) return this.#violate('data that was not asked for')
      this.#receiver.start += CHUNK_SIZE + 8
      this.#data(request, offset, length - 8, isLast)
      return true
    }
    const isError = (type & NBD_REPLY_TYPE_FLAG_ERROR) !== 0
    const isKnown = isError || type === NBD_REPLY_TYPE_OFFSET_HOLE || type === NBD_REPLY_TYPE_BLOCK_STATUS
    if (!isKnown) return this.#violate(`a chunk of unknown type ${type}`)
    if (length > (isError ? ERROR_CHUNK_MAX : NBD_STATUS_REPLY_MAX)) return this.#violate(`a chunk of ${length} bytes`)
    this.#receiver.start += CHUNK_SIZE
    if (length === 0) return this.#violate('an empty chunk')
    const buffer = new SharedBuffer(length)
    this.#incoming = { kind: 'chunk', slot, isLast, type, length, buffer }
    this.#receiver.divert(buffer.bytes, 0, length)
    return true
  }

  /** A chunk that is not a read's data has arrived whole. */
  #chunk(slot: number, type: number, buffer: SharedBuffer, length: number): void {
    const request = this.#events.find(slot)
    const { bytes } = buffer
    if (request === undefined) this.#violate('a reply to no request')
    else if (type === NBD_REPLY_TYPE_OFFSET_HOLE) this.#hole(request, bytes, length)
    else if (type === NBD_REPLY_TYPE_BLOCK_STATUS) this.#status(request, bytes, length)
    else this.#error(request, type, bytes, length)
    buffer.release()
  }

  #error(request: ClientRequest, type: number, bytes: Uint8Array, length: number): void {
    const hasOffset = type === NBD_REPLY_TYPE_ERROR_OFFSET
    const fields = hasOffset ? ERROR_OFFSET_FIELDS : ERROR_FIELDS
    if (length < fields || getUint16(bytes, 4) > length - fields || getUint32(bytes, 0) === 0) {
      this.#violate('a bad error chunk')
      return
    }
    const end = ERROR_FIELDS + getUint16(bytes, 4)
    const place = hasOffset ? getUint64(bytes, end) - request.offset : 0
    if (place < 0 || place > request.length) {
      this.#violate('an error outside its request')
      return
    }
    request.error ??= this.#errorOf(request, getUint32(bytes, 0), utf8.decode(bytes.subarray(ERROR_FIELDS, end)))
  }

  #hole(request: ClientRequest, bytes: Uint8Array, length: number): void {
    const offset = length === 12 ? getUint64(bytes, 0) : -1
    const size = length === 12 ? getUint32(bytes, 8) : 0
    if (offset < 0 || !request.accept(offset, size)) this.#violate('a hole that was not asked for')
    else {
      const at = request.at + offset - request.offset
      request.bytes?.fill(0, at, at + size)
    }
  }

  #status(request: ClientRequest, bytes: Uint8Array, length: number): void {
    if (length < 12 || length % 8 !== 4 || !this.#contextIds.has(getUint32(bytes, 0))) {
      this.#violate('a bad block status chunk')
      return
    }
    if (getUint32(bytes, 0) !== this.#contexts.get(request.context)) return
    const extents: number[] = []
    for (let at = 4; at < length; at += 4) extents.push(getUint32(bytes, at))
    if (!request.acceptStatus(extents)) this.#violate('a block status that was not asked for')
  }

  #finish(slot: number): void {
    const request = this.#events.find(slot)
    if (request === undefined || this.#isOver) return
    if (request.error === undefined && !request.isComplete) this.#violate('a reply that ends too early')
    else if (request.error?.kind === 'closed') this.#events.leaving()
    else this.#events.finished(slot, request.error)
  }

  #errorOf({ offset, length }: ClientRequest, errno: number, message: string): BlockError {
    const what = message === '' ? `error ${errno} from the server` : message
    return new BlockError(kindOfErrno(errno), `${this.#name}: ${what}`, { device: this.#name, offset, length })
  }

  #violate(what: string): false {
    this.#isOver = true
    this.#events.violated(what)
    return false
  }
}
