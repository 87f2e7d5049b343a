// An NBD server: listens on Unix sockets and on loopback TCP, and makes a Connection of each client. What it serves is
// asked of its owner, export by export; it opens no image itself.

import fs from 'node:fs'
import net from 'node:net'
import { NBD_CONNECTIONS } from '../base/limits.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import { realHost } from '../host/real.ts'
import { Connection } from './connection.ts'
import type { Export } from './export.ts'
import type { ExportList } from './handshake.ts'
import type { ServerTls } from './tls.ts'
import { checkSocketPath } from './uri.ts'

export type { Export, MetaContext, StatusVisitor } from './export.ts'

export interface NbdServerOptions extends ExportList {
  /** Told of errors that are no BlockErrors, thus of faults in Varve; a process warning unless given. */
  readonly report?: (error: unknown) => void
}

export interface ListenUnixOptions {
  /** Permission bits of the socket; 0o600 unless told. */
  readonly mode?: number
  readonly tls?: ServerTls
}

export interface ListenTcpOptions {
  /** Clients must begin TLS before anything else. */
  readonly tls?: ServerTls
  /** Serve beyond loopback without TLS: anybody on the network can read and write what is served. */
  readonly insecure?: boolean
}

const LOOPBACK = new Set(['localhost', '127.0.0.1', '::1'])

export class NbdServer {
  readonly #exports: ExportList
  readonly #report: (error: unknown) => void
  readonly #listeners = new Set<net.Server>()
  readonly #connections = new Set<Connection>()
  readonly #withdrawn = new WeakSet<Export>()
  #isClosed = false

  constructor(options: NbdServerOptions) {
    this.#exports = {
      find: (name) => {
        const found = options.find(name)
        return found !== undefined && this.#withdrawn.has(found) ? undefined : found
      },
      list: () => options.list().filter((served) => !this.#withdrawn.has(served as Export)),
      ...(options.route === undefined ? {} : { route: options.route.bind(options) }),
    }
    this.#report = options.report ?? ((error) => process.emitWarning(error instanceof Error ? error : String(error)))
  }

  /** Clients that are connected now. */
  get connections(): number {
    return this.#connections.size
  }

  /**
   * Listens on a Unix socket. The socket file that a dead process left is replaced. Kinds: 'invalid-argument' for a path
   * that is too long, 'busy' when somebody answers there, 'exists' when something other than a socket is there.
   */
  async listenUnix(path: string, options: ListenUnixOptions = {}): Promise<void> {
    checkSocketPath(path)
    try {
      await this.#listen({ path }, options.tls)
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EADDRINUSE') throw toBlockError(error, `${path}: listen`, { path })
      await removeStaleSocket(path)
      await this.#listen({ path }, options.tls).catch((again: unknown) => {
        throw toBlockError(again, `${path}: listen`, { path })
      })
    }
    fs.chmodSync(path, options.mode ?? 0o600)
  }

  /**
   * Listens on TCP; returns the port, which the system chooses when `port` is 0. Kinds: 'permission' for another address than
   * loopback without TLS, unless `insecure`; 'busy' when the port is taken.
   */
  async listenTcp(host: string, port: number, options: ListenTcpOptions = {}): Promise<number> {
    if (!LOOPBACK.has(host) && options.tls === undefined && options.insecure !== true) {
      const message = `${host}: NBD beyond loopback needs TLS: give --tls-certificates or --tls-psk, or say --insecure`
      throw new BlockError('permission', message)
    }
    try {
      const address = (await this.#listen({ host, port }, options.tls)).address()
      return typeof address === 'object' && address !== null ? address.port : port
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'EADDRINUSE') {
        throw new BlockError('busy', `${host}:${port} is in use by another process; choose another port`)
      }
      throw toBlockError(error, `${host}:${port}: listen`)
    }
  }

  /** Ends an export: its connections take no more requests, answer those in flight, and close. */
  async withdraw(served: Export): Promise<void> {
    this.#withdrawn.add(served)
    const theirs = [...this.#connections].filter((connection) => connection.served === served)
    for (const connection of theirs) connection.shutDown()
    await Promise.all(theirs.map((connection) => connection.closed))
  }

  /** Stops listening, answers what is in flight, and closes every connection. */
  async close(): Promise<void> {
    this.#isClosed = true
    // Not waiting for the listeners' own close: they count sockets that the connections have taken over.
    for (const listener of this.#listeners) listener.close()
    this.#listeners.clear()
    const open = [...this.#connections]
    for (const connection of open) connection.shutDown()
    const negotiating = open.filter((connection) => connection.isNegotiating)
    await Promise.all(open.map((connection) => (connection.isNegotiating ? undefined : connection.closed)))
    // As long as others were served these were told why they are not.
    for (const connection of negotiating) connection.drain()
    await Promise.all(negotiating.map((connection) => connection.closed))
  }

  /** Stops listening and hangs up on every client without an answer, as the death of the process would: one that reconnects asks again. */
  sever(): void {
    this.#isClosed = true
    for (const listener of this.#listeners) listener.close()
    this.#listeners.clear()
    for (const connection of this.#connections) connection.sever()
  }

  #listen(where: net.ListenOptions, tls: ServerTls | undefined): Promise<net.Server> {
    if (this.#isClosed) throw new BlockError('closed', 'the NBD server is closed')
    const listener = net.createServer({ allowHalfOpen: true, pauseOnConnect: true }, (socket) =>
      this.#accept(socket, tls),
    )
    return new Promise((resolve, reject) => {
      listener.once('error', reject)
      listener.listen(where, () => {
        listener.off('error', reject)
        // Accepting fails while the process is out of file descriptors; the next client is accepted again.
        listener.on('error', this.#report)
        this.#listeners.add(listener)
        resolve(listener)
      })
    })
  }

  #accept(socket: net.Socket, tls: ServerTls | undefined): void {
    if (this.#isClosed || this.#connections.size >= NBD_CONNECTIONS) {
      socket.destroy()
      return
    }
    const events = {
      onClosed: (closed: Connection) => this.#connections.delete(closed),
      report: this.#report,
    }
    const connection = new Connection(socket, this.#exports, events, tls)
    this.#connections.add(connection)
  }
}

/** Removes a socket file on which nobody listens; kind 'busy' when somebody does. */
async function removeStaleSocket(path: string): Promise<void> {
  const status = await realHost.status(path)
  if (status !== undefined && status.kind !== 'other') {
    throw new BlockError('exists', `${path} exists and is not a socket; choose another path`, { path })
  }
  const isAlive = await new Promise<boolean>((resolve) => {
    const probe = net.connect(path)
    probe.once('connect', () => resolve(true))
    probe.once('error', (error: NodeJS.ErrnoException) =>
      resolve(error.code !== 'ECONNREFUSED' && error.code !== 'ENOENT'),
    )
    probe.once('connect', () => probe.destroy())
  })
  if (isAlive) throw new BlockError('busy', `${path}: another process serves on this socket`, { path })
  await realHost.unlink(path)
}
