// One connection of the server: ties a socket to the handshake and then the transmission, and sees it to its end. Whatever
// the peer does, the connection ends with every buffer given back and no request of it in flight.
//
//   handshake --STARTTLS--> securing --> handshake --served elsewhere--> spliced --either side ends--> closed
//   handshake --GO--> transmission --DISC, end, violation, withdraw--> draining --all answered--> closed

import type net from 'node:net'
import { NBD_DRAIN_MS, NBD_HANDSHAKE_MS, NBD_KEEPALIVE_MS, NBD_RECEIVE_BUFFER } from '../base/limits.ts'
import { getUint32 } from '../base/bytes.ts'
import { isBlockError } from '../block/error.ts'
import type { Export } from './export.ts'
import { type ExportList, Handshake, type PassOn } from './handshake.ts'
import { readByEvents, takeAccepted } from './inlet.ts'
import { Linger } from './linger.ts'
import { Outbox } from './outbox.ts'
import { Receiver } from './receiver.ts'
import { NBD_OPTS_MAGIC } from './spec.ts'
import { Splice } from './splice.ts'
import type { ServerTls } from './tls.ts'
import { Transmission } from './transmission.ts'

type Phase =
  | { readonly kind: 'handshake'; readonly handshake: Handshake }
  | { readonly kind: 'securing' }
  | { readonly kind: 'spliced'; readonly splice: Splice }
  | { readonly kind: 'transmission'; readonly transmission: Transmission }
  | { readonly kind: 'draining'; readonly refusing: Transmission | undefined }
  | { readonly kind: 'closed' }

export interface ConnectionEvents {
  readonly onClosed: (connection: Connection) => void
  readonly report: (error: unknown) => void
}

export class Connection {
  #socket: net.Socket
  readonly #receiver = new Receiver(NBD_RECEIVE_BUFFER)
  #outbox: Outbox
  readonly #tls: ServerTls | undefined
  /** Ends the reading of the plain socket, where TLS comes. */
  #endReading: () => void = () => {}
  readonly #events: ConnectionEvents
  /** The limit of the handshake, later that of the peer's taking its last replies. */
  #timer: NodeJS.Timeout
  #phase: Phase
  #served: Export | undefined
  /** Where the options go that name an export which is served elsewhere. */
  #splice: Splice | undefined
  /** Stays when the phase is over: its slow requests may outlive the socket. */
  #transmission: Transmission | undefined
  /** Reading is off until the bounds admit more. */
  #isHeld = false
  /** Reading is off until the other connections had their turn. */
  #isYielding = false
  readonly #linger = new Linger()
  /** The client closed its side; what it asked before is still answered. */
  #hasEnded = false
  readonly #closed = Promise.withResolvers<void>()

  /** `accepted` is paused, as a server with `pauseOnConnect` gives it. With `tls` the client must begin TLS first. */
  constructor(accepted: net.Socket, exports: ExportList, events: ConnectionEvents, tls?: ServerTls) {
    this.#events = events
    this.#tls = tls
    if (tls === undefined) this.#socket = takeAccepted(accepted, this.#receiver, this.#arrived)
    else {
      this.#socket = accepted
      this.#endReading = readByEvents(accepted, this.#receiver, this.#arrived)
    }
    this.#outbox = new Outbox(this.#socket, this.#progress)
    const handshake = new Handshake(exports, this.#outbox, tls === undefined ? 'none' : 'required')
    this.#phase = { kind: 'handshake', handshake }
    this.#timer = setTimeout(() => this.#socket.destroy(), NBD_HANDSHAKE_MS)
    this.#socket.setNoDelay(true).setKeepAlive(true, NBD_KEEPALIVE_MS)
    this.#follow(this.#socket)
    this.#outbox.flush()
    this.#socket.resume()
  }

  /** The export that this connection uses, once the handshake is over. */
  get served(): Export | undefined {
    return this.#served
  }

  /** True until the handshake is over. */
  get isNegotiating(): boolean {
    return this.#phase.kind === 'handshake'
  }

  /** Resolves when the socket is closed and no request is in flight. */
  get closed(): Promise<void> {
    return this.#closed.promise
  }

  /** Takes no more requests, answers those in flight, then closes. */
  drain(): void {
    if (this.#phase.kind === 'closed' || this.#phase.kind === 'draining') return
    if (this.#phase.kind === 'spliced') return this.#phase.splice.end()
    this.#phase = { kind: 'draining', refusing: undefined }
    this.#endWhenIdle()
  }

  /**
   * As `drain`, when it is the server that ends: until all is answered, what still comes is refused with ESHUTDOWN. In the
   * handshake every option is refused so, until `drain`.
   */
  shutDown(): void {
    if (this.#phase.kind === 'handshake') return this.#phase.handshake.shutDown()
    const refusing = this.#phase.kind === 'transmission' ? this.#phase.transmission : undefined
    if (refusing === undefined || refusing.inFlight === 0) return this.drain()
    refusing.shutDown()
    this.#phase = { kind: 'draining', refusing }
  }

  /** Hangs up at once. */
  sever(): void {
    this.#socket.destroy()
  }

  #follow(socket: net.Socket): void {
    // The reason of a broken connection is of no use here: the peer is gone, and what it asked for is completed.
    socket.on('error', () => {})
    socket.on('end', () => {
      this.#hasEnded = true
      if (!this.#isHeld && !this.#isYielding) this.drain()
    })
    socket.on('close', this.#socketClosed)
  }

  /** Goes on over TLS. What a client sent before in the clear it cannot have meant, so it ends the connection. */
  async #secure(handshake: Handshake, tls: ServerTls): Promise<void> {
    this.#phase = { kind: 'securing' }
    const plain = this.#socket
    this.#endReading()
    plain.removeAllListeners('end')
    if (this.#receiver.length > 0) {
      plain.destroy()
      return
    }
    try {
      const secured = await tls.secure(plain)
      if (this.#phase.kind !== 'securing') return void secured.destroy()
      // The plain socket closes with the secure one, which is followed from here on.
      plain.off('close', this.#socketClosed)
      this.#socket = secured
      this.#outbox.dispose()
      this.#outbox = new Outbox(secured, this.#progress)
      handshake.secured(this.#outbox)
      this.#phase = { kind: 'handshake', handshake }
      this.#follow(secured)
      readByEvents(secured, this.#receiver, this.#arrived)
      secured.resume()
    } catch (error) {
      plain.destroy()
      if (!isBlockError(error)) this.#events.report(error)
    }
  }

  /** The socket read something; false stops the reading. */
  readonly #arrived = (): boolean => {
    if (this.#isHeld || this.#isYielding) return false
    this.#linger.arrived()
    this.#consume()
    return !this.#isHeld && !this.#isYielding
  }

  #consume(): void {
    while (this.#phase.kind === 'handshake' && this.#negotiate(this.#phase.handshake)) continue
    if (this.#phase.kind === 'transmission') this.#serve(this.#phase.transmission)
    if (this.#phase.kind === 'spliced' && !this.#phase.splice.feed(this.#receiver, this.#receiver.length))
      this.#isHeld = true
    if (this.#phase.kind === 'draining') this.#refuseRest(this.#phase.refusing)
  }

  /** One step of the handshake; true when there may be another. */
  #negotiate(handshake: Handshake): boolean {
    const splice = this.#splice
    if (splice !== undefined && !isOption(this.#receiver)) {
      if (this.#receiver.length < 8) return false
      this.#splicedForGood(splice)
      return false
    }
    const outcome = handshake.consume(this.#receiver)
    if (outcome.kind === 'enter') {
      clearTimeout(this.#timer)
      const served = outcome.session.export
      const transmission = new Transmission(outcome.session, this.#outbox, {
        onProgress: this.#completed,
        report: this.#events.report,
      })
      this.#served = served
      this.#transmission = transmission
      this.#phase = { kind: 'transmission', transmission }
      served.opened?.()
    }
    this.#outbox.flush()
    if (outcome.kind === 'pass-on') {
      this.#passOn(outcome)
      return true
    }
    if (outcome.kind === 'start-tls' && this.#tls !== undefined) void this.#secure(handshake, this.#tls)
    if (outcome.kind === 'hang-up') this.drain()
    return false
  }

  /** An option for whoever serves the export. The client may still turn to another one. */
  #passOn(option: PassOn): void {
    if (this.#splice?.socket !== option.socket) {
      this.#splice?.drop()
      this.#splice = new Splice(option, this.#socket, this.#progress)
    }
    if (option.after !== undefined) this.#splice.holdUntil(option.after)
    this.#splice.feed(this.#receiver, option.length)
    if (option.isLast) this.#splicedForGood(this.#splice)
  }

  #splicedForGood(splice: Splice): void {
    clearTimeout(this.#timer)
    this.#phase = { kind: 'spliced', splice }
  }

  #serve(transmission: Transmission): void {
    const outcome = transmission.consume(this.#receiver)
    this.#outbox.flush()
    switch (outcome) {
      case 'more':
        this.#lingerAfter(transmission)
        return
      case 'blocked':
        this.#isHeld = true
        return
      case 'yield':
        this.#isYielding = true
        setImmediate(this.#goOn)
        return
      case 'disconnect':
        this.drain()
        return
      case 'violation':
        // What follows means nothing, and must not gather where nobody takes it.
        this.#phase = { kind: 'draining', refusing: undefined }
        this.#socket.destroy()
    }
  }

  #refuseRest(refusing: Transmission | undefined): void {
    if (refusing?.consume(this.#receiver) === 'more') return this.#outbox.flush()
    this.#phase = { kind: 'draining', refusing: undefined }
    this.#receiver.start = this.#receiver.end
  }

  #lingerAfter({ taken, inFlight }: Transmission): void {
    if (taken === 1 && inFlight === 0) this.#linger.answered()
  }

  /** A slow request completed. */
  readonly #completed = (): void => {
    if (this.#phase.kind === 'transmission') this.#lingerAfter(this.#phase.transmission)
    this.#progress()
  }

  /** Replies were sent or a slow request completed. */
  readonly #progress = (): void => {
    if (this.#phase.kind === 'draining') this.#endWhenIdle()
    else if (this.#phase.kind === 'closed') this.#settle()
    else if (this.#isHeld && !this.#isYielding) {
      this.#isHeld = false
      this.#isYielding = true
      setImmediate(this.#goOn)
    }
  }

  readonly #goOn = (): void => {
    this.#isYielding = false
    if (this.#phase.kind === 'closed') return
    this.#consume()
    if (this.#isHeld || this.#isYielding) return
    if (this.#hasEnded) this.drain()
    else this.#socket.resume()
  }

  #endWhenIdle(): void {
    const inFlight = this.#transmission?.inFlight ?? 0
    if (inFlight > 0) return
    // Replies that were completed in this turn may still be gathered.
    this.#outbox.flush()
    if (this.#socket.writableEnded) return
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => this.#socket.destroy(), NBD_DRAIN_MS)
    this.#socket.end(() => this.#socket.destroy())
  }

  readonly #socketClosed = (): void => {
    clearTimeout(this.#timer)
    this.#phase = { kind: 'closed' }
    this.#outbox.dispose()
    this.#receiver.dispose()
    this.#transmission?.dispose()
    this.#settle()
  }

  #settle(): void {
    if ((this.#transmission?.inFlight ?? 0) > 0) return
    // What became ready after the socket closed was written for nobody.
    this.#outbox.dispose()
    if (this.#served !== undefined) this.#served.closed?.()
    this.#served = undefined
    this.#closed.resolve()
    this.#events.onClosed(this)
  }
}

/** True when what comes next is an option, and no request. */
function isOption({ bytes, start, length }: Receiver): boolean {
  return (
    length >= 8 && getUint32(bytes, start) === NBD_OPTS_MAGIC[0] && getUint32(bytes, start + 4) === NBD_OPTS_MAGIC[1]
  )
}
