// A load by fio that goes on for as long as something else is measured, and then tells what was served between two moments. fio writes
// a histogram of its latencies ten times a second; a span of time is the sum of those within it.

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import fs from 'node:fs'
import path from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Load, Served } from './fio.ts'

/** A line of fio's log for each of these, in milliseconds. */
const LOG_EVERY_MS = 100
/** Far longer than anything that is measured. */
const SECONDS_MAX = 600
const SETTLE_MS = 1000

/** fio's bins: so many for each doubling of nanoseconds, of which its log joins two. */
const BINS = 64
const JOINED = 2
/** Fields of a line before its bins. */
const HEAD = 4

interface Line {
  /** The time before it is what it tells of. */
  readonly atMs: number
  readonly bins: readonly number[]
}

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
      --time_based --runtime=${SECONDS_MAX} --log_hist_msec=${LOG_EVERY_MS} --log_hist_coarseness=${Math.log2(JOINED)} --log_unix_epoch=1
      --write_hist_log=${log}${limit}`
    const child = spawn('fio', [...args.split(/\s+/), '--uri', uri], { stdio: ['ignore', 'ignore', 'pipe'] })
    const killWithParent = (): void => void child.kill('SIGKILL')
    process.once('exit', killWithParent)
    child.once('exit', () => process.off('exit', killWithParent))
    const running = new SteadyLoad(child, `${log}_clat_hist.1.log`)
    await sleep(SETTLE_MS)
    running.#checkRunning()
    return running
  }

  /** Ends the load. What was served between two moments, as Date.now() tells them. */
  async stop(): Promise<(fromMs: number, toMs: number) => Served> {
    this.#checkRunning()
    const ended = once(this.#child, 'exit')
    this.#child.kill('SIGINT')
    await ended
    const text = fs.readFileSync(this.#log, 'utf8').trim()
    fs.rmSync(this.#log)
    const lines = text.split('\n').map((line): Line => {
      const fields = line.split(',').map(Number)
      return { atMs: fields[0] ?? 0, bins: fields.slice(HEAD) }
    })
    return (fromMs, toMs) => servedBetween(lines, fromMs, toMs)
  }

  #checkRunning(): void {
    if (this.#child.exitCode !== null) throw new Error(`fio ended by itself: ${this.#said}`)
  }
}

function servedBetween(lines: readonly Line[], fromMs: number, toMs: number): Served {
  const within = lines.filter(({ atMs }) => atMs - LOG_EVERY_MS / 2 >= fromMs && atMs - LOG_EVERY_MS / 2 <= toMs)
  const bins = (lines[0]?.bins ?? []).map((_bin, index) =>
    within.reduce((sum, line) => sum + (line.bins[index] ?? 0), 0),
  )
  const count = bins.reduce((sum, bin) => sum + bin, 0)
  // While nothing is served there may be no lines: they count all the same.
  const slots = Math.max(within.length, Math.round((toMs - fromMs) / LOG_EVERY_MS), 1)
  let left = count * 0.01
  let last = bins.length - 1
  while (last > 0 && left > (bins[last] as number)) left -= bins[last--] as number
  return { iops: (count * 1000) / (slots * LOG_EVERY_MS), p99Us: nanosecondsOf((last + 0.5) * JOINED) / 1000 }
}

/** The middle of a bin: exact up to two doublings, then ever wider. */
function nanosecondsOf(bin: number): number {
  if (bin < 2 * BINS) return bin
  const doublings = Math.floor(bin / BINS) - 1
  return 2 ** doublings * (BINS + (bin % BINS))
}
