// One connection of the client to a server: connects, negotiates, sends requests, and parses replies straight into the
// callers' buffers. It ends when it is lost or the server breaks the protocol; what then happens to the requests is the
// client's business.
//
//   connecting -> negotiating (-> TLS -> negotiating) -> open -> closed

import net from 'node:net'
import { getUint16, getUint32, getUint64, setUint16, setUint32, setUint64, utf8 } from '../base/bytes.ts'
import { NBD_HANDSHAKE_MS, NBD_RECEIVE_BUFFER, NBD_STATUS_REPLY_MAX } from '../base/limits.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import { type ExportInfo, negotiate, violation } from './client-handshake.ts'
import type { ClientRequest } from './client-request.ts'
import { onreadInto, readByEvents } from './inlet.ts'
import { Outbox } from './outbox.ts'
import { Receiver } from './receiver.ts'
import { SharedBuffer } from './shared-buffer.ts'
import {
  CHUNK_SIZE,
  kindOfErrno,
  NBD_CMD_DISC,
  NBD_CMD_READ,
  NBD_CMD_WRITE,
  NBD_REPLY_FLAG_DONE,
  NBD_REPLY_TYPE_BLOCK_STATUS,
  NBD_REPLY_TYPE_FLAG_ERROR,
  NBD_REPLY_TYPE_NONE,
  NBD_REPLY_TYPE_OFFSET_DATA,
  NBD_REPLY_TYPE_OFFSET_HOLE,
  NBD_REQUEST_MAGIC,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
  REQUEST_SIZE,
  SIMPLE_REPLY_SIZE,
} from './spec.ts'
import { type ClientTls, loadClientTls } from './tls.ts'
import { formatNbdUri, type NbdUri } from './uri.ts'

/** Written data up to this length is copied beside its header; longer data goes to the socket from where it is. */
const COPY_MAX = 16 * 1024

/** The longest error chunk: its fields and a message whose length has 16 bits. */
const ERROR_CHUNK_MAX = 14 + 0xffff

export interface ConnectionOwner {
  /** The request in flight in a slot. */
  find(slot: number): ClientRequest | undefined
  /** The request's reply is complete; `error` when it failed. */
  finished(slot: number, error: BlockError | undefined): void
  /** The socket is closed; called once, and only after `open` resolved. */
  lost(error: BlockError): void
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

export class ClientConnection {
  readonly name: string
  readonly #owner: ConnectionOwner
  #socket: net.Socket
  readonly #endReading: () => void
  readonly #receiver = new Receiver(NBD_RECEIVE_BUFFER)
  #outbox: Outbox
  #info: ExportInfo | undefined
  #incoming: Incoming = HEADER
  #slot = 0
  #waiting: { readonly count: number; readonly arrived: () => void } | undefined
  #failure: BlockError | undefined
  readonly #closed = Promise.withResolvers<void>()

  private constructor(target: NbdUri, owner: ConnectionOwner) {
    this.name = formatNbdUri(target)
    this.#owner = owner
    const where = target.transport === 'unix' ? { path: target.path } : { host: target.host, port: target.port }
    // A socket that becomes a secure one is read by its events, since TLS takes its reading over.
    const isPlain = target.tls === undefined
    this.#socket = net.connect(isPlain ? { ...where, onread: onreadInto(this.#receiver, this.#arrived) } : where)
    this.#endReading = isPlain ? () => {} : readByEvents(this.#socket, this.#receiver, this.#arrived)
    if (target.transport === 'tcp') this.#socket.setNoDelay(true).setKeepAlive(true)
    this.#outbox = new Outbox(this.#socket, () => {})
    this.#follow(this.#socket)
  }

  #follow(socket: net.Socket): void {
    socket.on('error', (error) => (this.#failure ??= toBlockError(error, `${this.name}: connection`)))
    socket.on('end', () => socket.destroy())
    socket.on('close', this.#socketClosed)
  }

  async #startTls(tls: ClientTls): Promise<void> {
    const plain = this.#socket
    this.#endReading()
    // What came in the clear before TLS began could be anybody's.
    if (this.#receiver.length > 0) throw violation(this.name, 'it spoke before TLS began')
    plain.removeAllListeners('end')
    const secured = await tls.secure(plain)
    plain.off('close', this.#socketClosed)
    this.#socket = secured
    this.#outbox.dispose()
    this.#outbox = new Outbox(secured, () => {})
    this.#follow(secured)
    readByEvents(secured, this.#receiver, this.#arrived)
    secured.resume()
  }

  /** Connects and negotiates. Fails with the reason; the socket is closed by then. */
  static async open(target: NbdUri, contexts: readonly string[], owner: ConnectionOwner): Promise<ClientConnection> {
    const tls = target.tls === undefined ? undefined : await loadClientTls(target.tls, hostOf(target))
    const connection = new ClientConnection(target, owner)
    const timer = setTimeout(() => {
      const message = `${connection.name}: no answer within ${NBD_HANDSHAKE_MS / 1000} s`
      connection.#destroy(new BlockError('timeout', message, { device: connection.name }))
    }, NBD_HANDSHAKE_MS)
    try {
      const wire = {
        name: connection.name,
        send: (bytes: Uint8Array) => connection.#outbox.sendForeign(bytes),
        receive: (count: number) => connection.#receive(count),
        startTls: tls === undefined ? undefined : () => connection.#startTls(tls),
      }
      connection.#info = await negotiate(wire, target.name, contexts)
      return connection
    } catch (error) {
      connection.#destroy(toBlockError(error, `${connection.name}: handshake`))
      await connection.closed
      throw connection.#failure
    } finally {
      clearTimeout(timer)
    }
  }

  get info(): ExportInfo {
    if (this.#info === undefined) throw violation(this.name, 'nothing was negotiated')
    return this.#info
  }

  /** Resolves when the socket is closed. */
  get closed(): Promise<void> {
    return this.#closed.promise
  }

  /** Sends a request; its cookie names `slot` and its sequence number. All of one turn go out in one write. */
  send(request: ClientRequest, slot: number): void {
    const { type, length, bytes } = request
    const copied = type === NBD_CMD_WRITE && length <= COPY_MAX ? length : 0
    const at = this.#outbox.reserve(REQUEST_SIZE + copied)
    const to = this.#outbox.bytes
    setUint32(to, at, NBD_REQUEST_MAGIC)
    setUint16(to, at + 4, request.flags)
    setUint16(to, at + 6, type)
    setUint32(to, at + 8, request.sequence)
    setUint32(to, at + 12, slot)
    setUint64(to, at + 16, request.offset)
    setUint32(to, at + 24, length)
    if (bytes !== undefined && copied > 0) to.set(bytes.subarray(request.at, request.at + length), at + REQUEST_SIZE)
    this.#outbox.commit(REQUEST_SIZE + copied)
    if (type === NBD_CMD_WRITE && bytes !== undefined && copied < length) {
      this.#outbox.sendForeign(bytes.subarray(request.at, request.at + length))
    } else this.#outbox.soon()
  }

  /** Says goodbye and closes. No request may be in flight. */
  async disconnect(): Promise<void> {
    const at = this.#outbox.reserve(REQUEST_SIZE)
    const to = this.#outbox.bytes
    to.fill(0, at, at + REQUEST_SIZE)
    setUint32(to, at, NBD_REQUEST_MAGIC)
    setUint16(to, at + 6, NBD_CMD_DISC)
    this.#outbox.commit(REQUEST_SIZE)
    this.#outbox.flush()
    this.#socket.end(() => this.#socket.destroy())
    await this.closed
  }

  #destroy(error: BlockError): void {
    this.#failure ??= error
    this.#socket.destroy()
  }

  readonly #socketClosed = (): void => {
    const lost = new BlockError('io', `${this.name}: the connection was lost`, { device: this.name })
    this.#failure ??= lost
    if (this.#incoming.kind === 'chunk') this.#incoming.buffer.release()
    this.#incoming = HEADER
    this.#outbox.dispose()
    this.#receiver.dispose()
    this.#waiting?.arrived()
    this.#closed.resolve()
    if (this.#info !== undefined) this.#owner.lost(this.#failure)
  }

  /** For the handshake: the next `count` bytes. */
  async #receive(count: number): Promise<Uint8Array> {
    if (this.#receiver.length < count && !this.#socket.closed) {
      await new Promise<void>((arrived) => (this.#waiting = { count, arrived }))
      this.#waiting = undefined
    }
    if (this.#receiver.length < count) {
      throw this.#failure ?? new BlockError('io', `${this.name}: the server hung up during the handshake`)
    }
    const start = this.#receiver.start
    this.#receiver.start += count
    // Before the caller sees them, more may arrive and take their place.
    return this.#receiver.bytes.slice(start, start + count)
  }

  readonly #arrived = (): boolean => {
    if (this.#info !== undefined) this.#parse()
    else if (this.#waiting !== undefined && this.#receiver.length >= this.#waiting.count) this.#waiting.arrived()
    return true
  }

  #parse(): void {
    let goesOn = true
    while (goesOn && !this.#socket.destroyed) {
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
    if (magic !== NBD_STRUCTURED_REPLY_MAGIC || !this.info.structured) return this.#violate('a reply of unknown kind')
    if (length < CHUNK_SIZE) return false
    return this.#structured(bytes, start)
  }

  /** The request of a cookie; leaves its slot in `#slot`. */
  #find(bytes: Uint8Array, at: number): ClientRequest | undefined {
    this.#slot = getUint32(bytes, at + 4)
    const request = this.#owner.find(this.#slot)
    if (request?.sequence === getUint32(bytes, at)) return request
    this.#violate('a reply to no request')
    return undefined
  }

  #simple(request: ClientRequest, errno: number): void {
    if (errno !== 0) {
      request.error = errorOf(this.name, request, errno, '')
      this.#finish(this.#slot)
      return
    }
    if (request.type !== NBD_CMD_READ) this.#finish(this.#slot)
    else if (this.info.structured) this.#violate('a simple reply to a read')
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

  #structured(bytes: Uint8Array, start: number): boolean {
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
    const buffer = new SharedBuffer(length)
    this.#receiver.start += CHUNK_SIZE
    this.#incoming = { kind: 'chunk', slot, isLast, type, length, buffer }
    this.#receiver.divert(buffer.bytes, 0, length)
    return true
  }

  /** A chunk that is not a read's data has arrived whole. */
  #chunk(slot: number, type: number, buffer: SharedBuffer, length: number): void {
    const request = this.#owner.find(slot)
    const { bytes } = buffer
    if (request === undefined) this.#violate('a reply to no request')
    else if (type === NBD_REPLY_TYPE_OFFSET_HOLE) this.#hole(request, bytes, length)
    else if (type === NBD_REPLY_TYPE_BLOCK_STATUS) this.#status(request, bytes, length)
    else if (length < 6 || getUint16(bytes, 4) > length - 6 || getUint32(bytes, 0) === 0)
      this.#violate('a bad error chunk')
    else {
      const message = utf8.decode(bytes.subarray(6, 6 + getUint16(bytes, 4)))
      request.error ??= errorOf(this.name, request, getUint32(bytes, 0), message)
    }
    buffer.release()
  }

  #hole(request: ClientRequest, bytes: Uint8Array, length: number): void {
    const offset = length === 12 ? getUint64(bytes, 0) : -1
    const size = getUint32(bytes, 8)
    if (offset < 0 || !request.accept(offset, size)) this.#violate('a hole that was not asked for')
    else {
      const at = request.at + offset - request.offset
      request.bytes?.fill(0, at, at + size)
    }
  }

  #status(request: ClientRequest, bytes: Uint8Array, length: number): void {
    if (length < 12 || length % 8 !== 4) {
      this.#violate('a bad block status chunk')
      return
    }
    if (getUint32(bytes, 0) !== this.info.contexts.get(request.context)) return
    const extents: number[] = []
    for (let at = 4; at < length; at += 4) extents.push(getUint32(bytes, at))
    if (!request.acceptStatus(extents)) this.#violate('a block status that was not asked for')
  }

  #finish(slot: number): void {
    const request = this.#owner.find(slot)
    if (request === undefined || this.#socket.destroyed) return
    if (request.error === undefined && !request.isComplete) this.#violate('a reply that ends too early')
    else this.#owner.finished(slot, request.error)
  }

  #violate(what: string): false {
    this.#destroy(violation(this.name, what))
    return false
  }
}

/** Whose name the certificate of a server must have, unless the URI says so. */
function hostOf(target: NbdUri): string {
  return target.transport === 'tcp' ? target.host : 'localhost'
}

function errorOf(name: string, request: ClientRequest, errno: number, message: string): BlockError {
  const { offset, length } = request
  const what = message === '' ? `error ${errno} from the server` : message
  return new BlockError(kindOfErrno(errno), `${name}: ${what}`, { device: name, offset, length })
}
