// Other daemons, for migrations: their API over a Unix socket or over TCP with TLS and a token, by connections that are kept for the next
// question, since a guest waits for some of them. A disk there is reached by a Unix socket of our own, each of whose connections is
// passed on through the other API's door (tunnel.ts).
//
//   shard --NBD--> run/out/TOKEN.sock --bytes--> TLS --bytes--> the other daemon's run/in/DISK.sock

import { PEER_ANSWER_MS, PEER_SWITCH_MS } from '../base/limits.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { type IncomingReply, type IncomingRequest, type IncomingStep, MIGRATION_PROTOCOL } from '../engine/peers.ts'
import type { PeerCalls } from '../shard/shards-options.ts'
import { makePeer, type Peer, Relay } from './peer.ts'

/** The steps for which a guest waits, at whose end the source can still think otherwise, or ask again. */
const SWITCHING: ReadonlySet<IncomingStep['step']> = new Set(['seal', 'take', 'state'])

export class ApiPeers implements PeerCalls {
  readonly #socketOf: (token: string) => string
  /** By URI. */
  readonly #known = new Map<string, Peer>()
  /** By token. */
  readonly #relays = new Map<string, Relay>()

  /** `socketOf` gives the path of our socket for a token. */
  constructor(socketOf: (token: string) => string) {
    this.#socketOf = socketOf
  }

  /** Kind 'unsupported' when the other daemon knows no migration. */
  async prepare(to: string, request: IncomingRequest): Promise<IncomingReply> {
    const { api } = this.#peer(to)
    try {
      return await api.call('prepareIncoming', {}, request, PEER_ANSWER_MS)
    } catch (error) {
      if (!isBlockError(error, 'not-found') || !error.message.includes('there is no POST')) throw error
      const { version } = await api.call('showStatus', {}, {}, PEER_ANSWER_MS)
      const message = `the daemon at ${to} has version ${version}, which cannot take disks by protocol ${MIGRATION_PROTOCOL}: run the same version of Varve on both`
      throw new BlockError('unsupported', message)
    }
  }

  step(to: string, token: string, step: IncomingStep): Promise<IncomingReply> {
    const timeoutMs = SWITCHING.has(step.step) ? PEER_SWITCH_MS : PEER_ANSWER_MS
    return this.#peer(to).api.call('stepIncoming', { token }, step as never, timeoutMs)
  }

  /** Kinds of the other daemon's refusal, or why it cannot be reached. */
  async socket(to: string, token: string): Promise<string> {
    const found = this.#relays.get(token)
    const relay = found ?? new Relay(this.#socketOf(token), () => this.#peer(to).upgrade({ kind: 'incoming', token }))
    this.#relays.set(token, relay)
    relay.onIdle = () => {
      if (this.#relays.get(token) === relay) this.#relays.delete(token)
    }
    return relay.open()
  }

  close(): void {
    for (const relay of this.#relays.values()) relay.close()
    for (const { agent } of this.#known.values()) agent.destroy()
  }

  #peer(to: string): Peer {
    const known = this.#known.get(to) ?? makePeer(to)
    this.#known.set(to, known)
    return known
  }
}
