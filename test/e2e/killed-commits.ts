// Active commits of a disk that is full in its overlay, under two guests, killed with -9 at given parts of their way: where each run
// stopped and the next went on, and how much was copied in all. One guest is the verifying load, which lives through kills; the
// other, where asked for, is fio, begun again after each.
//
//   disk   | noise, checked in the end | the load's blocks | fio |
//          0                          1/2                 3/4

import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import fs from 'node:fs'
import path from 'node:path'
import type { JobReply } from '../../src/api/schema.ts'
import { Random } from '../../src/base/random.ts'
import { ChildDaemon } from '../../src/cli/demo/child-daemon.ts'
import { Load } from '../../src/cli/demo/load.ts'
import { connectNbd, type NbdClient } from '../../src/nbd/client.ts'
import { peer } from '../support/peer.ts'

const MIB = 1024 * 1024
const DISK = 'vm1'
const PIECE = MIB
/** One of the load's blocks in so many bytes. */
const LOAD_EVERY = 64 * 1024
const RECONNECT_MS = 60_000
const FIO_PAUSE_MS = 50

export interface KilledOptions {
  /** Empty; gets images, home and log. */
  readonly folder: string
  readonly sizeMiB: number
  readonly seed: number
  /** Random writes of 4 KiB a second by fio, at depth 8; none for 0. */
  readonly fioIops: number
}

/** One kill, in bytes of the job's progress. */
export interface Kill {
  /** As it was seen last. */
  readonly stoppedAt: number
  readonly wentOnFrom: number
  readonly total: number
  /** Of what was done, copied once more since a guest wrote there. */
  readonly rewritten: number
}

export interface CommitFigures {
  readonly kills: readonly Kill[]
  /** Bytes copied by all runs, and those that guests made to do again. */
  readonly copied: number
  readonly rewritten: number
  readonly seconds: number
}

/** A disk with a daemon and guests, for one commit after the other. */
export class KilledCommits {
  readonly #options: KilledOptions
  readonly #daemon: ChildDaemon
  readonly #noise = Buffer.alloc(PIECE)
  #client: NbdClient | undefined
  #load: Load | undefined
  #fio: FioGuest | undefined
  #commits = 0

  constructor(options: KilledOptions) {
    this.#options = options
    this.#daemon = new ChildDaemon(path.join(options.folder, 'home'), path.join(options.folder, 'daemon.log'))
    new Random(options.seed).fill(this.#noise)
  }

  async start(): Promise<void> {
    const { folder, sizeMiB, seed, fioIops } = this.#options
    await this.#daemon.start()
    const image = path.join(folder, 'disk.qcow2')
    const { uri = '' } = await this.#daemon.api.call(
      'addDisk',
      {},
      { name: DISK, image, format: 'qcow2', size: sizeMiB * MIB },
    )
    this.#client = await connectNbd(uri, { reconnectMs: RECONNECT_MS })
    const blocks = Array.from({ length: (sizeMiB * MIB) / 4 / LOAD_EVERY }, (_, i) => this.#at(0.5) + i * LOAD_EVERY)
    this.#load = await Load.connect(uri, Float64Array.from(blocks), seed)
    if (fioIops > 0) this.#fio = new FioGuest(uri, this.#at(0.75), this.#at(0.25), fioIops)
    await this.#fill()
    await this.#load.sweep()
  }

  async end(): Promise<void> {
    await this.#fio?.stop()
    await this.#load?.close()
    await this.#client?.close()
    await this.#daemon.kill()
  }

  /**
   * Takes a snapshot, fills the overlay, and commits it at that speed (bytes per second, 0 for no limit) with a kill when each of these
   * parts is done. Fails when a guest finds anything wrong, or the disk does not hold what was written.
   */
  async commit(
    killAt: readonly number[],
    speed: number,
    told: (kill: Kill) => void = () => {},
  ): Promise<CommitFigures> {
    this.#commits++
    await this.#daemon.api.call('createSnapshot', { disk: DISK }, { name: `s${this.#commits}` })
    await this.#fill()
    await this.#load?.sweep()
    this.#load?.start()
    this.#fio?.start()
    const began = performance.now()
    const { id } = await this.#daemon.api.call('commit', { disk: DISK }, { speed })
    const kills: Kill[] = []
    let copied = 0
    let rewritten = 0
    for (const part of [...killAt, Infinity]) {
      const last = await this.#until(id, ({ done, total }) => total > 0 && done >= part * total)
      copied += bytesOf(last, 'copied')
      rewritten += bytesOf(last, 'rewritten')
      if (last.endedMs !== undefined) break
      await this.#daemon.kill()
      await this.#daemon.start()
      const again = await this.#until(id, ({ total }) => total > 0)
      const { done: stoppedAt, total } = last
      kills.push({ stoppedAt, wentOnFrom: again.resumedAt, total, rewritten: bytesOf(last, 'rewritten') })
      told(kills.at(-1) as Kill)
    }
    const seconds = (performance.now() - began) / 1000
    await this.#fio?.stop()
    await this.#load?.stop()
    await this.#check()
    return { kills, copied, rewritten, seconds }
  }

  #at(part: number): number {
    return this.#options.sizeMiB * MIB * part
  }

  /** Asks without a pause, so that what is seen last before a kill is next to what was done. */
  async #until(id: string, test: (status: JobReply) => boolean): Promise<JobReply> {
    for (;;) {
      const status = await this.#daemon.api.call('showJob', { job: id }, {})
      assert.equal(status.error, undefined)
      if (status.endedMs !== undefined || test(status)) return status
    }
  }

  /** Writes all of the disk, but for the load's own blocks. */
  async #fill(): Promise<void> {
    for (let at = 0; at < this.#at(1); at += PIECE) {
      this.#stamp(at)
      await this.#client?.write(at, PIECE, this.#noise, 0, 0)
    }
    await this.#client?.flush()
  }

  #stamp(at: number): void {
    this.#noise.writeUInt32LE(this.#commits, 0)
    this.#noise.writeUInt32LE(at / PIECE, 4)
  }

  async #check(): Promise<void> {
    const piece = Buffer.alloc(PIECE)
    for (let at = 0; at < this.#at(0.5); at += PIECE) {
      await this.#client?.read(at, PIECE, piece, 0)
      this.#stamp(at)
      assert.ok(piece.equals(this.#noise), `commit ${this.#commits}: the disk differs at ${at}`)
    }
    const { layers } = await this.#daemon.api.call('showDisk', { disk: DISK }, {})
    assert.equal(layers.length, 1)
    const names = fs.readdirSync(this.#options.folder).filter((name) => name.includes('.qcow2'))
    assert.deepEqual(names, ['disk.qcow2'], 'no other image is left')
  }

  /** Ends the daemon cleanly, and has QEMU look at the image. */
  async checkImage(): Promise<void> {
    await this.#load?.close()
    await this.#client?.close()
    await this.#daemon.stop()
    peer('qemu-img', 'check', '-q', '-f', 'qcow2', path.join(this.#options.folder, 'disk.qcow2'))
  }
}

/** What a job says of itself, in bytes. */
function bytesOf({ details }: JobReply, name: string): number {
  const value = details[name]
  return typeof value === 'number' ? value : 0
}

/** fio's random writes to a part of the disk; since it does not live through a kill, it is begun again. */
class FioGuest {
  readonly #args: readonly string[]
  #child: ChildProcess | undefined
  #isRunning = false
  #ended: Promise<void> = Promise.resolve()

  constructor(uri: string, offset: number, size: number, iops: number) {
    this.#args = [
      ...'--name=guest --ioengine=nbd --rw=randwrite --bs=4k --iodepth=8 --time_based --runtime=3600 --norandommap'.split(
        ' ',
      ),
      `--uri=${uri}`,
      `--offset=${offset}`,
      `--size=${size}`,
      `--rate_iops=${iops}`,
    ]
    process.once('exit', () => this.#child?.kill('SIGKILL'))
  }

  start(): void {
    this.#isRunning = true
    this.#ended = this.#run()
  }

  async stop(): Promise<void> {
    this.#isRunning = false
    this.#child?.kill('SIGKILL')
    await this.#ended
  }

  async #run(): Promise<void> {
    while (this.#isRunning) {
      const child = spawn('fio', this.#args, { stdio: 'ignore' })
      this.#child = child
      await new Promise<void>((resolve) => child.once('close', () => resolve()).once('error', () => resolve()))
      await new Promise((resolve) => setTimeout(resolve, FIO_PAUSE_MS))
    }
  }
}
