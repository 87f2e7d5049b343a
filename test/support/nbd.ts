// An NBD server for one test, closed after it, and a bare socket that speaks NBD byte by byte.

import net from 'node:net'
import path from 'node:path'
import type { TestContext } from 'node:test'
import type { BlockDevice } from '../../src/block/device.ts'
import { type Export, NbdServer } from '../../src/nbd/server.ts'
import type { ServerTls } from '../../src/nbd/tls.ts'
import type { NbdUri } from '../../src/nbd/uri.ts'
import { tempFolder } from './temp.ts'

export type NbdPlace = 'unix' | 'tcp'

export interface ServeOptions extends Omit<Export, 'name' | 'device'> {
  readonly place?: NbdPlace
  readonly name?: string
  readonly report?: (error: unknown) => void
  /** Clients must begin TLS. */
  readonly tls?: ServerTls
}

export interface Served {
  readonly server: NbdServer
  readonly served: Export
  readonly target: NbdUri
}

/** Serves a device under a name, "" unless told; errors that are no BlockErrors fail the test unless `report` is given. */
export async function serveDevice(t: TestContext, device: BlockDevice, options: ServeOptions = {}): Promise<Served> {
  const { place = 'unix', name = '', report, tls, ...rest } = options
  const secured = tls === undefined ? {} : { tls }
  const served: Export = { ...rest, name, device }
  const server = new NbdServer({
    find: (wanted) => (wanted === name ? served : undefined),
    list: () => [served],
    report:
      report ??
      ((error) => {
        throw error
      }),
  })
  // Hooks run in the order of their registration: the server closes before the folder of its socket is removed.
  t.after(() => server.close())
  if (place === 'tcp') {
    const port = await server.listenTcp('127.0.0.1', 0, secured)
    return { server, served, target: { transport: 'tcp', host: '127.0.0.1', port, name } }
  }
  const socket = path.join(tempFolder(t), 'nbd.sock')
  await server.listenUnix(socket, secured)
  return { server, served, target: { transport: 'unix', path: socket, name } }
}

/** A connection that a test drives by hand. */
export class RawPeer {
  readonly socket: net.Socket
  #received = Buffer.alloc(0)
  #isEnded = false
  #wake: () => void = () => {}

  constructor(target: NbdUri) {
    this.socket = net.connect(
      target.transport === 'unix'
        ? { path: target.path, allowHalfOpen: true }
        : { host: target.host, port: target.port, allowHalfOpen: true },
    )
    this.socket.on('data', (chunk: Buffer) => {
      this.#received = Buffer.concat([this.#received, chunk])
      this.#wake()
    })
    this.socket.on('end', () => this.#over())
    this.socket.on('close', () => this.#over())
    this.socket.on('error', () => this.#over())
  }

  /** True when the server has hung up. */
  get isEnded(): boolean {
    return this.#isEnded
  }

  send(...parts: (Uint8Array | string)[]): void {
    this.socket.write(Buffer.concat(parts.map((part) => (typeof part === 'string' ? Buffer.from(part, 'hex') : part))))
  }

  /** The next `count` bytes. Fails when the server hangs up before. */
  async receive(count: number): Promise<Buffer> {
    while (this.#received.length < count) {
      if (this.#isEnded) throw new Error(`the server hung up after ${this.#received.length} of ${count} bytes`)
      await new Promise<void>((resolve) => (this.#wake = resolve))
    }
    const bytes = this.#received.subarray(0, count)
    this.#received = this.#received.subarray(count)
    return bytes
  }

  /** Everything up to the server's hanging up. */
  async rest(): Promise<Buffer> {
    while (!this.#isEnded) await new Promise<void>((resolve) => (this.#wake = resolve))
    return this.#received
  }

  #over(): void {
    this.#isEnded = true
    this.#wake()
  }
}
