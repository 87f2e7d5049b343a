// NBD URIs (NetworkBlockDevice/nbd, doc/uri.md): parse and format. Says where an export is; does not connect.
//
//   nbd://HOST[:PORT]/NAME          nbd+unix:///NAME?socket=PATH
//
// The TLS schemes nbds and nbds+unix are refused, never downgraded.

import { BlockError } from '../block/error.ts'
import { NBD_DEFAULT_PORT, NBD_MAX_STRING } from './spec.ts'

/** Where an NBD export is. `name` may be empty: the server's default export. */
export type NbdUri =
  | { readonly transport: 'unix'; readonly path: string; readonly name: string }
  | { readonly transport: 'tcp'; readonly host: string; readonly port: number; readonly name: string }

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

/** Parses an NBD URI. Kind 'invalid-argument' when it is none, 'unsupported' when it asks for TLS. */
export function parseNbdUri(text: string): NbdUri {
  let url: URL
  try {
    url = new URL(text)
  } catch {
    throw bad(text, 'it is not a URI')
  }
  if (url.protocol === 'nbds:' || url.protocol === 'nbds+unix:') {
    throw new BlockError('unsupported', `${text}: NBD over TLS is not supported`)
  }
  const name = decodeName(text, url)
  if (Buffer.byteLength(name) > NBD_MAX_STRING) throw bad(text, `the name is longer than ${NBD_MAX_STRING} bytes`)
  if (url.protocol === 'nbd:') return tcpTarget(text, url, name)
  if (url.protocol === 'nbd+unix:') return unixTarget(text, url, name)
  throw bad(text, `the scheme ${url.protocol.slice(0, -1)} is unknown`)
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

function tcpTarget(text: string, url: URL, name: string): NbdUri {
  refuseUnknown(text, url, [])
  if (url.hostname === '') throw bad(text, 'the host is missing')
  const port = url.port === '' ? NBD_DEFAULT_PORT : Number(url.port)
  if (port === 0) throw bad(text, 'the port is 0')
  const host = decodeURIComponent(url.hostname).replace(/^\[(.*)\]$/, '$1')
  return { transport: 'tcp', host, port, name }
}

function unixTarget(text: string, url: URL, name: string): NbdUri {
  refuseUnknown(text, url, ['socket'])
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
  if (target.transport === 'unix') return `nbd+unix:///${encode(target.name)}?socket=${encode(target.path)}`
  const host = target.host.includes(':') ? `[${target.host}]` : target.host
  const port = target.port === NBD_DEFAULT_PORT ? '' : `:${target.port}`
  return `nbd://${host}${port}/${encode(target.name)}`
}
