// An NBD export as a BlockDevice. Sends what fits in flight, over one connection or several, and keeps the rest waiting; splits
// what is longer than the server takes. What becomes of a lost connection is the lane's affair (client-lane.ts).
//
//   caller -> request -> waiting -> the connected lane with the least to do -> server

import { NBD_CLIENT_CONNECTIONS, NBD_CLIENT_IN_FLIGHT, NBD_CLIENT_RANGE, NBD_CLIENT_WAITING } from '../base/limits.ts'
import { type BlockDevice, type Capabilities, FUA, MAY_UNMAP, type Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { Dial } from './client-connection.ts'
import type { ExportInfo } from './client-handshake.ts'
import { ClientLane, type LaneOwner } from './client-lane.ts'
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
  NBD_FLAG_CAN_MULTI_CONN,
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
  /**
   * Connections to spread requests over, 1 unless told and at most NBD_CLIENT_CONNECTIONS; one all the same to a server that does not promise that
   * they see the same data (NBD_FLAG_CAN_MULTI_CONN).
   */
  readonly connections?: number
  /** Connects in place of the target's address, which then only names it. What it is refused for good it is not asked again. */
  readonly dial?: Dial
}

/** Zeros for servers that cannot zero by themselves. */
const ZEROS = new Uint8Array(256 * 1024)

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
  readonly #connections: number
  readonly #dial: Dial | undefined
  #info: ExportInfo | undefined
  #can: Capabilities | undefined
  #lanes: readonly ClientLane[] = []
  /** Why no request is taken any more. */
  #failure: BlockError | undefined
  #isClosing = false
  #reconnections = 0
  #sequence = 0
  /** Requests for which there is no room, first come first; those before `#waitingFrom` are gone. */
  readonly #waiting: ClientRequest[] = []
  #waitingFrom = 0
  #whenIdle: (() => void) | undefined

  constructor(target: NbdUri, options: NbdClientOptions) {
    this.name = formatNbdUri(target)
    this.#target = target
    this.#contexts = [BASE_ALLOCATION, ...(options.contexts ?? [])]
    this.#reconnectMs = options.reconnectMs ?? 0
    this.#connections = Math.min(options.connections ?? 1, NBD_CLIENT_CONNECTIONS)
    this.#dial = options.dial
    this.#failure = new BlockError('closed', `${this.name}: not connected`)
  }

  /** Connects for the first time. `connectNbd` calls it. */
  async connect(): Promise<void> {
    const { lane, info } = await ClientLane.open(this.#owner)
    this.#info = info
    this.#can = capabilitiesOf(info)
    this.#lanes = [lane]
    // Without a writer every connection sees the same, whatever the server promises.
    const isSafe = (info.flags & (NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_READ_ONLY)) !== 0
    if (this.#connections > 1 && isSafe) await this.#connectMore()
    this.#failure = undefined
  }

  async #connectMore(): Promise<void> {
    const more = await Promise.allSettled(
      Array.from({ length: this.#connections - 1 }, () => ClientLane.open(this.#owner)),
    )
    this.#lanes = [...this.#lanes, ...more.flatMap((one) => (one.status === 'fulfilled' ? [one.value.lane] : []))]
    const failed = more.find((one) => one.status === 'rejected')
    if (failed === undefined) return
    for (const lane of this.#lanes) await lane.close()
    throw failed.reason
  }

  /** How many connections are used. */
  get connections(): number {
    return this.#lanes.length
  }

  get size(): number {
    return this.info.size
  }

  get can(): Capabilities {
    if (this.#can === undefined) throw new BlockError('closed', `${this.name}: not connected`)
    return this.#can
  }

  /** Why no request is taken any more; undefined while they are. */
  get failure(): BlockError | undefined {
    return this.#failure
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
   * How often a connection was lost and came back. When it grew since a flush, what was written before is not known to
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
    this.#failure ??= this.#closedError()
    await Promise.all(this.#lanes.map((lane) => lane.close()))
  }

  /** Gives a server up that does not answer: fails every request, now and later, and drops the connections. */
  abandon(error: BlockError): void {
    for (const lane of this.#lanes) lane.drop(error)
    this.#giveUp(error)
  }

  get #isIdle(): boolean {
    return this.#waitingFrom === this.#waiting.length && this.#lanes.every((lane) => lane.inFlight === 0)
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
    if (this.#failure !== undefined) return this.#failure
    if (this.#waiting.length - this.#waitingFrom < NBD_CLIENT_WAITING) return undefined
    return new BlockError('busy', `${this.name}: ${NBD_CLIENT_WAITING} requests wait already`, { device: this.name })
  }

  #sendWaiting(): void {
    while (this.#waitingFrom < this.#waiting.length) {
      const lane = this.#laneWithRoom()
      if (lane === undefined) {
        if (this.#waitingFrom >= NBD_CLIENT_IN_FLIGHT) this.#dropGone()
        return
      }
      lane.send(this.#waiting[this.#waitingFrom++] as ClientRequest)
    }
    this.#dropGone()
  }

  /** The connected lane with the least to do; undefined when none has room. */
  #laneWithRoom(): ClientLane | undefined {
    let found: ClientLane | undefined
    let least = NBD_CLIENT_IN_FLIGHT
    for (const lane of this.#lanes) {
      if (!lane.isConnected || lane.inFlight >= least) continue
      found = lane
      least = lane.inFlight
    }
    return found
  }

  #dropGone(): void {
    this.#waiting.splice(0, this.#waitingFrom)
    this.#waitingFrom = 0
  }

  get #owner(): LaneOwner {
    // What the lanes see of this client; accessors, since most of it changes.
    const isDone = (): boolean => this.#isClosing && this.#isIdle
    return {
      name: this.name,
      target: this.#target,
      contexts: this.#contexts,
      reconnectMs: this.#reconnectMs,
      dial: this.#dial,
      get isDone() {
        return isDone()
      },
      isSame: (info) => this.#isSame(info),
      reconnected: () => void this.#reconnections++,
      hasRoom: () => {
        this.#sendWaiting()
        if (this.#whenIdle !== undefined && this.#isIdle) this.#whenIdle()
      },
      failed: (error) => this.#giveUp(error),
    }
  }

  #isSame({ size, flags, contexts }: ExportInfo): boolean {
    const old = this.info
    return size === old.size && flags === old.flags && [...old.contexts.keys()].every((key) => contexts.has(key))
  }

  /** Fails every request, now and later. */
  #giveUp(error: BlockError): void {
    this.#failure ??= error
    const open = [...this.#lanes.flatMap((lane) => lane.abandon()), ...this.#waiting.slice(this.#waitingFrom)]
    this.#waiting.length = 0
    this.#waitingFrom = 0
    for (const request of open) request.reject(error)
    for (const lane of this.#lanes) void lane.close()
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
