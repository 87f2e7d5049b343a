// The URIs of other daemons' APIs, as migrations name them. They say where, and with what credentials; nothing is connected here.
//
//   varve+unix:///PATH/run/api.sock                                     on this host
//   varve+tls://HOST[:PORT]/?token-file=FILE&tls-certificates=FOLDER    elsewhere; tls-psk-file=FILE with USER@ before the host
//                                                                       instead of certificates; tls-hostname=NAME for another name

import path from 'node:path'
import { API_DEFAULT_PORT } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import type { ClientTlsOptions } from '../nbd/tls.ts'
import { checkSocketPath } from '../nbd/uri.ts'

export type PeerUri =
  | { readonly transport: 'unix'; readonly path: string }
  | {
      readonly transport: 'tls'
      readonly host: string
      readonly port: number
      /** Holds what the other daemon's api.token holds. */
      readonly tokenFile: string
      readonly tls: ClientTlsOptions
    }

const PARAMETERS = ['token-file', 'tls-certificates', 'tls-psk-file', 'tls-hostname'] as const

/** True for what is meant as the URI of a daemon. */
export function isPeerUri(text: string): boolean {
  return /^varve\+\w+:/.test(text)
}

/** Kind 'invalid-argument' when it is none, or says too little. */
export function parsePeerUri(text: string): PeerUri {
  const bad = (why: string): BlockError => {
    const form = 'varve+unix:///PATH/run/api.sock or varve+tls://HOST:PORT/?token-file=FILE'
    return new BlockError('invalid-argument', `"${text}" is not the URI of a daemon: ${why}. Use ${form}`)
  }
  const url = URL.canParse(text) ? new URL(text) : undefined
  if (url === undefined) throw bad('it is not a URI')
  for (const key of url.searchParams.keys())
    if (!(PARAMETERS as readonly string[]).includes(key)) throw bad(`the parameter "${key}" is unknown`)
  if (url.protocol === 'varve+unix:') {
    const socket = decodeURIComponent(url.pathname)
    if (url.host !== '' || !path.isAbsolute(socket) || socket === '/') throw bad('it names no absolute path')
    checkSocketPath(socket)
    return { transport: 'unix', path: socket }
  }
  if (url.protocol !== 'varve+tls:') throw bad(`the scheme ${url.protocol.slice(0, -1)} is unknown`)
  if (url.hostname === '') throw bad('the host is missing')
  if (url.pathname !== '/' && url.pathname !== '') throw bad('nothing comes after the port but a slash')
  const [tokenFile, folder, file, hostname] = PARAMETERS.map((key) => url.searchParams.get(key) ?? undefined)
  if (tokenFile === undefined)
    throw bad('the token is missing: copy api.token from the home of that daemon, and name the copy with --token-file')
  if (folder !== undefined && file !== undefined) throw bad('it names both certificates and keys')
  for (const one of [tokenFile, folder, file])
    if (one !== undefined && !path.isAbsolute(one)) throw bad(`${one} is no absolute path`)
  return {
    transport: 'tls',
    host: url.hostname.replace(/^\[(.*)\]$/, '$1'),
    port: url.port === '' ? API_DEFAULT_PORT : Number(url.port),
    tokenFile,
    tls: {
      ...(folder === undefined ? {} : { files: { kind: 'x509', folder } }),
      ...(file === undefined ? {} : { files: { kind: 'psk', file } }),
      ...(url.username === '' ? {} : { username: decodeURIComponent(url.username) }),
      ...(hostname === undefined ? {} : { hostname }),
    },
  }
}
