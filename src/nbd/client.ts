// An NBD export as a BlockDevice. Sends what fits in flight and keeps the rest waiting; splits what is longer than the
// server takes; and, when told to, survives lost connections: it connects again and repeats every request that was
// not answered, which is safe because NBD's requests can be done twice.
//
//   connected --lost--> reconnecting --connected again--> connected      any --close, or too late--> closed

import { NBD_CLIENT_IN_FLIGHT, NBD_CLIENT_RANGE, NBD_CLIENT_WAITING } from '../base/limits.ts'
import { type BlockDevice, type Capabilities, FUA, MAY_UNMAP, type Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { ClientConnection, type ConnectionOwner } from './client-connection.ts'
import type { ExportInfo } from './client-handshake.ts'
import { ClientRequest, type RequestFields } from './client-request.ts'
import type { StatusVisitor } from './export.ts'
import {
  BASE_ALLOCATION,
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_FLAG_FUA,
  NBD_CMD_FLAG_NO_HOLE,
  NBD_CMD_FLUSH,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
  NBD_CMD_WRITE_ZEROES,
  NBD_FLAG_READ_ONLY,
  NBD_FLAG_SEND_FLUSH,
  NBD_FLAG_SEND_FUA,
  NBD_FLAG_SEND_TRIM,
  NBD_FLAG_SEND_WRITE_ZEROES,
} from './spec.ts'
import { formatNbdUri, type NbdUri, parseNbdUri } from './uri.ts'

export interface NbdClientOptions {
  /** Metadata contexts to ask for besides base:allocation, such as "qemu:dirty-bitmap:daily". */
  readonly contexts?: readonly string[]
  /** How long a lost connection may take to come back, in milliseconds; 0, the default, gives up at once. */
  readonly reconnectMs?: number
}

/** First and longest wait between two attempts to connect again, in milliseconds. */
const RETRY_FIRST_MS = 20
const RETRY_LONGEST_MS = 1000

/** Zeros for servers that cannot zero by themselves. */
const ZEROS = new Uint8Array(256 * 1024)

type State =
  | { readonly kind: 'connected'; readonly connection: ClientConnection }
  | { readonly kind: 'reconnecting' }
  | { readonly kind: 'closed'; readonly error: BlockError }

/**
 * Connects to an export. Kinds: 'invalid-argument' for a bad URI, 'not-found' when the server has no such export, 'io' or
 * 'not-found' when nobody listens, 'timeout', 'unsupported' (TLS, old servers), 'protocol'.
 */
export async function connectNbd(target: NbdUri | string, options: NbdClientOptions = {}): Promise<NbdClient> {
  const client = new NbdClient(typeof target === 'string' ? parseNbdUri(target) : target, options)
  await client.connect()
  return client
}

export class NbdClient implements BlockDevice {
  readonly name: string
  readonly #target: NbdUri
  readonly #contexts: readonly string[]
  readonly #reconnectMs: number
  #info: ExportInfo | undefined
  #can: Capabilities | undefined
  #state: State
  #isClosing = false
  #reconnections = 0
  #sequence = 0
  readonly #slots: (ClientRequest | undefined)[] = []
  readonly #freeSlots: number[] = []
  /** Requests for which no slot is free, first come first; those before `#waitingFrom` are gone. */
  readonly #waiting: ClientRequest[] = []
  #waitingFrom = 0
  #whenIdle: (() => void) | undefined

  constructor(target: NbdUri, options: NbdClientOptions) {
    this.name = formatNbdUri(target)
    this.#target = target
    this.#contexts = [BASE_ALLOCATION, ...(options.contexts ?? [])]
    this.#reconnectMs = options.reconnectMs ?? 0
    this.#state = { kind: 'closed', error: new BlockError('closed', `${this.name}: not connected`) }
  }

  /** Connects for the first time. `connectNbd` calls it. */
  async connect(): Promise<void> {
    const connection = await ClientConnection.open(this.#target, this.#contexts, this.#owner)
    this.#info = connection.info
    this.#can = capabilitiesOf(connection.info)
    this.#state = { kind: 'connected', connection }
  }

  get size(): number {
    return this.info.size
  }

  get can(): Capabilities {
    if (this.#can === undefined) throw new BlockError('closed', `${this.name}: not connected`)
    return this.#can
  }

  /** What the server told in the handshake. */
  get info(): ExportInfo {
    if (this.#info === undefined) throw new BlockError('closed', `${this.name}: not connected`)
    return this.#info
  }

  /** Names of the metadata contexts that the server offers out of those asked for. */
  get contexts(): readonly string[] {
    return [...this.info.contexts.keys()]
  }

  /**
   * How often the connection was lost and came back. When it grew since a flush, what was written before is not known to
   * be durable on a server that may have crashed with its host.
   */
  get reconnections(): number {
    return this.#reconnections
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.#transfer(NBD_CMD_READ, 0, offset, length, into, at)
  }

  write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    return this.#transfer(NBD_CMD_WRITE, flags & FUA ? NBD_CMD_FLAG_FUA : 0, offset, length, from, at)
  }

  zero(offset: number, length: number, flags: number): Pending {
    if (this.can.zero === 'emulated') return this.#writeZeros(offset, length, flags)
    const hole = flags & MAY_UNMAP ? 0 : NBD_CMD_FLAG_NO_HOLE
    return this.#ranges(NBD_CMD_WRITE_ZEROES, hole | (flags & FUA ? NBD_CMD_FLAG_FUA : 0), offset, length)
  }

  trim(offset: number, length: number, flags: number): Pending {
    return this.#ranges(NBD_CMD_TRIM, flags & FUA ? NBD_CMD_FLAG_FUA : 0, offset, length)
  }

  /** A server without NBD_CMD_FLUSH writes through, as far as the protocol can tell. */
  flush(): Pending {
    if ((this.info.flags & NBD_FLAG_SEND_FLUSH) === 0) return undefined
    return this.#request({ type: NBD_CMD_FLUSH, flags: 0, offset: 0, length: 0 }).promise
  }

  extents(offset: number, length: number, visit: StatusVisitor): Pending {
    if (this.can.extents !== 'none') return this.status(BASE_ALLOCATION, offset, length, visit)
    visit(length, 0)
    return undefined
  }

  /** Visits the range in pieces, in order, each with its status in a metadata context that the server offers. */
  async status(context: string, offset: number, length: number, visit: StatusVisitor): Promise<void> {
    if (!this.info.contexts.has(context)) {
      const message = `${this.name}: the server does not offer the metadata context ${context}`
      throw new BlockError('unsupported', message, { device: this.name })
    }
    const end = offset + length
    let at = offset
    while (at < end) {
      const pieceEnd = Math.min(end, at + NBD_CLIENT_RANGE)
      const fields = { type: NBD_CMD_BLOCK_STATUS, flags: 0, offset: at, length: pieceEnd - at, context }
      const request = this.#request(fields)
      await request.promise
      // A reply may stop early, and its last extent may reach further than was asked.
      for (let i = 0; i < request.extents.length && at < pieceEnd; i += 2) {
        const known = Math.min(request.extents[i] as number, pieceEnd - at)
        if (known === 0) throw new BlockError('protocol', `${this.name}: an extent of no bytes`, { device: this.name })
        at += known
        if (!visit(known, request.extents[i + 1] as number)) return
      }
    }
  }

  /** Completes what is in flight, says goodbye and closes. */
  async close(): Promise<void> {
    if (this.#isClosing) return
    this.#isClosing = true
    if (!this.#isIdle) await new Promise<void>((resolve) => (this.#whenIdle = resolve))
    const state = this.#state
    this.#state = { kind: 'closed', error: this.#closedError() }
    if (state.kind === 'connected') await state.connection.disconnect()
  }

  get #isIdle(): boolean {
    return this.#freeSlots.length === this.#slots.length && this.#waitingFrom === this.#waiting.length
  }

  #closedError(): BlockError {
    return new BlockError('closed', `${this.name} is closed`, { device: this.name })
  }

  /** Reads or writes, in pieces of at most the server's maximum. */
  #transfer(
    type: number,
    flags: number,
    offset: number,
    length: number,
    bytes: Uint8Array,
    at: number,
  ): Promise<void> | undefined {
    const most = this.info.maximumBlock
    if (length === 0) return undefined
    if (length <= most) return this.#request({ type, flags, offset, length, bytes, at }).promise
    const pieces: Promise<void>[] = []
    for (let done = 0; done < length; done += most) {
      const piece = Math.min(most, length - done)
      pieces.push(this.#request({ type, flags, offset: offset + done, length: piece, bytes, at: at + done }).promise)
    }
    return allOrFirstError(pieces)
  }

  #ranges(type: number, flags: number, offset: number, length: number): Pending {
    const pieces: Promise<void>[] = []
    for (let done = 0; done < length; done += NBD_CLIENT_RANGE) {
      const piece = Math.min(NBD_CLIENT_RANGE, length - done)
      pieces.push(this.#request({ type, flags, offset: offset + done, length: piece }).promise)
    }
    return pieces.length === 1 ? pieces[0] : allOrFirstError(pieces)
  }

  async #writeZeros(offset: number, length: number, flags: number): Promise<void> {
    for (let done = 0; done < length; done += ZEROS.length) {
      await this.write(offset + done, Math.min(ZEROS.length, length - done), ZEROS, 0, flags)
    }
  }

  #request(fields: RequestFields): ClientRequest {
    this.#sequence = (this.#sequence + 1) >>> 0
    const request = new ClientRequest(fields, this.#sequence)
    const refusal = this.#refusal()
    if (refusal !== undefined) request.reject(refusal)
    else {
      this.#waiting.push(request)
      this.#sendWaiting()
    }
    return request
  }

  /** Why no further request is taken, if none is. */
  #refusal(): BlockError | undefined {
    if (this.#isClosing) return this.#closedError()
    if (this.#state.kind === 'closed') return this.#state.error
    if (this.#waiting.length - this.#waitingFrom < NBD_CLIENT_WAITING) return undefined
    return new BlockError('busy', `${this.name}: ${NBD_CLIENT_WAITING} requests wait already`, { device: this.name })
  }

  #sendWaiting(): void {
    if (this.#state.kind !== 'connected') return
    while (this.#waitingFrom < this.#waiting.length) {
      let slot = this.#freeSlots.pop()
      if (slot === undefined) {
        if (this.#slots.length >= NBD_CLIENT_IN_FLIGHT) {
          if (this.#waitingFrom >= NBD_CLIENT_IN_FLIGHT) this.#dropGone()
          return
        }
        slot = this.#slots.push(undefined) - 1
      }
      const request = this.#waiting[this.#waitingFrom++] as ClientRequest
      this.#slots[slot] = request
      this.#state.connection.send(request, slot)
    }
    this.#dropGone()
  }

  #dropGone(): void {
    this.#waiting.splice(0, this.#waitingFrom)
    this.#waitingFrom = 0
  }

  readonly #owner: ConnectionOwner = {
    find: (slot) => this.#slots[slot],
    finished: (slot, error) => {
      const request = this.#slots[slot] as ClientRequest
      this.#slots[slot] = undefined
      this.#freeSlots.push(slot)
      if (error === undefined) request.resolve()
      else request.reject(error)
      this.#sendWaiting()
      if (this.#isIdle) this.#whenIdle?.()
    },
    lost: (error) => {
      if (this.#state.kind !== 'connected') return
      if (this.#reconnectMs === 0 || error.kind === 'protocol') this.#giveUp(error)
      else {
        this.#state = { kind: 'reconnecting' }
        void this.#reconnect(error)
      }
    },
  }

  async #reconnect(why: BlockError): Promise<void> {
    const deadline = performance.now() + this.#reconnectMs
    let last = why
    for (let wait = RETRY_FIRST_MS; performance.now() < deadline; wait = Math.min(wait * 2, RETRY_LONGEST_MS)) {
      if (this.#isClosing && this.#isIdle) return
      try {
        const connection = await ClientConnection.open(this.#target, this.#contexts, this.#owner)
        if (this.#isClosing && this.#isIdle) await connection.disconnect()
        else this.#resume(connection)
        return
      } catch (error) {
        last = error as BlockError
        if (last.kind === 'protocol') break
        await new Promise((resolve) => setTimeout(resolve, Math.min(wait, Math.max(0, deadline - performance.now()))))
      }
    }
    const message = `${this.name}: the connection was lost and did not come back in time: ${last.message}`
    const kind = last.kind === 'protocol' ? 'protocol' : 'timeout'
    this.#giveUp(new BlockError(kind, message, { device: this.name }, last))
  }

  /** Goes on over a new connection: repeats what was not answered, in the order in which it was asked. */
  #resume(connection: ClientConnection): void {
    const { size, flags, contexts } = connection.info
    const old = this.info
    const isSame =
      size === old.size && flags === old.flags && [...old.contexts.keys()].every((key) => contexts.has(key))
    if (!isSame) {
      const message = `${this.name}: the export is another one after the reconnect (size, flags or contexts)`
      this.#giveUp(new BlockError('protocol', message, { device: this.name }))
      void connection.disconnect()
      return
    }
    this.#reconnections++
    this.#state = { kind: 'connected', connection }
    const again = [...this.#slots.entries()].filter((entry): entry is [number, ClientRequest] => entry[1] !== undefined)
    for (const [slot, request] of again.sort((a, b) => a[1].sequence - b[1].sequence)) {
      request.restart()
      connection.send(request, slot)
    }
    this.#sendWaiting()
  }

  /** Fails every request, now and later. */
  #giveUp(error: BlockError): void {
    this.#state = { kind: 'closed', error }
    const open = [...this.#slots, ...this.#waiting.slice(this.#waitingFrom)]
    this.#slots.length = 0
    this.#freeSlots.length = 0
    this.#waiting.length = 0
    this.#waitingFrom = 0
    for (const request of open) request?.reject(error)
    this.#whenIdle?.()
  }
}

/** Waits for all, since each uses the caller's buffer, and fails with the first error. */
async function allOrFirstError(pieces: readonly Promise<void>[]): Promise<void> {
  const outcomes = await Promise.allSettled(pieces)
  for (const outcome of outcomes) if (outcome.status === 'rejected') throw outcome.reason
}

function capabilitiesOf(info: ExportInfo): Capabilities {
  const has = (flag: number): boolean => (info.flags & flag) !== 0
  const write = !has(NBD_FLAG_READ_ONLY)
  return {
    write,
    fua: has(NBD_FLAG_SEND_FUA) ? 'native' : 'emulated',
    zero: !write ? 'none' : has(NBD_FLAG_SEND_WRITE_ZEROES) ? 'native' : 'emulated',
    trim: write && has(NBD_FLAG_SEND_TRIM) ? 'native' : 'none',
    extents: info.contexts.has(BASE_ALLOCATION) ? 'native' : 'none',
    minimumBlock: info.minimumBlock,
    bestBlock: info.bestBlock,
  }
}
