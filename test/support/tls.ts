// TLS credentials for one test, laid out as QEMU's and libnbd's users have them: an authority, a server, two clients of which
// one comes from a stranger's authority, and pre-shared keys.

import fs from 'node:fs'
import path from 'node:path'
import type { TestContext } from 'node:test'
import { peer } from './peer.ts'
import { tempFolder } from './temp.ts'

export interface Credentials {
  /** ca-cert.pem, and the server's and the client's certificates and keys. */
  readonly folder: string
  /** The same authority, a client certificate that another one signed. */
  readonly strangerFolder: string
  readonly keysFile: string
}

/** For one test. Needs openssl. */
export function makeCredentials(t: TestContext): Credentials {
  return makeCredentialsIn(tempFolder(t))
}

/** In an empty folder. Needs openssl. */
export function makeCredentialsIn(root: string): Credentials {
  const folder = path.join(root, 'known')
  const strangerFolder = path.join(root, 'stranger')
  for (const [place, client] of [
    [folder, 'client1'],
    [strangerFolder, 'client2'],
  ] as const) {
    fs.mkdirSync(place)
    makeKey(place, 'ca')
    const ca = ['-key', at(place, 'ca-key.pem'), '-subj', '/CN=Test authority', '-days', '2']
    peer('openssl', 'req', '-x509', '-new', ...ca, '-out', at(place, 'ca-cert.pem'))
    sign(place, 'server', 'localhost', 'subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth')
    sign(place, 'client', client, 'extendedKeyUsage=clientAuth')
  }
  fs.copyFileSync(at(folder, 'ca-cert.pem'), at(strangerFolder, 'ca-cert.pem'))
  const keysFile = path.join(folder, 'keys.psk')
  fs.writeFileSync(keysFile, `alice:${'5a'.repeat(32)}\nbob:${'b0'.repeat(32)}\n`)
  return { folder, strangerFolder, keysFile }
}

function at(folder: string, name: string): string {
  return path.join(folder, name)
}

function makeKey(folder: string, name: string): void {
  peer('openssl', 'ecparam', '-name', 'prime256v1', '-genkey', '-noout', '-out', at(folder, `${name}-key.pem`))
}

function sign(folder: string, name: string, commonName: string, extensions: string): void {
  makeKey(folder, name)
  const request = at(folder, `${name}.csr`)
  const extensionFile = at(folder, `${name}.ext`)
  fs.writeFileSync(extensionFile, extensions)
  const subject = ['-subj', `/O=Varve/CN=${commonName}`]
  peer('openssl', 'req', '-new', '-key', at(folder, `${name}-key.pem`), ...subject, '-out', request)
  const authority = ['-CA', at(folder, 'ca-cert.pem'), '-CAkey', at(folder, 'ca-key.pem'), '-CAcreateserial']
  const rest = ['-days', '2', '-extfile', extensionFile, '-out', at(folder, `${name}-cert.pem`)]
  peer('openssl', 'x509', '-req', '-in', request, ...authority, ...rest)
}
