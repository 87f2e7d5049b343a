// The NBD servers that are compared, each one process with the options that suit it best, serving one image.

import path from 'node:path'
import type { ImageFormat } from './images.ts'
import { ROOT, versionOf } from './machine.ts'
import { answers, type RunningProcess, startProcess } from './process.ts'

/** Where a server listens: a Unix socket, or a port of loopback, there with TLS by the certificates in a folder. */
export type Place = { readonly socket: string } | { readonly port: number; readonly certificates?: string | undefined }

export interface Serving {
  readonly image: string
  readonly format: ImageFormat
  readonly place: Place
  /** O_DIRECT instead of the page cache. */
  readonly isUncached?: boolean
  readonly isReadOnly?: boolean
}

export interface ServerKind {
  readonly name: string
  readonly formats: readonly ImageFormat[]
  /** Undefined when it is not installed. */
  readonly version: () => string | undefined
  readonly command: (serving: Serving) => readonly string[]
}

/** As users have it: the built package. */
export const VARVE_PROGRAM: readonly string[] = [process.execPath, path.join(ROOT, 'bin', 'varve.js')]

/** The name of every server's only export. */
const EXPORT = 'disk'

export const VARVE: ServerKind = {
  name: 'varve nbd',
  formats: ['raw', 'qcow2'],
  version: () => `Node ${process.version}`,
  command: ({ image, format, place, isUncached, isReadOnly }) => [
    ...VARVE_PROGRAM,
    'nbd',
    image,
    `--format=${format}`,
    `--export-name=${EXPORT}`,
    ...('socket' in place ? ['--socket', place.socket] : ['--port', String(place.port)]),
    ...('port' in place && place.certificates !== undefined ? ['--tls-certificates', place.certificates] : []),
    ...(isUncached === true ? ['--cache', 'none'] : []),
    ...(isReadOnly === true ? ['--read-only'] : []),
  ],
}

/** As a guest's disk would be served: four clients at once, and io_uring instead of its thread pool. */
export const QEMU_NBD: ServerKind = {
  name: 'qemu-nbd',
  formats: ['raw', 'qcow2'],
  version: () => versionOf('qemu-nbd'),
  command: ({ image, format, place, isUncached, isReadOnly }) => [
    ...'qemu-nbd -t -e 4 --aio=io_uring --discard=unmap'.split(' '),
    `--cache=${isUncached === true ? 'none' : 'writeback'}`,
    ...('socket' in place ? ['-k', place.socket] : ['-b', '127.0.0.1', '-p', String(place.port)]),
    ...('port' in place && place.certificates !== undefined
      ? [
          '--object',
          `tls-creds-x509,id=tls,endpoint=server,dir=${place.certificates},verify-peer=no`,
          '--tls-creds=tls',
        ]
      : []),
    ...(isReadOnly === true ? ['--read-only'] : []),
    `--export-name=${EXPORT}`,
    `--format=${format}`,
    image,
  ],
}

/** The arguments of qemu-storage-daemon for one image under a name. */
export function storageDaemonDisk(name: string, { image, format, isUncached }: Serving): string[] {
  const direct = isUncached === true ? 'on' : 'off'
  return [
    '--blockdev',
    `driver=file,node-name=${name}-file,filename=${image},aio=io_uring,cache.direct=${direct},discard=unmap`,
    '--blockdev',
    `driver=${format},node-name=${name},file=${name}-file,discard=unmap,cache.direct=${direct}`,
    '--export',
    `type=nbd,id=${name}-export,node-name=${name},name=${name},writable=on`,
  ]
}

/** Over io_uring, in its main thread: with threads for the disks version 7.2 ends by an assertion when a client leaves. */
export const STORAGE_DAEMON: ServerKind = {
  name: 'qemu-storage-daemon',
  formats: ['raw', 'qcow2'],
  version: () => versionOf('qemu-storage-daemon'),
  command: (serving) => [
    'qemu-storage-daemon',
    '--nbd-server',
    `addr.type=unix,addr.path=${socketOf(serving.place)}`,
    ...storageDaemonDisk(EXPORT, serving),
  ],
}

/** Unix sockets only. It serves its only export under any name. */
export const NBDKIT: ServerKind = {
  name: 'nbdkit file',
  formats: ['raw'],
  version: () => versionOf('nbdkit'),
  command: ({ image, place }) => ['nbdkit', '-f', '-U', socketOf(place), 'file', image],
}

function socketOf(place: Place): string {
  if ('socket' in place) return place.socket
  throw new Error('this server is measured on Unix sockets only')
}

export interface RunningServer extends RunningProcess {
  readonly uri: string
}

export async function startServer(kind: ServerKind, serving: Serving): Promise<RunningServer> {
  const { place } = serving
  const target = 'socket' in place ? { path: place.socket } : { port: place.port }
  const running = await startProcess(kind.command(serving), () => answers(target))
  return { ...running, uri: uriOf(place) }
}

function uriOf(place: Place): string {
  if ('socket' in place) return `nbd+unix:///${EXPORT}?socket=${place.socket}`
  return `${place.certificates === undefined ? 'nbd' : 'nbds'}://127.0.0.1:${place.port}/${EXPORT}`
}
