// The API's door to the network: TCP, always with TLS, and every request with the token that is in the home's api.token. Requests on the
// Unix socket come in by another one, where the file's mode is the guard.

import { randomBytes, timingSafeEqual } from 'node:crypto'
import fs from 'node:fs'
import type http from 'node:http'
import net from 'node:net'
import { API_CONNECTIONS, NBD_KEEPALIVE_MS } from '../base/limits.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import type { ServerTls } from '../nbd/tls.ts'

export interface DoorOptions {
  readonly address: string
  /** 0 has the system choose. */
  readonly port: number
  readonly tls: ServerTls
  readonly tokenFile: string
}

export class Door {
  /** Sockets that came in here. */
  readonly #distant = new WeakSet<net.Socket>()
  readonly #open = new Set<net.Socket>()
  #listener: net.Server | undefined
  #token: Buffer | undefined

  /** True for a request from the network. */
  isDistant({ socket }: http.IncomingMessage): boolean {
    return this.#distant.has(socket)
  }

  /** Kind 'permission' for a request from the network without the right token. */
  check(request: http.IncomingMessage): void {
    if (!this.isDistant(request)) return
    const [, said = ''] = /^Bearer (\S+)$/.exec(request.headers.authorization ?? '') ?? []
    const given = Buffer.from(said)
    const token = this.#token
    if (token !== undefined && given.length === token.length && timingSafeEqual(given, token)) return
    const message = 'the token is wrong: it is in the file api.token of this daemon’s home'
    throw new BlockError('permission', message)
  }

  /** Listens and has `server` answer; returns the port. Kind 'busy' when it is taken. */
  async listen(server: http.Server, options: DoorOptions): Promise<number> {
    const { address, port, tls, tokenFile } = options
    this.#token = Buffer.from(readToken(tokenFile))
    const listener = net.createServer((plain) => void this.#accept(plain, tls, server))
    this.#listener = listener
    try {
      await new Promise<void>((resolve, reject) => {
        listener.once('error', reject)
        listener.listen(port, address, resolve)
      })
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'EADDRINUSE')
        throw new BlockError('busy', `${address}:${port} is in use by another process; choose another --api-port`)
      throw toBlockError(error, `${address}:${port}: listen`)
    }
    // Accepting fails while the process is out of file descriptors; the next client is accepted again.
    listener.on('error', () => {})
    const where = listener.address()
    return typeof where === 'object' && where !== null ? where.port : port
  }

  close(): void {
    this.#listener?.close()
    for (const socket of this.#open) socket.destroy()
  }

  async #accept(plain: net.Socket, tls: ServerTls, server: http.Server): Promise<void> {
    plain.on('error', () => {})
    if (this.#open.size >= API_CONNECTIONS) return void plain.destroy()
    this.#open.add(plain)
    plain.once('close', () => this.#open.delete(plain))
    plain.setNoDelay(true).setKeepAlive(true, NBD_KEEPALIVE_MS)
    try {
      const secured = await tls.secure(plain)
      this.#distant.add(secured)
      server.emit('connection', secured)
    } catch {
      // Whoever cannot prove what it must has been hung up on.
      plain.destroy()
    }
  }
}

/** The token of the home, which is made when there is none. Only the owner may read it. */
export function readToken(file: string): string {
  try {
    return fs.readFileSync(file, 'utf8').trim()
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw toBlockError(error, file, { path: file })
  }
  const token = randomBytes(32).toString('hex')
  const text = `${token}\n`
  try {
    fs.writeFileSync(file, text, { mode: 0o600, flag: 'wx' })
  } catch (error) {
    throw toBlockError(error, `${file}: the API's token`, { path: file })
  }
  return token
}
