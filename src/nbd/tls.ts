// TLS for NBD, both sides: reads credentials from files laid out as QEMU's and libnbd's users have them, and turns a plain
// connection into a secure one after NBD_OPT_STARTTLS. What is said over it is the handshake's affair.
//
//   FOLDER/ca-cert.pem      who is trusted            x509; ca-crl.pem beside it is obeyed
//   FOLDER/server-cert.pem  FOLDER/server-key.pem     the server's own
//   FOLDER/client-cert.pem  FOLDER/client-key.pem     the client's own, where the server asks for one
//   FILE (keys.psk)         USERNAME:KEY, a line for each user, the key in hexadecimal; FOLDER/keys.psk in a folder

import net from 'node:net'
import path from 'node:path'
import tls from 'node:tls'
import { utf8 } from '../base/bytes.ts'
import { NBD_CREDENTIALS_MAX, NBD_HANDSHAKE_MS } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import { realHost } from '../host/real.ts'

/** Where the credentials of a side are: certificates or pre-shared keys. */
export type TlsFiles =
  | { readonly kind: 'x509'; readonly folder: string }
  | { readonly kind: 'psk'; readonly file: string }

export interface ServerTlsOptions {
  readonly files: TlsFiles
  /** Only clients with a certificate of the authority in ca-cert.pem. Of keys, a client always needs one. */
  readonly verifyPeer?: boolean
  /** Only clients whose certificate has one of these distinguished names, such as "CN=host2,O=Example"; implies verifyPeer. */
  readonly allowedSubjects?: readonly string[]
}

/** What a client brings, and what it makes sure of. */
export interface ClientTlsOptions {
  /** Undefined: the system's authorities and no certificate of our own. */
  readonly files?: TlsFiles
  /** The user whose key is used; with certificates it has no meaning. */
  readonly username?: string
  /** The name that the server's certificate must have; the URI's host unless told, localhost for a Unix socket. */
  readonly hostname?: string
}

/**
 * Ciphers for pre-shared keys in TLS 1.2, with forward secrecy first; TLS 1.3 has its own, which the second part names. The
 * key itself proves both sides, so no certificate is there.
 */
const PSK_CIPHERS = [
  'TLS_AES_128_GCM_SHA256',
  'ECDHE-PSK-CHACHA20-POLY1305',
  'DHE-PSK-AES256-GCM-SHA384',
  'DHE-PSK-CHACHA20-POLY1305',
  'PSK-AES256-GCM-SHA384',
].join(':')

/** Shortest pre-shared key, in bytes: less could be guessed. */
const PSK_MIN = 16

/** The server's side; one serves any number of connections. */
export class ServerTls {
  readonly #options: tls.TlsOptions
  readonly #allowedSubjects: readonly string[] | undefined

  /** Use `loadServerTls`. */
  constructor(options: tls.TlsOptions, allowedSubjects: readonly string[] | undefined) {
    this.#options = options
    this.#allowedSubjects = allowedSubjects
  }

  /** The connection, secured; kind 'permission' when the client does not prove what it must, else 'protocol'. Closed then. */
  secure(plain: net.Socket): Promise<tls.TLSSocket> {
    return new Promise((resolve, reject) => {
      // A server of its own for each connection, as Node ties an outcome to its server and not to its socket.
      const server = tls.createServer(this.#options, (secured) => {
        const subject = this.#allowedSubjects === undefined ? undefined : subjectOf(secured)
        if (subject === undefined || this.#allowedSubjects?.includes(subject) === true) return resolve(secured)
        secured.destroy()
        reject(new BlockError('permission', `TLS: the client ${subject} is not on the list of allowed subjects`))
      })
      server.on('tlsClientError', (error) => {
        plain.destroy()
        reject(new BlockError('protocol', `TLS: the handshake with a client failed: ${error.message}`, {}, error))
      })
      server.emit('connection', plain)
    })
  }
}

/** The distinguished name of the peer's certificate, most specific part first, as QEMU's authorization lists write it. */
function subjectOf(secured: tls.TLSSocket): string {
  const { subject } = secured.getPeerCertificate()
  const parts: string[] = []
  for (const [key, value] of Object.entries(subject ?? {})) {
    for (const one of Array.isArray(value) ? value : [value])
      parts.unshift(`${key}=${String(one).replaceAll(/[,+"\\<>;]/g, '\\$&')}`)
  }
  return parts.join(',')
}

/** Reads the server's credentials. Kinds: 'not-found' for a missing file, 'invalid-format' for one that cannot be used. */
export async function loadServerTls(options: ServerTlsOptions): Promise<ServerTls> {
  const { files, allowedSubjects } = options
  const shared = { handshakeTimeout: NBD_HANDSHAKE_MS, minVersion: 'TLSv1.2' } as const
  if (files.kind === 'psk') {
    const keys = await readKeys(files.file)
    const pskCallback = (_socket: tls.TLSSocket, identity: string): NodeJS.ArrayBufferView | null =>
      keys.get(identity) ?? null
    return new ServerTls({ ...shared, pskCallback, ciphers: PSK_CIPHERS, dhparam: 'auto' }, undefined)
  }
  const { folder } = files
  const mustVerify = options.verifyPeer === true || allowedSubjects !== undefined
  const ca = await readFile(path.join(folder, 'ca-cert.pem'), mustVerify)
  const crl = await readFile(path.join(folder, 'ca-crl.pem'), false)
  const found: tls.TlsOptions = {
    ...shared,
    cert: await readNeeded(path.join(folder, 'server-cert.pem')),
    key: await readNeeded(path.join(folder, 'server-key.pem')),
    ...(ca === undefined ? {} : { ca }),
    ...(crl === undefined ? {} : { crl }),
    requestCert: mustVerify,
    rejectUnauthorized: mustVerify,
  }
  checkContext(found, folder)
  return new ServerTls(found, allowedSubjects)
}

/** The client's side: what to connect with. */
export class ClientTls {
  readonly #options: tls.ConnectionOptions

  /** Use `loadClientTls`. */
  constructor(options: tls.ConnectionOptions) {
    this.#options = options
  }

  /** The connection, secured. Kind 'permission' when the server does not prove who it is, else 'protocol'. Closed then. */
  secure(plain: net.Socket): Promise<tls.TLSSocket> {
    return new Promise((resolve, reject) => {
      const secured = tls.connect({ ...this.#options, socket: plain }, () => {
        secured.off('error', failed)
        resolve(secured)
      })
      const failed = (error: NodeJS.ErrnoException): void => {
        secured.destroy()
        const isUntrusted = secured.authorizationError !== null && secured.authorizationError !== undefined
        const kind = isUntrusted || /certificate|altname/i.test(error.message) ? 'permission' : 'protocol'
        reject(new BlockError(kind, `TLS: the handshake with the server failed: ${error.message}`, {}, error))
      }
      secured.once('error', failed)
      secured.once('close', () => failed(new Error('the server hung up')))
    })
  }
}

/** Reads the client's credentials for a server at `host`. Kinds as `loadServerTls`. */
export async function loadClientTls(options: ClientTlsOptions, host: string): Promise<ClientTls> {
  const { files, hostname = host } = options
  const name = net.isIP(hostname) === 0 ? { servername: hostname } : { host: hostname }
  const shared = { minVersion: 'TLSv1.2', ...name } as const
  if (files === undefined) return new ClientTls(shared)
  if (files.kind === 'psk') {
    const keys = await readKeys(files.file)
    const identity = options.username ?? process.env['USER'] ?? 'root'
    const psk = keys.get(identity)
    if (psk === undefined)
      throw new BlockError('not-found', `${files.file} has no key for the user ${identity}; name one that it has`)
    const pskCallback = (): tls.PSKCallbackNegotation => ({ psk, identity })
    return new ClientTls({ ...shared, pskCallback, ciphers: PSK_CIPHERS, checkServerIdentity: () => undefined })
  }
  const { folder } = files
  const crl = await readFile(path.join(folder, 'ca-crl.pem'), false)
  const cert = await readFile(path.join(folder, 'client-cert.pem'), false)
  const found: tls.ConnectionOptions = {
    ...shared,
    ca: await readNeeded(path.join(folder, 'ca-cert.pem')),
    ...(crl === undefined ? {} : { crl }),
    ...(cert === undefined ? {} : { cert, key: await readNeeded(path.join(folder, 'client-key.pem')) }),
  }
  checkContext(found, folder)
  return new ClientTls(found)
}

function checkContext(options: tls.SecureContextOptions, folder: string): void {
  try {
    tls.createSecureContext(options)
  } catch (error) {
    const message = `the TLS credentials in ${folder} cannot be used: ${(error as Error).message}`
    throw new BlockError('invalid-format', message, { path: folder }, error)
  }
}

/** The keys of a keys.psk file, by user. */
async function readKeys(file: string): Promise<ReadonlyMap<string, Buffer>> {
  const keys = new Map<string, Buffer>()
  const lines = (await readNeeded(file)).split('\n').map((line) => line.trim())
  for (const [index, line] of lines.entries()) {
    if (line === '' || line.startsWith('#')) continue
    const [, user, hex] = /^([^:]+):((?:[0-9a-f]{2})+)$/i.exec(line) ?? []
    if (user === undefined || hex === undefined || hex.length < PSK_MIN * 2) {
      const message = `${file}: line ${index + 1} is not USERNAME:KEY with a key of at least ${PSK_MIN} bytes in hexadecimal`
      throw new BlockError('invalid-format', message, { path: file })
    }
    keys.set(user, Buffer.from(hex, 'hex'))
  }
  if (keys.size > 0) return keys
  throw new BlockError('invalid-format', `${file} holds no key; psktool -u USER -p ${file} makes one`, { path: file })
}

async function readNeeded(file: string): Promise<string> {
  return (await readFile(file, true)) as string
}

async function readFile(file: string, isNeeded: boolean): Promise<string | undefined> {
  const status = await realHost.status(file)
  if (status === undefined) {
    if (!isNeeded) return undefined
    throw new BlockError('not-found', `the TLS credentials ${file} do not exist`, { path: file })
  }
  if (status.size > NBD_CREDENTIALS_MAX)
    throw new BlockError('invalid-format', `${file} has ${status.size} bytes, too many for credentials`, { path: file })
  const opened = await realHost.open(file)
  try {
    const bytes = new Uint8Array(opened.size())
    await opened.read(0, bytes.length, bytes, 0)
    return utf8.decode(bytes)
  } finally {
    await opened.close()
  }
}
