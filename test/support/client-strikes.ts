// Strikes at a backup that a client makes by a view: the client is killed or hangs, within its lease or past it, the repository or scratch is
// full. All the while a guest writes and checks what it reads; afterwards nothing is left of the view, and the next backup is what
// the disk is.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import type { JobReply } from '../../src/api/schema.ts'
import { Random } from '../../src/base/random.ts'
import type { NbdClient } from '../../src/nbd/client.ts'
import { beginCommand, MIB, type Running, Site, STATUS } from './site.ts'

export const CLIENT_STRIKES = ['killed, back at once', 'killed', 'hangs', 'scratch full', 'repository full'] as const
export type ClientStrike = (typeof CLIENT_STRIKES)[number]

const SIZE = 16 * MIB
const BLOCK = 4096
/** What changes before each strike, so that a client is busy for about a second at its speed. */
const CHANGED = 3 * MIB
const SPEED = '4M'
/** The scratch of one backup: more than the guest's writes fill meanwhile, and less than its flood. */
const SCRATCH = '2M'
const FLOOD = 4 * MIB
/** Seconds; long enough for a client on a loaded machine, which shows itself four times in it. */
const LEASE = '4'
const REPOSITORY_MIB = 256
/** So that the repository has room for any number of strikes. */
const PRUNE_EVERY = 10

/** What was found at the strike, and what became of that backup. */
export interface Struck {
  readonly at: 'before its view' | 'while it reads' | 'after its end'
  readonly outcome: 'not made' | 'made'
}

/** A daemon with a disk under a guest that verifies, and a client elsewhere. */
export class StruckClients {
  readonly site: Site
  readonly #random: Random
  readonly #content = Buffer.alloc(SIZE)
  #guest: NbdClient | undefined
  #isWriting = false
  #writing: Promise<void> = Promise.resolve()
  writes = 0
  #strikes = 0

  private constructor(site: Site, random: Random) {
    this.site = site
    this.#random = random
  }

  /** With `limited`, which takes root, the repository lies in a small file system. */
  static async start(seed: number, limited: boolean): Promise<StruckClients> {
    const site = Site.make({ args: ['--scratch', SCRATCH] })
    const clients = new StruckClients(site, new Random(seed))
    try {
      await clients.#begin(limited)
      return clients
    } catch (error) {
      await clients.end()
      throw error
    }
  }

  async #begin(limited: boolean): Promise<void> {
    const { site } = this
    await site.daemon.start()
    if (limited) site.smallFileSystem(site.path('small'), REPOSITORY_MIB)
    else fs.mkdirSync(site.path('small'))
    await site.done('repo', 'init', this.repository)
    await site.disk('vm1', String(SIZE))
    this.#guest = await site.guest('vm1')
    await this.#change(0, SIZE)
    await this.next()
  }

  get repository(): string {
    return this.site.path('small', 'repository')
  }

  async end(): Promise<void> {
    await this.#rest()
    await this.#guest?.close()
    await this.site.end()
  }

  /** Strikes once at a random moment. Fails when the guest, what is left, or the next backup is not as it must be. */
  async strike(strike: ClientStrike): Promise<Struck> {
    await this.#change(this.#random.below(4) * CHANGED, CHANGED)
    const client = this.#client('--speed', SPEED, '--lease', strike === 'killed, back at once' ? '600' : LEASE)
    this.#load()
    const struck = await this.#hit(strike, client)
    await this.#rest()
    await this.#check(`after "${strike}"`)
    if (strike !== 'killed, back at once') await this.assertNothingLeft()
    await this.next()
    await this.assertNothingLeft()
    if (++this.#strikes % PRUNE_EVERY === 0) await this.#prune()
    return struck
  }

  /** A backup of the disk as it is now, which must be good and restore to that. */
  async next(): Promise<void> {
    await this.#rest()
    const { status, stdout, stderr } = await this.#client('--json').ended
    assert.equal(status, STATUS.done, stderr)
    const { details, isCompleted } = JSON.parse(stdout) as { details: { backup: string }; isCompleted: boolean }
    assert.ok(isCompleted, stderr)
    const image = this.site.path('restored.raw')
    await this.site.done('restore', details.backup, '--repo', this.repository, '--to', image)
    assert.ok(fs.readFileSync(image).equals(this.#content), `${details.backup} is the disk`)
    fs.rmSync(image)
  }

  /** Nothing is left of views: no job, no export, no captured bits, no scratch. */
  async assertNothingLeft(): Promise<void> {
    assert.deepEqual(await this.#views(), [])
    assert.deepEqual(fs.readdirSync(this.site.path('home', 'run', 'nbd')), ['vm1.sock'])
    const { bitmaps } = await this.site.daemon.api.call('showDisk', { disk: 'vm1' }, {})
    assert.ok(
      bitmaps.every(({ name }) => !name.endsWith(':captured')),
      JSON.stringify(bitmaps),
    )
    const disks = this.site.path('home', 'disks')
    for (const disk of fs.readdirSync(disks)) assert.ok(!fs.existsSync(path.join(disks, disk, 'scratch')))
  }

  /** No client is at work, and of those that were killed none comes back. */
  async #prune(): Promise<void> {
    await this.site.done('repo', 'prune', this.repository, '--keep-last', '1', '--stale-after', '0')
    await this.site.done('repo', 'check', this.repository)
  }

  #client(...args: string[]): Running {
    const from = ['--from', `varve+unix://${this.site.home}/run/api.sock`]
    const home = ['--home', this.site.path('elsewhere')]
    return beginCommand(['backup', 'vm1', '--repo', this.repository, ...from, ...args, ...home])
  }

  async #hit(strike: ClientStrike, client: Running): Promise<Struck> {
    if (strike === 'scratch full') return this.#floods(client)
    if (strike === 'repository full') return this.#fills(client)
    // From the start of the process to a little after the end that it would have.
    await delay(this.#random.below(2500))
    const view = (await this.#views())[0]
    const isOver = client.child.exitCode !== null
    const at = isOver ? 'after its end' : view === undefined ? 'before its view' : 'while it reads'
    client.child.kill(strike === 'hangs' ? 'SIGSTOP' : 'SIGKILL')
    if (strike !== 'killed, back at once') await this.#viewsEnd()
    client.child.kill('SIGCONT')
    const { status } = await client.ended
    return { at, outcome: status === STATUS.done ? 'made' : 'not made' }
  }

  /** The guest writes more than scratch holds; the backup breaks and the guest does not notice. */
  async #floods(client: Running): Promise<Struck> {
    while ((await this.#views()).length === 0 && client.child.exitCode === null) await delay(10)
    await this.#rest()
    await this.#change(0, FLOOD * 3)
    const { status } = await client.ended
    return { at: 'while it reads', outcome: status === STATUS.done ? 'made' : 'not made' }
  }

  async #fills(client: Running): Promise<Struck> {
    const ballast = this.site.path('small', 'ballast')
    fillUp(ballast)
    const { status } = await client.ended
    fs.rmSync(ballast)
    return { at: 'while it reads', outcome: status === STATUS.done ? 'made' : 'not made' }
  }

  async #views(): Promise<readonly JobReply[]> {
    const jobs = await this.site.daemon.api.call('listJobs', {}, {})
    return jobs.filter(({ kind, endedMs }) => kind === 'view' && endedMs === undefined)
  }

  async #viewsEnd(): Promise<void> {
    while ((await this.#views()).length > 0) await delay(20)
  }

  /** Fills a range with data that is nowhere else. */
  async #change(from: number, length: number): Promise<void> {
    const end = Math.min(SIZE, from + length)
    this.#random.fill(this.#content.subarray(from, end))
    for (let at = from; at < end; at += MIB) await this.#guest?.write(at, Math.min(MIB, end - at), this.#content, at, 0)
  }

  /** A light load: it writes blocks, and reads others and looks whether they are what it wrote. */
  #load(): void {
    this.#isWriting = true
    this.#writing = (async () => {
      const found = Buffer.alloc(BLOCK)
      while (this.#isWriting) {
        await this.#change(this.#random.below(SIZE / BLOCK) * BLOCK, BLOCK)
        const at = this.#random.below(SIZE / BLOCK) * BLOCK
        await this.#guest?.read(at, BLOCK, found, 0)
        assert.ok(found.equals(this.#content.subarray(at, at + BLOCK)), `the guest reads at ${at} what it wrote`)
        this.writes++
        await delay(20)
      }
    })()
    this.#writing.catch(() => undefined)
  }

  async #rest(): Promise<void> {
    this.#isWriting = false
    await this.#writing
  }

  async #check(note: string): Promise<void> {
    const found = Buffer.alloc(SIZE)
    for (let at = 0; at < SIZE; at += MIB) await this.#guest?.read(at, MIB, found, at)
    assert.ok(found.equals(this.#content), `${note} the disk is what the guest wrote`)
  }
}

function fillUp(file: string): void {
  const open = fs.openSync(file, 'w')
  const piece = Buffer.alloc(65_536)
  try {
    for (;;) fs.writeSync(open, piece)
  } catch (error) {
    assert.equal((error as NodeJS.ErrnoException).code, 'ENOSPC')
  } finally {
    fs.closeSync(open)
  }
}
