// The ways by which a client reaches an export: Unix socket and TCP, each plain and with TLS (pre-shared keys, which every client
// takes from a file); and fio, which writes and verifies every block. fio's NBD engine takes no keys, so with TLS it speaks to nbdkit's
// nbd plugin, which speaks TLS to us.

import { execFile } from 'node:child_process'
import path from 'node:path'
import type { TestContext } from 'node:test'
import { promisify } from 'node:util'
import type { BlockDevice } from '../../src/block/device.ts'
import { loadServerTls } from '../../src/nbd/tls.ts'
import { formatNbdUri, type NbdUri } from '../../src/nbd/uri.ts'
import { type ServeOptions, serveDevice } from '../support/nbd.ts'
import { makeCredentials } from '../support/tls.ts'

const run = promisify(execFile)

export const WAYS = ['unix', 'tcp', 'unix with TLS', 'tcp with TLS'] as const
export type Way = (typeof WAYS)[number]

export interface Reached {
  readonly uri: string
  readonly target: NbdUri
  /** For QEMU: the object that holds the keys, and the folder of the keys. */
  readonly tlsObject: string | undefined
}

/** Serves a device by one of the ways. */
export async function serveBy(
  t: TestContext,
  way: Way,
  device: BlockDevice,
  options: Omit<ServeOptions, 'place' | 'tls'> = {},
): Promise<Reached> {
  const place = way.startsWith('unix') ? 'unix' : 'tcp'
  if (!way.endsWith('TLS')) {
    const { target } = await serveDevice(t, device, { ...options, place })
    return { uri: formatNbdUri(target), target, tlsObject: undefined }
  }
  const { keysFile } = makeCredentials(t)
  const files = { kind: 'psk', file: keysFile } as const
  const served = await serveDevice(t, device, { ...options, place, tls: await loadServerTls({ files }) })
  const target = { ...served.target, tls: { files, username: 'alice' } }
  const tlsObject = `tls-creds-psk,id=tls,endpoint=client,dir=${path.dirname(keysFile)},username=alice`
  return { uri: formatNbdUri(target), target, tlsObject }
}

/** nbdkit's arguments that make it pass on to an export of ours what it is asked. */
export function nbdkitTo({ target }: Reached): string[] {
  const where =
    target.transport === 'unix' ? [`socket=${target.path}`] : [`hostname=${target.host}`, `port=${target.port}`]
  const files = target.tls?.files
  const tls = files?.kind === 'psk' ? ['tls=require', `tls-psk=${files.file}`, 'tls-username=alice'] : []
  return ['-U', '-', 'nbd', ...where, `export=${target.name}`, ...tls]
}

export interface FioJob {
  readonly verify: 'md5' | 'crc32c'
  /** Bytes of the disk that are used. */
  readonly size: number
  /** Bytes that are read and written. */
  readonly ioSize: number
  /** Where fio keeps what it has to remember. */
  readonly folder: string
}

/** Reads and writes at random in blocks of 4 KiB to 128 KiB, and verifies; returns the number of writes. Fails when a block differs. */
export async function verifyByFio(reached: Reached, { verify, size, ioSize, folder }: FioJob): Promise<number> {
  const isSecure = reached.tlsObject !== undefined
  const job = [
    '--ioengine=nbd',
    isSecure ? '--uri="$uri"' : `--uri=${reached.uri}`,
    '--rw=randrw',
    '--bsrange=4k-128k',
    '--iodepth=16',
    `--size=${size}`,
  ]
  const checks = [`--verify=${verify}`, '--do_verify=1', '--verify_fatal=1', '--verify_backlog=64']
  const rest = [`--io_size=${ioSize}`, '--output-format=json']
  const fio = ['fio', '--name=verify', ...job, ...checks, ...rest]
  const [program, ...args] = isSecure ? ['nbdkit', ...nbdkitTo(reached), '--run', fio.join(' ')] : fio
  const { stdout } = await run(program as string, args, { cwd: folder })
  const [report] = (
    JSON.parse(stdout.slice(stdout.indexOf('{'))) as { jobs: { error: number; write: { total_ios: number } }[] }
  ).jobs
  if (report === undefined || report.error !== 0) throw new Error(`fio found error ${report?.error} at ${reached.uri}`)
  return report.write.total_ios
}
