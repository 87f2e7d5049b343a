// Where a daemon keeps its state: the folder VARVE_HOME and the names in it. Images live wherever the user puts them.
//
//   catalog.db            run/api.sock          disks/ID/log.0 log.1 slot.0 slot.1    dirty log
//   api.token             run/nbd/DISK.sock     disks/ID/scratch                      old data of a running backup
//   run/lock              run/pit/DISK.sock     a disk's point in time, for a backup that another thread makes
//                         run/in/DISK.sock      a disk that comes, or came, from another daemon, for that one
//   qemu/MACHINE/scratch  run/qemu/MACHINE.sock a moment of a machine in a QEMU of its own, for a backup
//                         run/out/TOKEN.sock    the way to a disk at another daemon
//                         images/               of disks that came from others

import os from 'node:os'
import path from 'node:path'
import type { Host, HostFile } from '../host/host.ts'

export interface Home {
  readonly folder: string
  readonly catalog: string
  readonly lock: string
  readonly apiSocket: string
  nbdSocket(disk: string): string
  viewSocket(disk: string): string
  incomingSocket(disk: string): string
  /** Where a QEMU serves the moments of its machine, and the folder of its scratch. */
  qemuSocket(machine: string): string
  qemuFolder(machine: string): string
  outgoingSocket(token: string): string
  /** Asked of whoever speaks to the API over TCP. */
  readonly tokenFile: string
  readonly imageFolder: string
  diskFolder(id: string): string
}

/** The folder that `--home` or VARVE_HOME names, else the system's default for this user. */
export function homeFolder(given: string | undefined): string {
  const named = given ?? process.env['VARVE_HOME']
  if (named !== undefined && named !== '') return path.resolve(named)
  if (process.getuid?.() === 0) return '/var/lib/varve'
  const state = process.env['XDG_STATE_HOME'] ?? path.join(os.homedir(), '.local', 'state')
  return path.join(state, 'varve')
}

/** The folder for what can be made again: VARVE_CACHE, else the system's default for this user. */
export function cacheFolder(): string {
  const { VARVE_CACHE: named, XDG_CACHE_HOME: cache } = process.env
  if (named !== undefined && named !== '') return path.resolve(named)
  if (process.getuid?.() === 0) return '/var/cache/varve'
  return path.join(cache ?? path.join(os.homedir(), '.cache'), 'varve')
}

export function homeAt(folder: string): Home {
  return {
    folder,
    catalog: path.join(folder, 'catalog.db'),
    lock: path.join(folder, 'run', 'lock'),
    apiSocket: path.join(folder, 'run', 'api.sock'),
    nbdSocket: (disk) => path.join(folder, 'run', 'nbd', `${disk}.sock`),
    viewSocket: (disk) => path.join(folder, 'run', 'pit', `${disk}.sock`),
    qemuSocket: (machine) => path.join(folder, 'run', 'qemu', `${machine}.sock`),
    qemuFolder: (machine) => path.join(folder, 'qemu', machine),
    incomingSocket: (disk) => path.join(folder, 'run', 'in', `${disk}.sock`),
    outgoingSocket: (token) => path.join(folder, 'run', 'out', `${token.slice(0, 16)}.sock`),
    tokenFile: path.join(folder, 'api.token'),
    imageFolder: path.join(folder, 'images'),
    diskFolder: (id) => path.join(folder, 'disks', id),
  }
}

/** Takes the home for this process. Kind 'busy' when another daemon has it. */
export function lockHome(host: Host, home: Home): Promise<HostFile> {
  return host.open(home.lock, { write: true, create: 'if-missing', lock: 'write' })
}
