// `varve nbd`: serves one image over NBD without a daemon, until it is told to stop. No jobs, no catalog; of bitmaps
// only one that the image itself holds. The image's own claim keeps other programs from writing to it meanwhile.

import path from 'node:path'
import { type Command, Option } from 'commander'
import { visitBits } from '../bitmap/visit-bits.ts'
import type { Layer } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { Chain } from '../chain/chain.ts'
import { type Format, FORMATS, openChain } from '../chain/open.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { metadataCache } from '../format/qcow2/metadata-cache.ts'
import { type CacheMode, warningOf, withCacheMode } from '../host/cache-mode.ts'
import { realHost } from '../host/real.ts'
import { type Export, type MetaContext, NbdServer } from '../nbd/server.ts'
import { NBD_DEFAULT_PORT } from '../nbd/spec.ts'
import { loadServerTls, type ServerTls } from '../nbd/tls.ts'
import { formatNbdUri, type NbdUri } from '../nbd/uri.ts'
import { cacheOption, metadataCacheOption, portArgument, warn } from './context.ts'
import { addTlsOptions, type TlsOptions, tlsOptionsOf } from './tls-options.ts'

interface ServeImageOptions extends TlsOptions {
  /** Never guessed, since a guest could write an image header into a raw disk. */
  readonly format: Format
  /** Serve on this Unix socket; else on TCP, loopback only. */
  readonly socket?: string
  /** 10809 unless told; 0 lets the system choose. */
  readonly port?: number
  /** The address to listen on; loopback unless told. */
  readonly bind?: string
  readonly readOnly?: boolean
  /** The empty name, which clients get that ask for none, unless told. */
  readonly exportName: string
  /** A persistent bitmap of the image that clients see as "qemu:dirty-bitmap:NAME". */
  readonly bitmap?: string
  readonly cache: CacheMode
  /** Bytes for the maps of the image and its backing files. */
  readonly metadataCache?: number
}

export function addNbdCommand(program: Command): void {
  addTlsOptions(program.command('nbd <image>'))
    .description('serve one image over NBD, without a daemon')
    .addOption(new Option('-f, --format <format>', 'format of the image').choices(FORMATS).makeOptionMandatory())
    .option('--socket <path>', 'listen on a Unix socket')
    .option('--port <number>', 'listen on this port, of the loopback address unless --bind says so', portArgument)
    .option('--bind <address>', 'listen on this address; beyond loopback only with TLS')
    .option('--read-only', 'refuse writes')
    .option('--bitmap <name>', 'let clients see this persistent bitmap of the image, as qemu:dirty-bitmap:NAME')
    .addOption(cacheOption())
    .addOption(metadataCacheOption())
    .option('--export-name <name>', 'name of the export', '')
    .action(serveImage)
}

/**
 * Opens the image with its backing files, serves it, prints its URI on standard output, and returns after SIGINT or
 * SIGTERM, when every request is answered and the image is closed cleanly.
 */
async function serveImage(image: string, options: ServeImageOptions): Promise<void> {
  const { format, socket } = options
  if (socket !== undefined && options.port !== undefined) {
    throw new BlockError('invalid-argument', 'give either a socket or a port, not both')
  }
  if (options.metadataCache !== undefined) metadataCache.budget = options.metadataCache
  const credentials = tlsOptionsOf(options)
  const tls = credentials === undefined ? undefined : await loadServerTls(credentials)
  const stop = stopSignal()
  const name = path.basename(image)
  const warning = warningOf(options.cache)
  if (warning !== undefined) warn(`${name}: ${warning}`)
  const host = withCacheMode(realHost, options.cache)
  const chain = new Chain(name, await openChain({ host, path: image, format, name, report: warn }))
  try {
    if (options.readOnly !== true) await chain.active.setAccess('write')
    await serveUntil(stop, chain, options, tls)
    if (options.readOnly !== true) await chain.active.setAccess('read')
  } finally {
    await chain.close()
  }
}

async function serveUntil(
  stop: Promise<void>,
  chain: Chain,
  options: ServeImageOptions,
  tls: ServerTls | undefined,
): Promise<void> {
  const name = options.exportName
  const served: Export = {
    name,
    description: chain.name,
    device: chain,
    readOnly: options.readOnly ?? false,
    contexts: options.bitmap === undefined ? [] : [await bitmapContext(chain.active, options.bitmap)],
  }
  const server = new NbdServer({ find: (wanted) => (wanted === name ? served : undefined), list: () => [served] })
  try {
    console.log(formatNbdUri(await listen(server, name, options, tls)))
    await stop
  } finally {
    await server.close()
  }
}

/** A persistent bitmap of the image, at each moment as it is. Kinds: 'unsupported', 'not-found', 'corrupt'. */
async function bitmapContext(image: Layer, name: string): Promise<MetaContext> {
  const { path: file } = image
  if (!(image instanceof Qcow2Image))
    throw new BlockError('unsupported', `${file} is a raw image, which has no bitmaps; qcow2 has`, { path: file })
  const names = image.bitmaps.map((bitmap) => JSON.stringify(bitmap.name))
  if (!names.includes(JSON.stringify(name))) {
    const there = names.length === 0 ? 'no bitmaps' : `only ${names.join(', ')}`
    throw new BlockError('not-found', `${file} has no bitmap ${JSON.stringify(name)}: it has ${there}`, { path: file })
  }
  const bits = await image.watchBitmap(name)
  return {
    name: `qemu:dirty-bitmap:${name}`,
    extents: (offset, length, visit) => {
      visitBits(bits(), offset, length, visit)
      return undefined
    },
  }
}

async function listen(
  server: NbdServer,
  name: string,
  options: ServeImageOptions,
  tls: ServerTls | undefined,
): Promise<NbdUri> {
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
