// Other daemons, for migrations: their API over a Unix socket or over TCP with TLS and a token, by connections that are kept for the next
// question, since a guest waits for some of them. A disk there is reached by a Unix socket of our own, each of whose connections is
// passed on through the other API's door (tunnel.ts).
//
//   shard --NBD--> run/out/TOKEN.sock --bytes--> TLS --bytes--> the other daemon's run/in/DISK.sock

import fs from 'node:fs'
import http from 'node:http'
import net from 'node:net'
import path from 'node:path'
import type { Duplex } from 'node:stream'
import { PEER_ANSWER_MS, PEER_CONNECT_MS, PEER_SWITCH_MS } from '../base/limits.ts'
import { BlockError, isBlockError, toBlockError } from '../block/error.ts'
import { type IncomingReply, type IncomingRequest, type IncomingStep, MIGRATION_PROTOCOL } from '../engine/peers.ts'
import { loadClientTls } from '../nbd/tls.ts'
import type { PeerCalls } from '../shard/shards-options.ts'
import { ApiClient, errorFrom, parseJson, readText } from './client.ts'
import { type PeerUri, parsePeerUri } from './peer-uri.ts'
import { join, tunnelPath } from './tunnel.ts'

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
    const relay = found ?? new Relay(this.#socketOf(token), () => this.#peer(to).upgrade(token))
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

interface Peer {
  readonly api: ApiClient
  readonly agent: http.Agent
  /** A connection to a disk there. */
  upgrade(token: string): Promise<Duplex>
}

function makePeer(to: string): Peer {
  const uri = parsePeerUri(to)
  const agent = new PeerAgent(uri)
  // Read for each request: it may be changed there and here while the daemons run.
  const headers = (): http.OutgoingHttpHeaders => (uri.transport === 'unix' ? {} : authorization(uri.tokenFile))
  const name = to.replace(/\?.*$/, '')
  const api = new ApiClient({ name, agent, headers })
  const upgrade = async (token: string): Promise<Duplex> => {
    const more = { connection: 'Upgrade', upgrade: 'nbd' }
    const request = http.request({
      createConnection: agent.connect,
      path: tunnelPath(token),
      headers: { ...headers(), ...more },
    })
    request.setTimeout(PEER_CONNECT_MS, () => request.destroy(new Error('no answer')))
    request.end()
    return new Promise((resolve, reject) => {
      request.once('upgrade', (_response, socket, head) => {
        socket.setTimeout(0)
        // The server speaks first, and may have begun.
        if (head.length > 0) socket.unshift(head)
        resolve(socket)
      })
      request.once('response', (response) => {
        readText(response).then((text) => reject(errorFrom(parseJson(text), response.statusCode ?? 0)), reject)
      })
      request.once('error', (error) => reject(toBlockError(error, `the daemon at ${name}`)))
    })
  }
  return { api, agent, upgrade }
}

function authorization(file: string): http.OutgoingHttpHeaders {
  try {
    return { authorization: `Bearer ${fs.readFileSync(file, 'utf8').trim()}` }
  } catch (error) {
    throw toBlockError(error, `the token of the other daemon, ${file}`, { path: file })
  }
}

type Connected = (error: Error | null, socket: Duplex) => void

/** Keeps one connection for the next request. */
class PeerAgent extends http.Agent {
  readonly connect: (options: unknown, connected?: Connected) => undefined

  constructor(uri: PeerUri) {
    super({ keepAlive: true, maxFreeSockets: 1 })
    this.connect = (_options, connected) => {
      openSocket(uri).then(
        (socket) => connected?.(null, socket),
        (error: Error) => connected?.(error, undefined as never),
      )
      return undefined
    }
  }

  override createConnection(options: object, connected?: Connected): undefined {
    return this.connect(options, connected)
  }
}

async function openSocket(uri: PeerUri): Promise<net.Socket> {
  const isUnix = uri.transport === 'unix'
  const plain = isUnix ? net.connect(uri.path) : net.connect(uri.port, uri.host)
  const timer = setTimeout(() => plain.destroy(new Error('no answer to the attempt to connect')), PEER_CONNECT_MS)
  try {
    await new Promise<void>((resolve, reject) => {
      plain.once('connect', resolve)
      plain.once('error', reject)
    })
    plain.setNoDelay(true)
    return isUnix ? plain : await (await loadClientTls(uri.tls, uri.host)).secure(plain)
  } catch (error) {
    plain.destroy()
    throw error
  } finally {
    clearTimeout(timer)
  }
}

/** One Unix socket of ours, for as long as somebody uses it. */
class Relay {
  readonly #path: string
  readonly #upgrade: () => Promise<Duplex>
  #server: net.Server | undefined
  /** Opened ahead: what keeps it from opening is an answer to whoever asks for the socket, and not to its client. */
  #spare: Duplex | undefined
  #clients = 0
  onIdle: () => void = () => {}

  constructor(socket: string, upgrade: () => Promise<Duplex>) {
    this.#path = socket
    this.#upgrade = upgrade
  }

  async open(): Promise<string> {
    const spare = await this.#upgrade()
    this.#spare?.destroy()
    this.#spare = spare
    spare.once('close', () => {
      if (this.#spare === spare) this.#spare = undefined
      this.#look()
    })
    await this.#listen()
    return this.#path
  }

  close(): void {
    this.#spare?.destroy()
    this.#server?.close()
    this.#server = undefined
  }

  async #listen(): Promise<void> {
    if (this.#server !== undefined) return
    const server = net.createServer((client) => void this.#accept(client))
    this.#server = server
    fs.rmSync(this.#path, { force: true })
    await new Promise<void>((resolve, reject) => {
      server.once('error', (error) => reject(toBlockError(error, path.basename(this.#path), { path: this.#path })))
      server.listen(this.#path, resolve)
    })
    fs.chmodSync(this.#path, 0o600)
  }

  async #accept(client: net.Socket): Promise<void> {
    client.on('error', () => {})
    this.#clients++
    client.once('close', () => {
      this.#clients--
      this.#look()
    })
    const spare = this.#spare
    this.#spare = undefined
    try {
      join(client, spare ?? (await this.#upgrade()))
    } catch {
      client.destroy()
    }
  }

  #look(): void {
    if (this.#clients > 0 || this.#spare !== undefined) return
    this.close()
    this.onIdle()
  }
}
