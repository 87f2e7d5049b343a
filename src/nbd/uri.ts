// NBD URIs (NetworkBlockDevice/nbd, doc/uri.md): parse and format. Says where an export is; does not connect.
//
//   nbd://HOST[:PORT]/NAME          nbd+unix:///NAME?socket=PATH          plain
//   nbds://HOST[:PORT]/NAME         nbds+unix:///NAME?socket=PATH         over TLS, never downgraded
//   nbds://USER@HOST/NAME           nbds+unix://USER@/NAME?socket=PATH    whose pre-shared key is used
//
// Parameters of the TLS schemes: tls-certificates=FOLDER, tls-psk-file=FILE, tls-hostname=NAME, and tls-type=x509|psk.

import { BlockError } from '../block/error.ts'
import { NBD_DEFAULT_PORT, NBD_MAX_STRING } from './spec.ts'
import type { ClientTlsOptions } from './tls.ts'

/** Where an NBD export is. `name` may be empty: the server's default export. */
export type NbdUri = (
  | { readonly transport: 'unix'; readonly path: string; readonly name: string }
  | { readonly transport: 'tcp'; readonly host: string; readonly port: number; readonly name: string }
) & { readonly tls?: ClientTlsOptions }

/** Longest path of a Unix socket on Linux, in bytes: sun_path less its final zero. */
export const UNIX_PATH_MAX = 107

function bad(text: string, why: string): BlockError {
  return new BlockError(
    'invalid-argument',
    `"${text}" is not an NBD URI: ${why}. Use nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH`,
  )
}

/** Fails with kind 'invalid-argument' when the path does not fit a Unix socket address. */
export function checkSocketPath(path: string): void {
  const length = Buffer.byteLength(path)
  if (length === 0) throw new BlockError('invalid-argument', 'the path of a Unix socket is empty')
  if (length > UNIX_PATH_MAX) {
    const message = `${path}: the path of a Unix socket has at most ${UNIX_PATH_MAX} bytes, this one has ${length}; use a shorter folder`
    throw new BlockError('invalid-argument', message, { path })
  }
}

/** Parses an NBD URI. Kind 'invalid-argument' when it is none. */
export function parseNbdUri(text: string): NbdUri {
  const { url, user } = split(text)
  const name = decodeName(text, url)
  if (Buffer.byteLength(name) > NBD_MAX_STRING) throw bad(text, `the name is longer than ${NBD_MAX_STRING} bytes`)
  const [, isTls, isUnix] = /^nbd(s?)(\+unix)?:$/.exec(url.protocol) ?? []
  if (isTls !== undefined) {
    const tls = isTls === 's' ? tlsOptions(text, url, user) : undefined
    if (tls === undefined && user !== undefined) throw bad(text, 'a user has a meaning only with TLS')
    refuseUnknown(text, url, [
      ...(isUnix === undefined ? [] : ['socket']),
      ...(tls === undefined ? [] : TLS_PARAMETERS),
    ])
    const target = isUnix === undefined ? tcpTarget(text, url, name) : unixTarget(text, url, name)
    return tls === undefined ? target : { ...target, tls }
  }
  throw bad(text, `the scheme ${url.protocol.slice(0, -1)} is unknown`)
}

/** The URI, and the user that it names; URL takes none without a host, as a Unix socket has it. */
function split(text: string): { readonly url: URL; readonly user: string | undefined } {
  const [, before, user, after] = /^([a-z+]+:\/\/)([^@/?#]*)@(.*)$/s.exec(text) ?? []
  try {
    if (user === undefined) return { url: new URL(text), user }
    return { url: new URL(`${before}${after}`), user: decodeURIComponent(user) }
  } catch {
    throw bad(text, 'it is not a URI')
  }
}

/** The path without its first slash: "//disk" names the export "/disk". */
function decodeName(text: string, url: URL): string {
  try {
    return decodeURIComponent(url.pathname.slice(1))
  } catch {
    throw bad(text, 'its name is not percent-encoded UTF-8')
  }
}

function refuseUnknown(text: string, url: URL, known: readonly string[]): void {
  for (const key of url.searchParams.keys()) {
    if (!known.includes(key)) throw bad(text, `the parameter "${key}" is unknown`)
  }
}

const TLS_PARAMETERS = ['tls-certificates', 'tls-psk-file', 'tls-hostname', 'tls-type'] as const

function tlsOptions(text: string, url: URL, username: string | undefined): ClientTlsOptions {
  const [folder, file, hostname, type] = TLS_PARAMETERS.map((key) => url.searchParams.get(key) ?? undefined)
  if (folder !== undefined && file !== undefined) throw bad(text, 'it names both certificates and keys for TLS')
  const isConsistent =
    type === undefined || (type === 'x509' ? file === undefined : type === 'psk' && file !== undefined)
  if (!isConsistent) throw bad(text, `tls-type is ${type}: it is x509, or psk with tls-psk-file`)
  return {
    ...(folder === undefined ? {} : { files: { kind: 'x509', folder } }),
    ...(file === undefined ? {} : { files: { kind: 'psk', file } }),
    ...(username === undefined ? {} : { username }),
    ...(hostname === undefined ? {} : { hostname }),
  }
}

function tcpTarget(text: string, url: URL, name: string): NbdUri {
  if (url.hostname === '') throw bad(text, 'the host is missing')
  const port = url.port === '' ? NBD_DEFAULT_PORT : Number(url.port)
  if (port === 0) throw bad(text, 'the port is 0')
  const host = decodeURIComponent(url.hostname).replace(/^\[(.*)\]$/, '$1')
  return { transport: 'tcp', host, port, name }
}

function unixTarget(text: string, url: URL, name: string): NbdUri {
  if (url.host !== '') throw bad(text, 'a Unix socket has no host; three slashes come before the name')
  const sockets = url.searchParams.getAll('socket')
  const path = sockets[0]
  if (path === undefined || path === '') throw bad(text, 'the parameter "socket" is missing')
  if (sockets.length > 1) throw bad(text, 'the parameter "socket" is there twice')
  if (path.startsWith('\0')) throw new BlockError('unsupported', `${text}: abstract Unix sockets are not supported`)
  checkSocketPath(path)
  return { transport: 'unix', path, name }
}

/** Percent-encodes what may not stand in a path or query; slashes stay readable. */
function encode(text: string): string {
  return encodeURIComponent(text).replaceAll('%2F', '/')
}

/** The URI of a target; `parseNbdUri` gives the target back. */
export function formatNbdUri(target: NbdUri): string {
  const { tls } = target
  const scheme = tls === undefined ? 'nbd' : 'nbds'
  const values = {
    socket: target.transport === 'unix' ? target.path : undefined,
    'tls-certificates': tls?.files?.kind === 'x509' ? tls.files.folder : undefined,
    'tls-psk-file': tls?.files?.kind === 'psk' ? tls.files.file : undefined,
    'tls-hostname': tls?.hostname,
  }
  const parameters = Object.entries(values).flatMap(([key, value]) =>
    value === undefined ? [] : [`${key}=${encode(value)}`],
  )
  const query = parameters.length === 0 ? '' : `?${parameters.join('&')}`
  const user = tls?.username === undefined ? '' : `${encodeURIComponent(tls.username)}@`
  if (target.transport === 'unix') return `${scheme}+unix://${user}/${encode(target.name)}${query}`
  const host = target.host.includes(':') ? `[${target.host}]` : target.host
  const port = target.port === NBD_DEFAULT_PORT ? '' : `:${target.port}`
  return `${scheme}://${user}${host}${port}/${encode(target.name)}${query}`
}
