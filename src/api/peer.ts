// One other daemon: its API over a Unix socket or over TCP with TLS and a token, by connections that are kept for the next question; and
// disks of it as Unix sockets of our own, each of whose connections is passed on through its API's door (tunnel.ts).

import fs from 'node:fs'
import http from 'node:http'
import net from 'node:net'
import path from 'node:path'
import type { Duplex } from 'node:stream'
import { PEER_CONNECT_MS } from '../base/limits.ts'
import { toBlockError } from '../block/error.ts'
import { loadClientTls } from '../nbd/tls.ts'
import { ApiClient, errorFrom, parseJson, readText } from './client.ts'
import { type PeerUri, parsePeerUri } from './peer-uri.ts'
import { join, type Tunneled, tunnelPath } from './tunnel.ts'

export interface Peer {
  readonly api: ApiClient
  readonly agent: http.Agent
  /** A connection to a disk there. */
  upgrade(to: Tunneled): Promise<net.Socket>
}

/** Nothing is connected before it is asked. Kind 'invalid-argument' for a bad URI. */
export function makePeer(to: string): Peer {
  const uri = parsePeerUri(to)
  const agent = new PeerAgent(uri)
  // Read for each request: it may be changed there and here while the daemons run.
  const headers = (): http.OutgoingHttpHeaders => (uri.transport === 'unix' ? {} : authorization(uri.tokenFile))
  const name = to.replace(/\?.*$/, '')
  const api = new ApiClient({ name, agent, headers })
  const upgrade = async (disk: Tunneled): Promise<net.Socket> => {
    const more = { connection: 'Upgrade', upgrade: 'nbd' }
    const request = http.request({
      createConnection: agent.connect,
      path: tunnelPath(disk),
      headers: { ...headers(), ...more },
    })
    request.setTimeout(PEER_CONNECT_MS, () => request.destroy(new Error('no answer')))
    request.end()
    return new Promise((resolve, reject) => {
      request.once('upgrade', (_response, socket, head) => {
        socket.setTimeout(0)
        // The server speaks first, and may have begun.
        if (head.length > 0) socket.unshift(head)
        resolve(socket as net.Socket)
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
export class Relay {
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
