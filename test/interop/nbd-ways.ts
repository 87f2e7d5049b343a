// The ways by which a client reaches an export: Unix socket and TCP, each plain, with TLS by certificates of both sides, and with
// TLS by pre-shared keys; and fio, which writes and verifies every block. fio's NBD engine takes neither certificates nor keys, so with
// TLS it speaks to nbdkit's nbd plugin, which speaks TLS to us.

import { execFile } from 'node:child_process'
import path from 'node:path'
import type { TestContext } from 'node:test'
import { promisify } from 'node:util'
import type { BlockDevice } from '../../src/block/device.ts'
import { type ClientTlsOptions, loadServerTls, type ServerTls, type TlsFiles } from '../../src/nbd/tls.ts'
import { formatNbdUri, type NbdUri } from '../../src/nbd/uri.ts'
import { type NbdPlace, type ServeOptions, serveDevice } from '../support/nbd.ts'
import { type Credentials, makeCredentials } from '../support/tls.ts'

const run = promisify(execFile)

export const WAYS = [
  'unix',
  'tcp',
  'unix with certificates',
  'tcp with certificates',
  'unix with keys',
  'tcp with keys',
] as const
export type Way = (typeof WAYS)[number]

/** What the certificate of the server is made out to. */
const HOSTNAME = 'localhost'

export interface Reached {
  readonly uri: string
  readonly target: NbdUri
  /** For QEMU: the object that holds the certificates or keys. */
  readonly tlsObject: string | undefined
}

/** True when a client that comes this way begins TLS. */
export function isSecure(way: Way): boolean {
  return way.includes('with')
}

/** Serves a device by one of the ways. */
export async function serveBy(
  t: TestContext,
  way: Way,
  device: BlockDevice,
  options: Omit<ServeOptions, 'place' | 'tls'> = {},
): Promise<Reached> {
  const security = await secureBy(t, way)
  const tls = security === undefined ? {} : { tls: security.server }
  const { target } = await serveDevice(t, device, { ...options, ...tls, place: placeOf(way) })
  return reachedBy(target, security)
}

export function placeOf(way: Way): NbdPlace {
  return way.startsWith('unix') ? 'unix' : 'tcp'
}

interface Security {
  readonly server: ServerTls
  readonly client: ClientTlsOptions & { readonly files: TlsFiles }
}

/** Makes what both sides need for TLS; undefined for the ways without. */
export async function secureBy(t: TestContext, way: Way): Promise<Security | undefined> {
  if (!isSecure(way)) return undefined
  const client = clientTls(way, makeCredentials(t))
  const { files } = client
  return { client, server: await loadServerTls({ files, verifyPeer: files.kind === 'x509' }) }
}

/** How clients reach an export that is served at `target`. */
export function reachedBy(target: NbdUri, security: Security | undefined): Reached {
  if (security === undefined) return { uri: formatNbdUri(target), target, tlsObject: undefined }
  const secured = { ...target, tls: security.client }
  return { uri: formatNbdUri(secured), target: secured, tlsObject: qemuObject(security.client) }
}

function clientTls(way: Way, { folder, keysFile }: Credentials): Security['client'] {
  if (way.endsWith('keys')) return { files: { kind: 'psk', file: keysFile }, username: 'alice' }
  return { files: { kind: 'x509', folder }, hostname: HOSTNAME }
}

function qemuObject({ files }: { readonly files: TlsFiles }): string {
  if (files.kind === 'x509') return `tls-creds-x509,id=tls,endpoint=client,dir=${files.folder}`
  return `tls-creds-psk,id=tls,endpoint=client,dir=${path.dirname(files.file)},username=alice`
}

/** QEMU's image options that lead to an export of ours. */
export function qemuImage({ target, tlsObject }: Reached): string {
  const where =
    target.transport === 'unix'
      ? `driver=nbd,server.type=unix,server.path=${target.path}`
      : `driver=nbd,server.type=inet,server.host=${target.host},server.port=${target.port}`
  if (tlsObject === undefined) return where
  return target.tls?.files?.kind === 'x509'
    ? `${where},tls-creds=tls,tls-hostname=${HOSTNAME}`
    : `${where},tls-creds=tls`
}

/** nbdkit's arguments that make it pass on to an export of ours what it is asked, with filters before that. */
export function nbdkitTo({ target }: Reached, ...filters: string[]): string[] {
  const where =
    target.transport === 'unix' ? [`socket=${target.path}`] : [`hostname=${target.host}`, `port=${target.port}`]
  const files = target.tls?.files
  const credentials = files?.kind === 'psk' ? [`tls-psk=${files.file}`, 'tls-username=alice'] : []
  const certificates = files?.kind === 'x509' ? [`tls-certificates=${files.folder}`] : []
  const tls = files === undefined ? [] : ['tls=require', ...credentials, ...certificates]
  return [...filters.map((filter) => `--filter=${filter}`), 'nbd', ...where, `export=${target.name}`, ...tls]
}

export interface FioJob {
  readonly verify: 'md5' | 'crc32c'
  /** Bytes of the disk that are used. */
  readonly size: number
  /** Bytes that are read and written. */
  readonly ioSize: number
  /** The same number gives the same requests. */
  readonly seed: number
  /** Where fio keeps what it has to remember. */
  readonly folder: string
}

/** What fio did; the reads include those by which it verified. */
export interface FioCount {
  readonly reads: number
  readonly writes: number
  readonly flushes: number
  readonly bytes: number
}

interface FioReport {
  readonly error: number
  readonly read: { readonly total_ios: number; readonly io_bytes: number }
  readonly write: { readonly total_ios: number; readonly io_bytes: number }
  readonly sync: { readonly total_ios: number }
}

/** Sizes of the requests: most are small, some longer than the server receives at once. */
const BLOCKS = ['--bssplit=4k/60:16k/20:128k/15:1m/5', '--iodepth=16', '--fsync=200']

/** Reads and writes at random with a flush now and then, and verifies every block that it wrote. Fails when one differs. */
export async function verifyByFio(reached: Reached, { verify, size, ioSize, seed, folder }: FioJob): Promise<FioCount> {
  const isByNbdkit = reached.tlsObject !== undefined
  const uri = isByNbdkit ? '--uri="$uri"' : `--uri=${reached.uri}`
  const job = [
    '--ioengine=nbd',
    uri,
    '--rw=randrw',
    ...BLOCKS,
    `--size=${size}`,
    `--io_size=${ioSize}`,
    `--randseed=${seed}`,
  ]
  const checks = [`--verify=${verify}`, '--do_verify=1', '--verify_fatal=1', '--verify_backlog=64']
  const fio = ['fio', '--name=verify', ...job, ...checks, '--output-format=json']
  const [program, ...args] = isByNbdkit ? ['nbdkit', '-U', '-', ...nbdkitTo(reached), '--run', fio.join(' ')] : fio
  const { stdout } = await run(program as string, args, { cwd: folder })
  const [report] = (JSON.parse(stdout.slice(stdout.indexOf('{'))) as { jobs: FioReport[] }).jobs
  if (report === undefined || report.error !== 0) throw new Error(`fio found error ${report?.error} at ${reached.uri}`)
  const { read, write, sync } = report
  return {
    reads: read.total_ios,
    writes: write.total_ios,
    flushes: sync.total_ios,
    bytes: read.io_bytes + write.io_bytes,
  }
}
