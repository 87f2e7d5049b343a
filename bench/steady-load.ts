// A load by fio that goes on for as long as something else is measured, and then tells what was served between two moments.

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import fs from 'node:fs'
import path from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Load } from './fio.ts'

/** A line of fio's log for each of these, in milliseconds. */
const LOG_EVERY_MS = 100
/** Far longer than anything that is measured. */
const SECONDS_MAX = 600
const SETTLE_MS = 1000

export class SteadyLoad {
  readonly #child: ChildProcess
  readonly #log: string
  #said = ''

  private constructor(child: ChildProcess, log: string) {
    this.#child = child
    this.#log = log
    child.stderr?.on('data', (chunk: Buffer) => (this.#said += chunk.toString()))
  }

  /** Begins the load on an export; returns when it runs. The folder takes fio's log. */
  static async start(uri: string, load: Load, folder: string): Promise<SteadyLoad> {
    const log = path.join(folder, 'fio')
    const limit = load.limit === undefined ? '' : ` --rate_iops=${load.limit}`
    const args = `--name=load --ioengine=nbd --rw=${load.rw} --bs=${load.block} --iodepth=${load.depth} --randrepeat=0 --norandommap
      --time_based --runtime=${SECONDS_MAX} --log_avg_msec=${LOG_EVERY_MS} --log_unix_epoch=1 --write_iops_log=${log}${limit}`
    const child = spawn('fio', [...args.split(/\s+/), '--uri', uri], { stdio: ['ignore', 'ignore', 'pipe'] })
    const killWithParent = (): void => void child.kill('SIGKILL')
    process.once('exit', killWithParent)
    child.once('exit', () => process.off('exit', killWithParent))
    const running = new SteadyLoad(child, `${log}_iops.1.log`)
    await sleep(SETTLE_MS)
    running.#checkRunning()
    return running
  }

  /** Ends the load. Requests a second that were served between two moments, as Date.now() tells them. */
  async stop(fromMs: number, toMs: number): Promise<number> {
    this.#checkRunning()
    const ended = once(this.#child, 'exit')
    this.#child.kill('SIGINT')
    await ended
    const lines = fs.readFileSync(this.#log, 'utf8').trim().split('\n')
    fs.rmSync(this.#log)
    // Each line tells of the time before it.
    const counts = lines.map((line) => line.split(',').map(Number) as [atMs: number, iops: number])
    const within = counts.filter(([atMs]) => atMs - LOG_EVERY_MS / 2 >= fromMs && atMs - LOG_EVERY_MS / 2 <= toMs)
    // One that serves nothing for a while has no lines then.
    const slots = Math.max(within.length, Math.round((toMs - fromMs) / LOG_EVERY_MS), 1)
    return within.reduce((sum, [, iops]) => sum + iops, 0) / slots
  }

  #checkRunning(): void {
    if (this.#child.exitCode !== null) throw new Error(`fio ended by itself: ${this.#said}`)
  }
}
