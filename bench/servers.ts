// The NBD servers that are compared, each with the options that suit it best. One is one process on one Unix socket.

import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import net from 'node:net'
import path from 'node:path'

export type ImageFormat = 'raw' | 'qcow2'

export interface ServerKind {
  readonly name: string
  readonly formats: readonly ImageFormat[]
  readonly version: () => string
  readonly command: (image: string, format: ImageFormat, socket: string) => readonly string[]
}

function firstLine(program: string, ...args: string[]): string {
  return spawnSync(program, args, { encoding: 'utf8' }).stdout.split('\n')[0] ?? ''
}

export const VARVE: ServerKind = {
  name: 'varve nbd',
  formats: ['raw', 'qcow2'],
  version: () => `Node ${process.version}`,
  command: (image, format, socket) => [
    process.execPath,
    path.join(import.meta.dirname, '..', 'src', 'cli', 'main.ts'),
    'nbd',
    image,
    '--format',
    format,
    '--socket',
    socket,
  ],
}

/** As a guest's disk would be served: cached, four clients at once, and io_uring instead of its thread pool. */
export const QEMU_NBD: ServerKind = {
  name: 'qemu-nbd',
  formats: ['raw', 'qcow2'],
  version: () => firstLine('qemu-nbd', '--version'),
  command: (image, format, socket) => {
    const options = '-t -e 4 --cache=writeback --aio=io_uring --discard=unmap'.split(' ')
    return ['qemu-nbd', ...options, '-f', format, '-k', socket, image]
  },
}

export const NBDKIT: ServerKind = {
  name: 'nbdkit file',
  formats: ['raw'],
  version: () => firstLine('nbdkit', '--version'),
  command: (image, _format, socket) => ['nbdkit', '-f', '-U', socket, 'file', image],
}

export interface RunningServer {
  readonly name: string
  readonly uri: string
  stop(): Promise<void>
}

function answers(socket: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = net.connect(socket, () => resolve(true))
    probe.once('connect', () => probe.destroy()).once('error', () => resolve(false))
  })
}

/** Starts a server and waits until it answers. Fails with what it said when it does not within ten seconds. */
export async function startServer(
  kind: ServerKind,
  image: string,
  format: ImageFormat,
  socket: string,
): Promise<RunningServer> {
  const [program = '', ...args] = kind.command(image, format, socket)
  const child: ChildProcess = spawn(program, args, { stdio: ['ignore', 'ignore', 'pipe'] })
  let said = ''
  child.stderr?.on('data', (chunk: Buffer) => (said = (said + chunk.toString()).slice(-4000)))
  const ended = new Promise<void>((resolve) => child.once('exit', () => resolve()))
  const stop = async (): Promise<void> => {
    child.kill('SIGTERM')
    await ended
  }
  for (let waited = 0; !(await answers(socket)); waited += 20) {
    if (waited >= 10_000 || child.exitCode !== null) {
      await stop()
      throw new Error(`${kind.name} does not answer on ${socket}: ${said}`)
    }
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
  return { name: kind.name, uri: `nbd+unix:///?socket=${socket}`, stop }
}
