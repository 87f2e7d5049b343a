// A server as a child process: started, waited for until it answers, ended, and not left behind when the benchmark fails.

import { type ChildProcess, spawn } from 'node:child_process'
import fs from 'node:fs'
import net from 'node:net'

const START_MS = 20_000
const STOP_MS = 30_000

export interface RunningProcess {
  readonly pid: number
  /** Ends it as an operator would; kills it when it does not end. */
  stop(): Promise<void>
}

/** Starts a program. Fails with what it said when `isReady` is not true within twenty seconds. */
export async function startProcess(
  command: readonly string[],
  isReady: () => Promise<boolean> | boolean,
): Promise<RunningProcess> {
  const [program = '', ...args] = command
  const child: ChildProcess = spawn(program, args, { stdio: ['ignore', 'ignore', 'pipe'] })
  const killWithParent = (): void => void child.kill('SIGKILL')
  process.once('exit', killWithParent)
  let said = ''
  child.stderr?.on('data', (chunk: Buffer) => (said = (said + chunk.toString()).slice(-4000)))
  let hasEnded = false
  const ended = new Promise<void>((resolve) => {
    const end = (): void => {
      hasEnded = true
      process.off('exit', killWithParent)
      resolve()
    }
    child.once('exit', end).once('error', (error) => {
      said += error.message
      end()
    })
  })
  const stop = async (): Promise<void> => {
    child.kill('SIGTERM')
    const timer = setTimeout(() => child.kill('SIGKILL'), STOP_MS)
    await ended
    clearTimeout(timer)
  }
  const deadline = performance.now() + START_MS
  while (!(await isReady())) {
    if (hasEnded || performance.now() > deadline) {
      await stop()
      throw new Error(`${command.join(' ')} does not answer; it said: ${said.trim()}`)
    }
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
  return { pid: child.pid ?? 0, stop }
}

/** True when somebody accepts connections there: a Unix socket, or a port of loopback. */
export function answers(place: { readonly path: string } | { readonly port: number }): Promise<boolean> {
  if ('path' in place && !fs.existsSync(place.path)) return Promise.resolve(false)
  return new Promise((resolve) => {
    const probe = net.connect({ host: '127.0.0.1', ...place }, () => resolve(true))
    probe.once('connect', () => probe.destroy()).once('error', () => resolve(false))
  })
}
