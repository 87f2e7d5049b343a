// The options of every command that listens for NBD clients on the network: certificates, keys, or neither and aloud.

import type { Command } from 'commander'
import { BlockError } from '../block/error.ts'
import type { ServerTlsOptions } from '../nbd/tls.ts'

export interface TlsOptions {
  /** Serve beyond loopback without TLS. */
  readonly insecure?: boolean
  /** Where certificates are, or keys: clients must then begin TLS. */
  readonly tlsCertificates?: string
  readonly tlsPsk?: string
  readonly tlsVerifyPeer?: boolean
  readonly tlsSubject?: readonly string[]
}

export function addTlsOptions(command: Command): Command {
  return command
    .option(
      '--tls-certificates <folder>',
      'require TLS: ca-cert.pem, server-cert.pem and server-key.pem are in the folder',
    )
    .option('--tls-verify-peer', 'only clients with a certificate of the authority in ca-cert.pem')
    .option('--tls-subject <name...>', 'only clients whose certificate has one of these names, as "CN=host2,O=Example"')
    .option('--tls-psk <file>', 'require TLS with pre-shared keys: a line USERNAME:KEY for each user')
    .option('--insecure', 'listen beyond loopback without TLS: whoever reaches the port reads and writes')
}

/** The credentials that the options name; undefined for none. Kind 'invalid-argument' when they do not go together. */
export function tlsOptionsOf(options: TlsOptions): ServerTlsOptions | undefined {
  const { tlsCertificates, tlsPsk, tlsSubject, tlsVerifyPeer } = options
  if (tlsCertificates !== undefined && tlsPsk !== undefined)
    throw new BlockError('invalid-argument', 'give either --tls-certificates or --tls-psk, not both')
  const needsCertificates = tlsVerifyPeer === true || tlsSubject !== undefined
  if (needsCertificates && tlsCertificates === undefined)
    throw new BlockError('invalid-argument', '--tls-verify-peer and --tls-subject need --tls-certificates')
  if (tlsPsk !== undefined) return { files: { kind: 'psk', file: tlsPsk } }
  if (tlsCertificates === undefined) return undefined
  return {
    files: { kind: 'x509', folder: tlsCertificates },
    verifyPeer: tlsVerifyPeer === true,
    ...(tlsSubject === undefined ? {} : { allowedSubjects: tlsSubject }),
  }
}
