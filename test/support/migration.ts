// Two daemons with a slow line between them, a disk with snapshots and bitmaps on one, and a guest that writes to it and never gives up:
// what migrations are tested with. The guest knows every write that was acknowledged, and looks whether it is where the disk is.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import type { DiskReply, JobReply } from '../../src/api/schema.ts'
import { Random } from '../../src/base/random.ts'
import { homeAt } from '../../src/engine/home.ts'
import { connectNbd, type NbdClient } from '../../src/nbd/client.ts'
import { MIB, Site } from './site.ts'
import { SlowLine } from './slow-line.ts'

const SIZE = 32 * MIB
const BLOCK = 4096
const FOREVER_MS = 120_000

export interface PairOptions {
  readonly delayMs?: number
  /** More arguments for the target's `varve serve`. */
  readonly targetArgs?: readonly string[]
}

export class Pair {
  readonly source: Site
  readonly target: Site
  readonly line: SlowLine
  /** The target's URI, by the line. */
  readonly uri: string

  private constructor(source: Site, target: Site, line: SlowLine, uri: string) {
    this.source = source
    this.target = target
    this.line = line
    this.uri = uri
  }

  /** Both run. The line leads to the target's Unix socket. */
  static async start({ delayMs = 20, targetArgs = [] }: PairOptions = {}): Promise<Pair> {
    const source = await Site.start()
    const target = await Site.start({ args: targetArgs })
    const socket = source.path('line.sock')
    const line = await SlowLine.open({ path: homeAt(target.home).apiSocket }, delayMs, { path: socket })
    return new Pair(source, target, line, `varve+unix://${socket}`)
  }

  async end(): Promise<void> {
    this.line.close()
    await this.source.end()
    await this.target.end()
  }

  /** Makes a disk with two snapshots, a backup's bitmap, and the guest's data; the guest is connected. */
  async makeDisk(seed: number, disk = 'vm1'): Promise<Guest> {
    const { source } = this
    await source.disk(disk, '32M')
    const guest = await Guest.of(source, seed, disk)
    await guest.fill(6)
    await source.done('snapshot', 'create', disk, 'monday')
    guest.remember('monday')
    await guest.fill(3)
    await source.done('backup', disk, '--repo', source.repository)
    await source.done('snapshot', 'create', disk, 'tuesday')
    guest.remember('tuesday')
    await guest.fill(2)
    return guest
  }

  showAt(site: Site, disk = 'vm1'): Promise<DiskReply | undefined> {
    return site.daemon.api.call('showDisk', { disk }, {}).catch(() => undefined)
  }

  /** Who would write the disk for a guest now, by what both daemons say. Never both. */
  async writers(disk = 'vm1'): Promise<readonly ('source' | 'target')[]> {
    const [here, there] = await Promise.all([this.showAt(this.source, disk), this.showAt(this.target, disk)])
    return [
      ...(here?.state === 'open' ? (['source'] as const) : []),
      ...(there?.state === 'open' ? (['target'] as const) : []),
    ]
  }

  /** Begins a migration; returns the job's id. */
  async begin(disk: string, ...args: string[]): Promise<string> {
    const said = await this.source.done('migrate', disk, this.uri, ...args, '--no-wait', '--json')
    return (JSON.parse(said) as { id: string }).id
  }

  /** The job once it is as wanted, whatever happens meanwhile; undefined when it has not become so in time. */
  async job(id: string, test: (status: JobReply) => boolean): Promise<JobReply | undefined> {
    const deadline = performance.now() + FOREVER_MS
    while (performance.now() < deadline) {
      const status = await this.source.daemon.api.call('showJob', { job: id }, {}).catch(() => undefined)
      if (status !== undefined && test(status)) return status
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
    return undefined
  }
}

/** Writes block after block, each with the next number, over a connection that comes back however long that takes. */
export class Guest {
  readonly content = Buffer.alloc(SIZE)
  readonly #moments = new Map<string, Buffer>()
  readonly #client: NbdClient
  readonly #random: Random
  #number = 0
  #isRunning = false
  #longestMs = 0
  #work: Promise<void> = Promise.resolve()

  private constructor(client: NbdClient, seed: number) {
    this.#client = client
    this.#random = new Random(seed)
  }

  static async of(site: Site, seed: number, disk: string): Promise<Guest> {
    const { uri } = await site.daemon.api.call('showDisk', { disk }, {})
    assert.ok(uri !== undefined)
    return new Guest(await connectNbd(uri, { reconnectMs: FOREVER_MS }), seed)
  }

  /** Writes acknowledged so far. */
  get acknowledged(): number {
    return this.#number
  }

  /** The longest that a write took since this was asked the last time, in milliseconds. */
  takeLongest(): number {
    const longest = this.#longestMs
    this.#longestMs = 0
    return longest
  }

  /** Random data in so many MiB at random places. */
  async fill(mib: number): Promise<void> {
    for (let i = 0; i < mib; i++) {
      const at = MIB * this.#random.below(SIZE / MIB)
      this.#random.fill(this.content.subarray(at, at + MIB))
      await this.#client.write(at, MIB, this.content, at, 0)
    }
    await this.#client.flush()
  }

  remember(moment: string): void {
    this.#moments.set(moment, Buffer.from(this.content))
  }

  contentAt(moment: string): Buffer {
    const found = this.#moments.get(moment)
    assert.ok(found !== undefined)
    return found
  }

  async write(): Promise<void> {
    const number = this.#number + 1
    const at = BLOCK * this.#random.below(SIZE / BLOCK)
    const block = this.content.subarray(at, at + BLOCK)
    this.#random.fill(block)
    block.writeUInt32LE(number, 0)
    const begun = performance.now()
    if (this.#random.chance(0.05)) {
      block.fill(0)
      await this.#client.zero(at, BLOCK, 0)
    } else await this.#client.write(at, BLOCK, this.content, at, 0)
    this.#longestMs = Math.max(this.#longestMs, performance.now() - begun)
    this.#number = number
    if (number % 64 === 0) await this.#client.flush()
  }

  /** Writes until it is paused, with so many milliseconds between two writes. */
  start(restMs = 0): void {
    this.#isRunning = true
    this.#work = (async () => {
      while (this.#isRunning) {
        await this.write()
        if (restMs > 0) await new Promise((resolve) => setTimeout(resolve, restMs))
      }
    })()
    this.#work.catch(() => undefined)
  }

  /** Throws when a request failed. */
  async pause(): Promise<void> {
    this.#isRunning = false
    await this.#work
  }

  /** Fails unless the disk, as the guest has it, holds what was acknowledged. */
  async check(note: string): Promise<void> {
    const found = Buffer.alloc(SIZE)
    for (let at = 0; at < SIZE; at += MIB) await this.#client.read(at, MIB, found, at)
    checkEqual(found, this.content, note)
  }

  async leave(): Promise<void> {
    this.#isRunning = false
    this.#client.abandon(new Error('left') as never)
    await this.#client.close().catch(() => undefined)
  }
}

/** What a disk or snapshot holds, at its own daemon. */
export async function contentOf(uri: string): Promise<Buffer> {
  const client = await connectNbd(uri)
  const found = Buffer.alloc(client.size)
  for (let at = 0; at < found.length; at += MIB) await client.read(at, Math.min(MIB, found.length - at), found, at)
  await client.close()
  return found
}

export function checkEqual(found: Buffer, wanted: Buffer, note: string): void {
  assert.equal(found.length, wanted.length, note)
  for (let at = 0; at < wanted.length; at += BLOCK)
    if (!found.subarray(at, at + BLOCK).equals(wanted.subarray(at, at + BLOCK)))
      assert.fail(`${note}: the block at ${at} is number ${found.readUInt32LE(at)}, not ${wanted.readUInt32LE(at)}`)
}

/** Bytes that a file takes on its file system. */
export function allocated(file: string): number {
  return fs.statSync(file).blocks * 512
}
