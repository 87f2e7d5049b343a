// The options of every command that speaks to another daemon: with what it proves itself to that.

import path from 'node:path'
import type { Command } from 'commander'
import { parsePeerUri } from '../api/peer-uri.ts'

export interface PeerOptions {
  readonly tokenFile?: string
  readonly tlsCertificates?: string
  readonly tlsPsk?: string
  readonly tlsHostname?: string
}

export function addPeerOptions(command: Command): Command {
  return command
    .option('--token-file <file>', 'for varve+tls: a copy of api.token of the home there')
    .option('--tls-certificates <folder>', 'for varve+tls: ca-cert.pem, and client-cert.pem with its key if asked for')
    .option('--tls-psk <file>', 'for varve+tls: pre-shared keys, a line USERNAME:KEY for each user')
    .option('--tls-hostname <name>', 'for varve+tls: the name in the certificate there, when it is another')
}

/** The URI with the credentials that options name, as anybody can use them who does not know this folder. Kind 'invalid-argument'. */
export function withCredentials(target: string, options: PeerOptions): string {
  const url = URL.canParse(target) ? new URL(target) : undefined
  for (const [key, value] of [
    ['token-file', options.tokenFile],
    ['tls-certificates', options.tlsCertificates],
    ['tls-psk-file', options.tlsPsk],
  ] as const) {
    if (value !== undefined) url?.searchParams.set(key, path.resolve(value))
  }
  if (options.tlsHostname !== undefined) url?.searchParams.set('tls-hostname', options.tlsHostname)
  const uri = url?.href ?? target
  parsePeerUri(uri)
  return uri
}
