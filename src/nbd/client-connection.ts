// One connection of the client to a server: connects, negotiates, sends requests, and has the replies parsed
// (client-replies.ts). It ends when it is lost, the server breaks the protocol or goes away; what then happens to the requests is
// the client's business.
//
//   connecting -> negotiating (-> TLS -> negotiating) -> open (-> leaving) -> closed

import net from 'node:net'
import { setUint16, setUint32, setUint64 } from '../base/bytes.ts'
import { NBD_DRAIN_MS, NBD_HANDSHAKE_MS, NBD_RECEIVE_BUFFER } from '../base/limits.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import { type ExportInfo, negotiate, violation } from './client-handshake.ts'
import { ReplyParser } from './client-replies.ts'
import type { ClientRequest } from './client-request.ts'
import { onreadInto, readByEvents } from './inlet.ts'
import { Outbox } from './outbox.ts'
import { Receiver } from './receiver.ts'
import { NBD_CMD_DISC, NBD_CMD_WRITE, NBD_REQUEST_MAGIC, REQUEST_SIZE } from './spec.ts'
import { type ClientTls, loadClientTls } from './tls.ts'
import { formatNbdUri, type NbdUri } from './uri.ts'

/** Written data up to this length is copied beside its header; longer data goes to the socket from where it is. */
const COPY_MAX = 16 * 1024

export interface ConnectionOwner {
  /** The request in flight in a slot. */
  find(slot: number): ClientRequest | undefined
  /** The request's reply is complete; `error` when it failed. */
  finished(slot: number, error: BlockError | undefined): void
  /** The socket is closed; called once, and only after `open` resolved. */
  lost(error: BlockError): void
}

/** Connects in a way of the caller's own, to where a server of NBD is about to speak. */
export type Dial = () => Promise<net.Socket>

export class ClientConnection {
  readonly name: string
  readonly #owner: ConnectionOwner
  #socket: net.Socket
  readonly #endReading: () => void
  readonly #receiver = new Receiver(NBD_RECEIVE_BUFFER)
  #outbox: Outbox
  #info: ExportInfo | undefined
  #replies: ReplyParser | undefined
  /** Set while the last replies of a server that goes away may arrive. */
  #leaving: NodeJS.Timeout | undefined
  #waiting: { readonly count: number; readonly arrived: () => void } | undefined
  #failure: BlockError | undefined
  readonly #closed = Promise.withResolvers<void>()

  private constructor(target: NbdUri, owner: ConnectionOwner, dialled: net.Socket | undefined) {
    this.name = formatNbdUri(target)
    this.#owner = owner
    const where = target.transport === 'unix' ? { path: target.path } : { host: target.host, port: target.port }
    // A socket that becomes a secure one is read by its events, since TLS takes its reading over.
    const isPlain = target.tls === undefined && dialled === undefined
    this.#socket =
      dialled ?? net.connect(isPlain ? { ...where, onread: onreadInto(this.#receiver, this.#arrived) } : where)
    this.#endReading = isPlain ? () => {} : readByEvents(this.#socket, this.#receiver, this.#arrived)
    dialled?.resume()
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
  static async open(
    target: NbdUri,
    contexts: readonly string[],
    owner: ConnectionOwner,
    dial?: Dial,
  ): Promise<ClientConnection> {
    const tls = target.tls === undefined ? undefined : await loadClientTls(target.tls, hostOf(target))
    const connection = new ClientConnection(target, owner, await dial?.())
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
      connection.#begin(await negotiate(wire, target.name, contexts))
      return connection
    } catch (error) {
      const reason = toBlockError(error, `${connection.name}: handshake`)
      connection.#destroy(reason)
      await connection.closed
      throw reason
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

  #begin(info: ExportInfo): void {
    this.#info = info
    this.#replies = new ReplyParser(this.name, info, this.#receiver, {
      find: (slot) => this.#owner.find(slot),
      finished: (slot, error) => this.#owner.finished(slot, error),
      leaving: this.#leave,
      violated: (what) => this.#destroy(violation(this.name, what)),
    })
  }

  /**
   * Sends a request; its cookie names `slot` and its sequence number. All of one turn go out in one write. To a server that goes away
   * nothing is sent: the request is among those that are lost with the connection.
   */
  send(request: ClientRequest, slot: number): void {
    if (this.#leaving !== undefined) return
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
    if (this.#leaving === undefined) this.#sayGoodbye(() => this.#socket.destroy())
    await this.closed
  }

  /** Closes without a goodbye. */
  drop(error: BlockError): void {
    this.#destroy(error)
  }

  /** The server shuts down: says goodbye, as the text demands, takes the replies that still come, and is lost then. */
  readonly #leave = (): void => {
    if (this.#leaving !== undefined) return
    this.#failure ??= new BlockError('closed', `${this.name}: the server is shutting down`, { device: this.name })
    this.#leaving = setTimeout(() => this.#socket.destroy(), NBD_DRAIN_MS)
    this.#sayGoodbye(() => {})
  }

  #sayGoodbye(sent: () => void): void {
    const at = this.#outbox.reserve(REQUEST_SIZE)
    const to = this.#outbox.bytes
    to.fill(0, at, at + REQUEST_SIZE)
    setUint32(to, at, NBD_REQUEST_MAGIC)
    setUint16(to, at + 6, NBD_CMD_DISC)
    this.#outbox.commit(REQUEST_SIZE)
    this.#outbox.flush()
    this.#socket.end(sent)
  }

  #destroy(error: BlockError): void {
    this.#failure ??= error
    this.#socket.destroy()
  }

  readonly #socketClosed = (): void => {
    const lost = new BlockError('io', `${this.name}: the connection was lost`, { device: this.name })
    this.#failure ??= lost
    clearTimeout(this.#leaving)
    this.#replies?.dispose()
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
    if (this.#replies !== undefined) this.#replies.parse()
    else if (this.#waiting !== undefined && this.#receiver.length >= this.#waiting.count) this.#waiting.arrived()
    return !this.#socket.destroyed
  }
}

/** Whose name the certificate of a server must have, unless the URI says so. */
function hostOf(target: NbdUri): string {
  return target.transport === 'tcp' ? target.host : 'localhost'
}
