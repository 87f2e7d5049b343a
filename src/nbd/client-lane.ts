// One of the client's connections, with the requests in flight on it. It survives the loss of its connection when told to: it
// connects again and repeats every request that was not answered, which is safe because NBD's requests can be done twice.
//
//   connected --lost--> reconnecting --connected again--> connected      any --close, or too late--> closed

import { BlockError, type ErrorKind } from '../block/error.ts'
import { ClientConnection, type ConnectionOwner, type Dial } from './client-connection.ts'
import type { ExportInfo } from './client-handshake.ts'
import type { ClientRequest } from './client-request.ts'
import type { NbdUri } from './uri.ts'

/** First and longest wait between two attempts to connect again, in milliseconds. */
const RETRY_FIRST_MS = 20
const RETRY_LONGEST_MS = 1000
/** What whoever connects in a way of his own hears when the export is gone for good. */
const REFUSED: ReadonlySet<ErrorKind> = new Set(['not-found', 'closed', 'permission', 'unsupported'])

/** What a lane asks of the client that it belongs to. */
export interface LaneOwner {
  readonly name: string
  readonly target: NbdUri
  readonly contexts: readonly string[]
  /** How long a lost connection may take to come back, in milliseconds. */
  readonly reconnectMs: number
  readonly dial: Dial | undefined
  /** True when no request is left and the client closes: a lost connection need not come back. */
  readonly isDone: boolean
  /** True for the export that the client knows from before. */
  isSame(info: ExportInfo): boolean
  reconnected(): void
  /** A request ended, so that another one has room. */
  hasRoom(): void
  /** The lane is lost for good, and the client with it. */
  failed(error: BlockError): void
}

type State =
  | { readonly kind: 'connected'; readonly connection: ClientConnection }
  | { readonly kind: 'reconnecting' }
  | { readonly kind: 'closed' }

export class ClientLane {
  readonly #owner: LaneOwner
  readonly #slots: (ClientRequest | undefined)[] = []
  readonly #freeSlots: number[] = []
  #state: State = { kind: 'closed' }

  /** Use `open`. */
  private constructor(owner: LaneOwner) {
    this.#owner = owner
  }

  /** Connects; fails with the reason. */
  static async open(owner: LaneOwner): Promise<{ readonly lane: ClientLane; readonly info: ExportInfo }> {
    const lane = new ClientLane(owner)
    const connection = await ClientConnection.open(owner.target, owner.contexts, lane.#connectionOwner, owner.dial)
    lane.#state = { kind: 'connected', connection }
    return { lane, info: connection.info }
  }

  get isConnected(): boolean {
    return this.#state.kind === 'connected'
  }

  get #isOver(): boolean {
    return this.#owner.isDone || this.#state.kind === 'closed'
  }

  /** Requests that were sent and are not answered. */
  get inFlight(): number {
    return this.#slots.length - this.#freeSlots.length
  }

  /** Sends a request; the lane is connected. */
  send(request: ClientRequest): void {
    const slot = this.#freeSlots.pop() ?? this.#slots.push(undefined) - 1
    this.#slots[slot] = request
    if (this.#state.kind === 'connected') this.#state.connection.send(request, slot)
  }

  /** Forgets the requests in flight, and gives them to whoever ends them. */
  abandon(): ClientRequest[] {
    this.#freeSlots.length = 0
    return this.#slots.splice(0).filter((request) => request !== undefined)
  }

  /** Says goodbye. Nothing is in flight. */
  async close(): Promise<void> {
    const state = this.#state
    this.#state = { kind: 'closed' }
    if (state.kind === 'connected') await state.connection.disconnect()
  }

  /** Ends the connection without a word, whatever is in flight; `abandon` says what was. */
  drop(error: BlockError): void {
    const state = this.#state
    this.#state = { kind: 'closed' }
    if (state.kind === 'connected') state.connection.drop(error)
  }

  readonly #connectionOwner: ConnectionOwner = {
    find: (slot) => this.#slots[slot],
    finished: (slot, error) => {
      const request = this.#slots[slot] as ClientRequest
      this.#slots[slot] = undefined
      this.#freeSlots.push(slot)
      if (error === undefined) request.resolve()
      else request.reject(error)
      this.#owner.hasRoom()
    },
    lost: (error) => {
      if (this.#state.kind !== 'connected') return
      if (this.#owner.reconnectMs === 0 || error.kind === 'protocol') this.#fail(error)
      else {
        this.#state = { kind: 'reconnecting' }
        void this.#reconnect(error)
      }
    },
  }

  async #reconnect(why: BlockError): Promise<void> {
    const { name, target, contexts, reconnectMs, dial } = this.#owner
    const isFinal = (kind: ErrorKind): boolean => kind === 'protocol' || (dial !== undefined && REFUSED.has(kind))
    const deadline = performance.now() + reconnectMs
    let last = why
    for (let wait = RETRY_FIRST_MS; performance.now() < deadline; wait = Math.min(wait * 2, RETRY_LONGEST_MS)) {
      if (this.#isOver) return
      try {
        const connection = await ClientConnection.open(target, contexts, this.#connectionOwner, dial)
        if (this.#isOver) await connection.disconnect()
        else this.#resume(connection)
        return
      } catch (error) {
        last = error as BlockError
        if (isFinal(last.kind)) break
        await new Promise((resolve) => setTimeout(resolve, Math.min(wait, Math.max(0, deadline - performance.now()))))
      }
    }
    const message = `${name}: the connection was lost and did not come back in time: ${last.message}`
    const kind = isFinal(last.kind) ? last.kind : 'timeout'
    this.#fail(new BlockError(kind, message, { device: name }, last))
  }

  /** Goes on over a new connection: repeats what was not answered, in the order in which it was asked. */
  #resume(connection: ClientConnection): void {
    const { name } = this.#owner
    if (!this.#owner.isSame(connection.info)) {
      const message = `${name}: the export is another one after the reconnect (size, flags or contexts)`
      this.#fail(new BlockError('protocol', message, { device: name }))
      void connection.disconnect()
      return
    }
    this.#state = { kind: 'connected', connection }
    this.#owner.reconnected()
    const again = [...this.#slots.entries()].filter((entry): entry is [number, ClientRequest] => entry[1] !== undefined)
    for (const [slot, request] of again.sort((a, b) => a[1].sequence - b[1].sequence)) {
      request.restart()
      connection.send(request, slot)
    }
    this.#owner.hasRoom()
  }

  #fail(error: BlockError): void {
    this.#state = { kind: 'closed' }
    this.#owner.failed(error)
  }
}
