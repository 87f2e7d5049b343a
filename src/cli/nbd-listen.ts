// What the commands share that serve one device over NBD by themselves: where they listen, their URI, and how they are stopped. What is
// served is theirs.

import path from 'node:path'
import type { Command } from 'commander'
import { BlockError } from '../block/error.ts'
import { type Export, NbdServer } from '../nbd/server.ts'
import { NBD_DEFAULT_PORT } from '../nbd/spec.ts'
import { loadServerTls, type ServerTls } from '../nbd/tls.ts'
import { formatNbdUri, type NbdUri } from '../nbd/uri.ts'
import { portArgument } from './context.ts'
import { addTlsOptions, type TlsOptions, tlsOptionsOf } from './tls-options.ts'

export interface ListenOptions extends TlsOptions {
  /** Serve on this Unix socket; else on TCP, loopback only. */
  readonly socket?: string
  /** 10809 unless told; 0 lets the system choose. */
  readonly port?: number
  /** The address to listen on; loopback unless told. */
  readonly bind?: string
  /** The empty name, which clients get that ask for none, unless told. */
  readonly exportName: string
}

export function addListenOptions(command: Command): Command {
  return addTlsOptions(command)
    .option('--socket <path>', 'listen on a Unix socket')
    .option('--port <number>', 'listen on this port, of the loopback address unless --bind says so', portArgument)
    .option('--bind <address>', 'listen on this address; beyond loopback only with TLS')
    .option('--export-name <name>', 'name of the export', '')
}

/** Takes what has to be closed when the serving ends; the last one taken is closed first. */
export type AtEnd = (close: () => Promise<void>) => void

/**
 * Has `open` make what is served, prints its URI on standard output, and returns after SIGINT or SIGTERM, when every request is
 * answered and all is closed. Options that do not go together, and credentials that cannot be used, are refused before anything is opened.
 */
export async function serveUntilStopped(
  options: ListenOptions,
  open: (atEnd: AtEnd) => Promise<Omit<Export, 'name'>>,
): Promise<void> {
  const { socket, port, exportName: name } = options
  if (socket !== undefined && port !== undefined) {
    throw new BlockError('invalid-argument', 'give either a socket or a port, not both')
  }
  const credentials = tlsOptionsOf(options)
  const tls = credentials === undefined ? undefined : await loadServerTls(credentials)
  const stop = stopSignal()
  const closing: (() => Promise<void>)[] = []
  try {
    const served: Export = { ...(await open((close) => closing.push(close))), name }
    const server = new NbdServer({ find: (wanted) => (wanted === name ? served : undefined), list: () => [served] })
    closing.push(() => server.close())
    console.log(formatNbdUri(await listen(server, options, tls)))
    await stop
  } finally {
    await closeAll(closing)
  }
}

/** All of them, whichever fails; the first failure is thrown. */
async function closeAll(closing: (() => Promise<void>)[]): Promise<void> {
  const last = closing.pop()
  if (last === undefined) return
  try {
    await last()
  } finally {
    await closeAll(closing)
  }
}

async function listen(server: NbdServer, options: ListenOptions, tls: ServerTls | undefined): Promise<NbdUri> {
  const { exportName: name } = options
  const secured = tls === undefined ? {} : { tls }
  if (options.socket !== undefined) {
    const socket = path.resolve(options.socket)
    await server.listenUnix(socket, secured)
    return { transport: 'unix', path: socket, name, ...(tls === undefined ? {} : { tls: {} }) }
  }
  const host = options.bind ?? '127.0.0.1'
  const insecure = options.insecure === true
  const port = await server.listenTcp(host, options.port ?? NBD_DEFAULT_PORT, { ...secured, insecure })
  return { transport: 'tcp', host, port, name, ...(tls === undefined ? {} : { tls: {} }) }
}

/** Resolves at the first SIGINT or SIGTERM; a second one ends the process at once, as if this were not here. */
function stopSignal(): Promise<void> {
  return new Promise((resolve) => {
    process.once('SIGINT', () => resolve())
    process.once('SIGTERM', () => resolve())
  })
}
