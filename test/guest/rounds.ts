// A guest on a disk of a real daemon, through rounds of everything that happens to a disk while it runs: snapshot, backup, commit, the
// move to another file, each of the last two struck by a kill -9 of the daemon. The guest must see pauses and nothing else; the disk and every
// backup must hold what it had synced by then.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import type { JobReply } from '../../src/api/schema.ts'
import { assertClean } from '../support/daemon.ts'
import { MIB, Site } from '../support/site.ts'
import { journalOf, makeGuestDisk } from './journal.ts'
import { GuestMachine, nbdDisk } from './machine.ts'

const DISK = 'vm1'
/** So slow that a job is still at work when the daemon is killed. */
const SLOW = 1 * MIB

export interface RoundsOutcome {
  readonly lines: number
  readonly backups: number
  readonly kills: number
  /** Jobs that were at work when the daemon was killed. */
  readonly struck: number
  /** The longest time without a synced line, in milliseconds: what the guest saw of kills and switch-overs. */
  readonly longestPauseMs: number
}

/** Runs so many rounds; fails at the first thing that is not as promised. `tell` hears of each round. */
export async function runRounds(rounds: number, tell: (line: string) => void): Promise<RoundsOutcome> {
  const site = await Site.start()
  let guest: GuestMachine | undefined
  try {
    const first = site.path('disk-0.qcow2')
    makeGuestDisk(first, 'qcow2')
    await site.daemon.api.call('addDisk', {}, { name: DISK, image: first, format: 'qcow2' })
    guest = await GuestMachine.boot({ disks: [nbdDisk(DISK, site.path('home', 'run', 'nbd', `${DISK}.sock`))] })
    const run = new Rounds(site, guest, first)
    for (let round = 1; round <= rounds; round++) tell(await run.round(round))
    return await run.conclude()
  } finally {
    await guest?.kill()
    await site.end()
  }
}

class Rounds {
  readonly #site: Site
  readonly #guest: GuestMachine
  readonly #backups: { readonly id: string; readonly atLeast: number }[] = []
  readonly #watch: PauseWatch
  #image: string
  #kills = 0
  #struck = 0

  constructor(site: Site, guest: GuestMachine, image: string) {
    this.#site = site
    this.#guest = guest
    this.#image = image
    this.#watch = new PauseWatch(guest)
  }

  async round(number: number): Promise<string> {
    const { api } = this.#site.daemon
    await this.#guest.progress(5)
    await api.call('createSnapshot', { disk: DISK }, { name: `round-${number}` })
    await this.#guest.progress(10)
    await this.#backUp()
    const commit = await this.#strike(await api.call('commit', { disk: DISK }, { speed: SLOW }))
    assert.equal(commit.state, 'concluded', JSON.stringify(commit))
    const target = this.#site.path(`disk-${number}.qcow2`)
    const moving = { target, format: 'qcow2', finish: 'pivot', speed: SLOW } as const
    const mirror = await this.#strike(await api.call('mirror', { disk: DISK }, moving))
    assert.equal(mirror.state, 'concluded', JSON.stringify(mirror))
    const { layers } = await api.call('showDisk', { disk: DISK }, {})
    assert.deepEqual(
      layers.map(({ path }) => path),
      [target],
      'the disk is in its new file alone',
    )
    fs.rmSync(this.#image)
    this.#image = target
    await this.#guest.progress(5)
    await this.#backUp()
    await this.#guest.check()
    return `round ${number}: line ${this.#guest.synced}, ${this.#kills} kills, ${this.#struck} of them in a job`
  }

  /** Switches the guest off and reads everything it left. */
  async conclude(): Promise<RoundsOutcome> {
    const { synced: lines } = this.#guest
    const longestPauseMs = this.#watch.end()
    await this.#guest.finish()
    await this.#site.daemon.stop()
    assertClean(this.#image, 'the disk at the end')
    const { first, last } = journalOf(this.#image, 'qcow2')
    assert.equal(first, 1)
    assert.ok(last >= lines, `the disk holds ${last} lines of ${lines}`)
    await this.#site.daemon.start()
    for (const { id, atLeast } of this.#backups) {
      const restored = this.#site.path('restored.raw')
      await this.#site.done('restore', id, '--repo', this.#site.repository, '--to', restored, '-f', 'raw')
      const journal = journalOf(restored, 'raw')
      assert.equal(journal.first, 1)
      assert.ok(journal.last >= atLeast, `backup ${id} holds ${journal.last} lines; ${atLeast} were synced before it`)
      fs.rmSync(restored)
    }
    return { lines, backups: this.#backups.length, kills: this.#kills, struck: this.#struck, longestPauseMs }
  }

  async #backUp(): Promise<void> {
    const { api } = this.#site.daemon
    const atLeast = this.#guest.synced
    const { id } = await api.call('backup', {}, { disks: [DISK], repository: this.#site.repository })
    const ended = await api.follow(id, () => undefined)
    assert.equal(ended.error, undefined, JSON.stringify(ended))
    this.#backups.push({ id: String(ended.details['backup']), atLeast })
  }

  /** Kills the daemon while the job is at work, starts it again, lets the job end, and returns what became of it. */
  async #strike({ id }: JobReply): Promise<JobReply> {
    const { daemon } = this.#site
    await this.#guest.progress(2)
    if ((await daemon.api.call('showJob', { job: id }, {})).endedMs === undefined) this.#struck++
    await daemon.kill()
    this.#kills++
    await daemon.start()
    await daemon.api.call('setJobSpeed', { job: id }, { speed: 0 }).catch(() => undefined)
    const ended = await daemon.api.follow(id, () => undefined)
    await this.#guest.progress(1)
    return ended
  }
}

/** Looks at the guest's console for the longest time without a line. */
class PauseWatch {
  readonly #timer: NodeJS.Timeout
  #longestMs = 0

  constructor(guest: GuestMachine) {
    let last = guest.synced
    let since = performance.now()
    this.#timer = setInterval(() => {
      const { synced } = guest
      if (synced === last) return
      const now = performance.now()
      this.#longestMs = Math.max(this.#longestMs, now - since)
      last = synced
      since = now
    }, 20)
    this.#timer.unref()
  }

  end(): number {
    clearInterval(this.#timer)
    return Math.round(this.#longestMs)
  }
}
