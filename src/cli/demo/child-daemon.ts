// The demo's daemon: `varve serve` as a process of its own, so that it can be killed and started again.

import { type ChildProcess, spawn } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { ApiClient } from '../../api/client.ts'
import { assert } from '../../base/assert.ts'
import { BlockError } from '../../block/error.ts'
import { homeAt } from '../../engine/home.ts'

export interface ChildDaemonOptions {
  /** More arguments for `varve serve`. */
  readonly args?: readonly string[]
  /** User and group that it runs as, by number; this process's own unless told. */
  readonly user?: number
}

const START_MS = 20_000
const STOP_MS = 30_000

export class ChildDaemon {
  readonly api: ApiClient
  readonly #home: string
  readonly #log: string
  readonly #options: ChildDaemonOptions
  #process: ChildProcess | undefined
  readonly #endWithParent = (): void => void this.#process?.kill('SIGKILL')

  /** `log` is a file that gets what the daemon says. */
  constructor(home: string, log: string, options: ChildDaemonOptions = {}) {
    this.#home = home
    this.#log = log
    this.#options = options
    this.api = new ApiClient(homeAt(home).apiSocket)
  }

  /** Starts the daemon and waits until it answers. */
  async start(): Promise<void> {
    const log = fs.openSync(this.#log, 'a')
    // The sources have it one folder up; what the package ships has all in one.
    const main = path.join(import.meta.dirname, path.extname(import.meta.filename) === '.ts' ? '../main.ts' : 'main.js')
    const { args = [], user } = this.#options
    const child = spawn(process.execPath, [main, 'serve', '--home', this.#home, ...args], {
      stdio: ['ignore', log, log],
      ...(user === undefined ? {} : { uid: user, gid: user }),
    })
    fs.closeSync(log)
    this.#process = child
    process.once('exit', this.#endWithParent)
    const deadline = performance.now() + START_MS
    for (;;) {
      try {
        await this.api.call('showStatus', {}, {})
        return
      } catch (error) {
        if (hasEnded(child) || performance.now() > deadline) {
          throw new BlockError(
            'io',
            `the daemon did not start; it said: ${fs.readFileSync(this.#log, 'utf8').trim()}`,
            {},
            error,
          )
        }
        await new Promise((resolve) => setTimeout(resolve, 20))
      }
    }
  }

  /** Number of the process. It must run. */
  get pid(): number {
    const pid = this.#process?.pid
    assert(pid !== undefined, 'a daemon that runs has a number')
    return pid
  }

  /** kill -9 */
  async kill(): Promise<void> {
    await this.#end('SIGKILL')
  }

  /** Ends it cleanly. */
  async stop(): Promise<void> {
    await this.#end('SIGTERM')
  }

  async #end(signal: 'SIGKILL' | 'SIGTERM'): Promise<void> {
    const child = this.#process
    this.#process = undefined
    process.off('exit', this.#endWithParent)
    if (child === undefined || hasEnded(child)) return
    const ended = new Promise<void>((resolve) => child.once('exit', () => resolve()))
    child.kill(signal)
    const timer = setTimeout(() => child.kill('SIGKILL'), STOP_MS)
    await ended
    clearTimeout(timer)
  }
}

function hasEnded(child: ChildProcess): boolean {
  return child.exitCode !== null || child.signalCode !== null
}
