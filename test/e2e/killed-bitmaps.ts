// kill -9 of a real daemon while a guest writes and bitmaps are cleared and swapped, views opened, completed and cancelled, snapshots
// taken and committed, and backups made into two repositories. After each kill the disk must have every acknowledged write, each bitmap
// exactly the granules that were written since its moment, and the next backups must be incremental and equal to the disk.
//
//   write ──issued──────acknowledged──>      since a moment it must be set if it was issued after the moment was sure, and may be
//   edit  ──begun──────────────done───>      if it was not acknowledged before the moment could have been

import assert from 'node:assert/strict'
import type { JobReply } from '../../src/api/schema.ts'
import { getUint32, setUint32 } from '../../src/base/bytes.ts'
import { Random } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import { connectNbd, type NbdClient } from '../../src/nbd/client.ts'
import { openRepositoryAt } from '../../src/shard/repositories.ts'
import { MIB, type Site } from '../support/site.ts'

const DISK = 'vm1'
const BLOCK = 4096
const SIZE = 48 * MIB
const BLOCKS = SIZE / BLOCK
const LANES = 4
/** Between a start and its kill, in milliseconds. */
const LIVES_MS = [40, 700] as const
const SNAPSHOTS_MAX = 2
/** Edited, and read on by views. */
const EDITED = 'edited'
const VIEWED = 'viewed'

/** Of each block, whether it must and whether it may be set. */
interface Bits {
  readonly must: Uint8Array
  readonly may: Uint8Array
}

/** A bitmap: what it is, and what it is if the change of it that is under way happened. */
interface Tracked {
  bits: Bits
  next: Bits | undefined
  /** Writes that are issued from now on are in `next` for certain. */
  isSure: boolean
}

export interface KillFigures {
  readonly kills: number
  /** How often each command was under way when a kill came. */
  readonly during: ReadonlyMap<string, number>
  readonly backups: number
  readonly writes: number
}

export class KilledBitmaps {
  readonly #site: Site
  readonly #random: Random
  readonly #repositories: readonly string[]
  readonly #issued = new Uint32Array(BLOCKS)
  readonly #acknowledged = new Uint32Array(BLOCKS)
  readonly #inFlight = new Set<number>()
  readonly #tracked = new Map<string, Tracked>()
  readonly #done = new Set<string>()
  readonly #during = new Map<string, number>()
  #stamp = 0
  #kills = 0
  #backups = 0
  #names = 0
  #isRunning = false
  #command = 'nothing'

  constructor(site: Site, seed: number) {
    this.#site = site
    this.#random = new Random(seed)
    this.#repositories = [site.repository, site.path('repository-2')]
  }

  get figures(): KillFigures {
    return { kills: this.#kills, during: this.#during, backups: this.#backups, writes: this.#stamp }
  }

  async start(): Promise<void> {
    await this.#site.done('repo', 'init', this.#repositories[1] as string)
    await this.#site.disk(DISK, String(SIZE), this.#random.pick(['qcow2', 'raw'] as const))
    for (const name of [EDITED, VIEWED]) {
      await this.#site.done('bitmap', 'add', DISK, name)
      this.#tracked.set(name, { bits: none(), next: undefined, isSure: false })
    }
  }

  /** One life of the daemon, its death, and what is there after it. */
  async kill(): Promise<void> {
    const guest = await this.#site.guest(DISK)
    this.#isRunning = true
    const lanes = Array.from({ length: LANES }, () => this.#write(guest))
    const commands = [this.#repeat(() => this.#change()), this.#repeat(() => this.#backup())]
    const dies = pause(this.#random.between(...LIVES_MS)).then(async () => {
      this.#isRunning = false
      const { pid } = this.#site.daemon
      process.kill(pid, 'SIGKILL')
      this.#during.set(this.#command, (this.#during.get(this.#command) ?? 0) + 1)
      await this.#site.daemon.kill()
    })
    await Promise.all([...lanes, ...commands, dies])
    await guest.close().catch(() => undefined)
    this.#kills++
    await this.#site.daemon.start()
    await this.#check()
  }

  async #write(guest: NbdClient): Promise<void> {
    const bytes = Buffer.alloc(BLOCK)
    while (this.#isRunning) {
      const block = this.#random.below(BLOCKS)
      if (this.#inFlight.has(block)) continue
      const stamp = ++this.#stamp
      for (let at = 0; at < BLOCK; at += 4) setUint32(bytes, at, stamp)
      this.#issued[block] = stamp
      this.#inFlight.add(block)
      const sure: Bits[] = []
      for (const { bits, next, isSure } of this.#tracked.values()) {
        bits.may[block] = 1
        sure.push(bits)
        if (next === undefined) continue
        next.may[block] = 1
        if (isSure) sure.push(next)
      }
      try {
        await guest.write(block * BLOCK, BLOCK, bytes, 0, 0)
      } catch (error) {
        if (this.#isRunning) throw error
        return
      }
      this.#acknowledged[block] = stamp
      for (const { must } of sure) must[block] = 1
      this.#inFlight.delete(block)
    }
  }

  /** Repeats a command until the kill, which may fail it; and one that has to wait for another one may be refused. */
  async #repeat(command: () => Promise<void>): Promise<void> {
    while (this.#isRunning) {
      try {
        await command()
      } catch (error) {
        if (this.#isRunning && !isBlockError(error, 'busy')) throw error
      }
      await pause(this.#random.below(20))
    }
  }

  async #change(): Promise<void> {
    const { api } = this.#site.daemon
    const disk = { disk: DISK }
    this.#command = this.#random.pick(['clear', 'swap', 'merge', 'view', 'view', 'snapshot', 'commit'])
    switch (this.#command) {
      case 'clear':
        return this.#anew(() => api.call('editBitmaps', disk, { edits: [{ edit: 'clear', name: EDITED }] }))
      case 'swap': {
        const edits = [
          { edit: 'rename', name: EDITED, to: 'old' },
          { edit: 'add', name: EDITED },
          { edit: 'remove', name: 'old' },
        ] as const
        return this.#anew(() => api.call('editBitmaps', disk, { edits: [...edits] }))
      }
      case 'merge': {
        const name = `sum${++this.#names}`
        const edits = [
          { edit: 'add', name, from: EDITED },
          { edit: 'merge', name: VIEWED, into: name },
          { edit: 'remove', name },
        ] as const
        await api.call('editBitmaps', disk, { edits: [...edits] })
        return
      }
      case 'view':
        return this.#view()
      case 'snapshot': {
        const { layers } = await api.call('showDisk', disk, {})
        if (layers.length <= SNAPSHOTS_MAX) await api.call('createSnapshot', disk, { name: `s${++this.#names}` })
        return
      }
      default: {
        const { layers } = await api.call('showDisk', disk, {})
        if (layers.length > 1) await this.#ended((await api.call('commit', disk, {})).id)
      }
    }
  }

  /** An edit after which the bitmap begins with nothing. */
  async #anew(edit: () => Promise<unknown>): Promise<void> {
    const tracked = this.#tracked.get(EDITED) as Tracked
    this.#begin(tracked)
    await edit()
    this.#take(tracked)
  }

  async #view(): Promise<void> {
    const { api } = this.#site.daemon
    const tracked = this.#tracked.get(VIEWED) as Tracked
    this.#begin(tracked)
    let isTaken = false
    try {
      const { id } = await api.call('openView', {}, { disks: [DISK], bitmap: VIEWED })
      tracked.isSure = true
      await pause(this.#random.below(50))
      const verb = this.#random.pick(['finalize', 'cancel'] as const)
      await api.call('sayToJob', { job: id, verb }, {})
      await this.#site.job(id, ({ endedMs }) => endedMs !== undefined)
      isTaken = verb === 'finalize'
    } finally {
      // After a kill either may be so.
      if (isTaken) this.#take(tracked)
      else if (this.#isRunning) tracked.next = undefined
    }
  }

  #begin(tracked: Tracked): void {
    tracked.next = none()
    tracked.isSure = false
    for (const block of this.#inFlight) tracked.next.may[block] = 1
  }

  #take(tracked: Tracked): void {
    tracked.bits = tracked.next as Bits
    tracked.next = undefined
  }

  async #backup(): Promise<void> {
    await this.#backUp(this.#random.pick(this.#repositories))
  }

  async #backUp(repository: string): Promise<JobReply> {
    const { id } = await this.#site.daemon.api.call('backup', {}, { disks: [DISK], repository })
    const ended = await this.#ended(id)
    this.#done.add(repository)
    this.#backups++
    return ended
  }

  async #ended(id: string): Promise<JobReply> {
    const ended = await this.#site.job(id, ({ endedMs }) => endedMs !== undefined)
    assert.equal(ended.error, undefined)
    return ended
  }

  async #check(): Promise<void> {
    const note = `kill ${this.#kills} in ${this.#command}`
    const { api } = this.#site.daemon
    for (const { id, kind, endedMs } of await api.call('listJobs', {}, {}))
      if (endedMs === undefined && kind !== 'view') await this.#ended(id)
    const shown = await api.call('showDisk', { disk: DISK }, {})
    const contexts = [EDITED, VIEWED].map((name) => `qemu:dirty-bitmap:${name}`)
    const guest = await connectNbd(shown.uri as string, { contexts })
    try {
      const content = await this.#checkContent(guest, note)
      await this.#checkBitmaps(guest, note)
      for (const repository of this.#repositories) await this.#checkBackup(repository, content, note)
    } finally {
      await guest.close()
    }
    this.#inFlight.clear()
  }

  /** What the disk has from now on counts as acknowledged. */
  async #checkContent(guest: NbdClient, note: string): Promise<Buffer> {
    const content = Buffer.alloc(SIZE)
    for (let at = 0; at < SIZE; at += MIB) await guest.read(at, MIB, content, at)
    for (let block = 0; block < BLOCKS; block++) {
      const at = block * BLOCK
      const stamp = getUint32(content, at)
      const isWhole = content.compare(content, at, at + BLOCK - 4, at + 4, at + BLOCK) === 0
      const may = [this.#acknowledged[block], ...(this.#inFlight.has(block) ? [this.#issued[block]] : [])]
      assert.ok(isWhole && may.includes(stamp), `${note}: block ${block} holds ${stamp}, not ${may.join(' or ')}`)
      const took = this.#inFlight.has(block) && stamp === this.#issued[block]
      if (took) for (const { bits } of this.#tracked.values()) bits.must[block] = 1
      this.#acknowledged[block] = stamp
    }
    return content
  }

  /** What each has from now on is what it must have. */
  async #checkBitmaps(guest: NbdClient, note: string): Promise<void> {
    for (const [name, tracked] of this.#tracked) {
      const set = new Uint8Array(BLOCKS)
      let at = 0
      await guest.status(`qemu:dirty-bitmap:${name}`, 0, SIZE, (length, status) => {
        set.fill(status & 1, at / BLOCK, (at + length) / BLOCK)
        at += length
        return true
      })
      const wrong = [tracked.bits, ...(tracked.next === undefined ? [] : [tracked.next])].map((bits) =>
        wrongIn(bits, set),
      )
      assert.ok(wrong.includes(undefined), `${note}: bitmap ${name}: ${wrong.join('; or ')}`)
      tracked.bits = { must: set, may: set.slice() }
      tracked.next = undefined
    }
  }

  async #checkBackup(repository: string, content: Buffer, note: string): Promise<void> {
    const hadOne = this.#done.has(repository)
    const { details } = await this.#backUp(repository)
    const [disk] = details['disks'] as readonly { readonly kind: string; readonly reason: string }[]
    assert.ok(!hadOne || disk?.kind === 'incremental', `${note}: a full into ${repository}, since ${disk?.reason}`)
    const opened = await openRepositoryAt(repository)
    const reader = await opened.openBackup(String(details['backup']))
    try {
      const bytes = Buffer.alloc(MIB)
      for (let at = 0; at < SIZE; at += MIB) {
        await reader.disks[0]?.device.read(at, MIB, bytes, 0)
        assert.ok(bytes.equals(content.subarray(at, at + MIB)), `${note}: the backup differs from the disk`)
      }
    } finally {
      await reader.close()
      await opened.close()
    }
  }
}

function none(): Bits {
  return { must: new Uint8Array(BLOCKS), may: new Uint8Array(BLOCKS) }
}

function wrongIn({ must, may }: Bits, set: Uint8Array): string | undefined {
  for (let block = 0; block < BLOCKS; block++) {
    if (must[block] === 1 && set[block] === 0) return `it lacks block ${block}`
    if (may[block] === 0 && set[block] === 1) return `it has block ${block} for no reason`
  }
  return undefined
}

function pause(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms))
}
