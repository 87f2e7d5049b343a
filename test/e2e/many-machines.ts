// Many machines in one daemon, each under a light load that verifies what it reads, all backed up by one command: first in full, then by
// what changed. Measures what that takes of the host, the curve of scratch above all, and what the loads feel of it; every backup is then
// read whole and must be its disk as it was at one moment of that command.

import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { JobReply } from '../../src/api/schema.ts'
import { Random } from '../../src/base/random.ts'
import { ChildDaemon } from '../../src/cli/demo/child-daemon.ts'
import { connectNbd } from '../../src/nbd/client.ts'
import { initRepositoryAt, openRepositoryAt } from '../../src/shard/repositories.ts'
import { type Answer, SerialGuest } from '../support/serial-guest.ts'

const MIB = 1024 * 1024
const MAIN = path.resolve(import.meta.dirname, '..', '..', 'src', 'cli', 'main.ts')
const SAMPLE_MS = 100

export interface ManyMachinesOptions {
  /** Empty; gets images, home and repository. */
  readonly folder: string
  readonly machines: number
  readonly sizeMiB: number
  /** How much of each disk is written before. */
  readonly fillMiB: number
  /** Writes and reads of each load in a second. */
  readonly perSecond: number
  /** What all backups of the host may copy together, in bytes a second; no limit unless told. */
  readonly bandwidth?: number
  readonly seed: number
}

/** What one command took. */
export interface Round {
  readonly seconds: number
  readonly jobs: readonly JobReply[]
  /** Bytes of scratch in use on the host, each tenth of a second, and the most at any moment. */
  readonly curve: readonly number[]
  readonly hostPeak: number
  /** The most that any machine had, and what all had together. */
  readonly largestPeak: number
  readonly sumOfPeaks: number
  readonly sumSaved: number
  /** Most machines that had their turn at a time, as seen by looking. */
  readonly atOnce: number
  readonly readBytes: number
  readonly p99: number
}

export class ManyMachines {
  readonly #options: ManyMachinesOptions
  readonly #daemon: ChildDaemon
  readonly #answers: Answer[] = []
  #guests: SerialGuest[] = []
  #stop = new AbortController()
  #loads: Promise<unknown> = Promise.resolve()

  constructor(options: ManyMachinesOptions) {
    this.#options = options
    this.#daemon = new ChildDaemon(this.#home, path.join(options.folder, 'daemon.log'))
  }

  /** Starts the daemon, makes and fills the disks, and begins the loads. */
  async start(): Promise<void> {
    const { folder, machines, sizeMiB, fillMiB, perSecond, bandwidth, seed } = this.#options
    const random = new Random(seed)
    const noise = SerialGuest.noise(random)
    await (await initRepositoryAt(this.#repository)).close()
    await this.#daemon.start()
    if (bandwidth !== undefined) await this.#daemon.api.call('setHost', {}, { bandwidth })
    for (let disk = 1; disk <= machines; disk++) {
      const image = path.join(folder, `${nameOf(disk)}.raw`)
      const wish = { name: nameOf(disk), image, format: 'raw', size: sizeMiB * MIB } as const
      const { uri } = await this.#daemon.api.call('addDisk', {}, wish)
      assert.ok(uri !== undefined)
      const answered = (answer: Answer): void => void this.#answers.push(answer)
      const options = { disk, random: new Random(seed + disk), answered }
      const guest = new SerialGuest(await connectNbd(uri), noise, options)
      this.#guests.push(guest)
      await guest.fill(fillMiB * MIB)
    }
    this.#loads = Promise.all(this.#guests.map((guest) => guest.run(perSecond, this.#stop.signal)))
    this.#loads.catch(() => undefined)
  }

  /** The 99th percentile of what requests take, in milliseconds, over so many seconds without a backup. */
  async alone(seconds: number): Promise<number> {
    const since = performance.now()
    await Promise.race([sleep(seconds * 1000), this.#loads])
    return this.#p99(since)
  }

  /** Backs all of them up by one command, checks how it went, and what each backup holds. */
  async backUp(kind: 'full' | 'incremental'): Promise<Round> {
    const { api } = this.#daemon
    const before = this.#guests.map(({ acknowledged }) => acknowledged)
    const since = performance.now()
    const curve: number[] = []
    let atOnce = 0
    const watched = new AbortController()
    const watching = (async () => {
      while (!watched.signal.aborted) {
        const host = await api.call('showHost', {}, {})
        curve.push(host.scratch.used)
        atOnce = Math.max(atOnce, host.running.length)
        await sleep(SAMPLE_MS)
      }
    })()
    const outcomes = await Promise.race([this.#command(), this.#loads as Promise<never>])
    const seconds = (performance.now() - since) / 1000
    watched.abort()
    await watching
    const after = this.#guests.map(({ begun }) => begun)
    const p99 = this.#p99(since)
    assert.equal(outcomes.length, this.#options.machines)
    for (const outcome of outcomes) assert.equal(outcome.kind, kind, JSON.stringify(outcome))
    const jobs = await Promise.all(outcomes.map(({ job }) => api.call('showJob', { job }, {})))
    checkOneAfterTheOther(jobs)
    await this.#checkBackups(outcomes, { before, after })
    const figure = (name: string): number[] => jobs.map(({ details }) => Number(details[name] ?? 0))
    return {
      seconds,
      jobs,
      curve,
      hostPeak: (await api.call('showHost', {}, {})).scratch.peak,
      largestPeak: Math.max(...figure('scratchPeak')),
      sumOfPeaks: sum(figure('scratchPeak')),
      sumSaved: sum(figure('scratchSaved')),
      atOnce,
      readBytes: sum(figure('readBytes')),
      p99,
    }
  }

  /** Bytes that the daemon has in memory, and had at most so far. */
  get memory(): { readonly now: number; readonly peak: number } {
    const status = fs.readFileSync(`/proc/${this.#daemon.pid}/status`, 'utf8')
    const bytes = (name: string): number => Number(new RegExp(`^${name}:\\s+(\\d+) kB$`, 'm').exec(status)?.[1]) * 1024
    return { now: bytes('VmRSS'), peak: bytes('VmHWM') }
  }

  async end(): Promise<void> {
    this.#stop.abort()
    try {
      await this.#loads
      for (const guest of this.#guests) await guest.close()
    } finally {
      await this.#daemon.kill()
    }
  }

  get #home(): string {
    return path.join(this.#options.folder, 'home')
  }

  get #repository(): string {
    return path.join(this.#options.folder, 'repository')
  }

  async #command(): Promise<Outcome[]> {
    const args = [MAIN, 'backup', '--all', '--repo', this.#repository, '--json', '--home', this.#home]
    const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'pipe'] })
    let [said, complained] = ['', '']
    child.stdout.on('data', (data: Buffer) => (said += data.toString()))
    child.stderr.on('data', (data: Buffer) => (complained += data.toString()))
    const status = await new Promise((resolve) => child.once('close', resolve))
    assert.equal(status, 0, complained)
    return (JSON.parse(said) as { machines: Outcome[] }).machines
  }

  /** Each is its disk after some number of writes, which lies between those before the command and those after it. */
  async #checkBackups(
    outcomes: readonly Outcome[],
    { before, after }: { readonly before: readonly number[]; readonly after: readonly number[] },
  ): Promise<void> {
    const repository = await openRepositoryAt(this.#repository)
    for (const [index, guest] of this.#guests.entries()) {
      const { backup } = outcomes.find(({ machine }) => machine === nameOf(index + 1)) as Outcome
      const reader = await repository.openBackup(backup)
      const [disk] = reader.disks
      assert.ok(disk !== undefined)
      const writes = await guest.check(disk.device)
      const [first, last] = [before[index] as number, after[index] as number]
      assert.ok(writes >= first && writes <= last, `${nameOf(index + 1)}: ${writes} writes, of ${first} to ${last}`)
      await reader.close()
    }
    await repository.close()
  }

  #p99(sinceMs: number): number {
    const took = this.#answers.filter(({ atMs }) => atMs >= sinceMs).map(({ tookMs }) => tookMs)
    took.sort((a, b) => a - b)
    return took[Math.floor(took.length * 0.99)] ?? Number.NaN
  }
}

interface Outcome {
  readonly machine: string
  readonly job: string
  readonly backup: string
  readonly kind: string
}

function nameOf(disk: number): string {
  return `vm${disk}`
}

/** No machine has scratch before that of the one before it is given back. */
function checkOneAfterTheOther(jobs: readonly JobReply[]): void {
  const spans = jobs.map(({ subject, details }) => ({
    subject,
    from: Number(details['momentMs']),
    to: Number(details['releasedMs']),
  }))
  spans.sort((a, b) => a.from - b.from)
  for (const [index, { subject, from }] of spans.entries()) {
    const earlier = spans[index - 1]
    if (earlier === undefined) continue
    assert.ok(
      from >= earlier.to,
      `${subject} had its moment at ${from}, and ${earlier.subject} scratch until ${earlier.to}`,
    )
  }
}

function sum(numbers: readonly number[]): number {
  return numbers.reduce((all, one) => all + one, 0)
}
