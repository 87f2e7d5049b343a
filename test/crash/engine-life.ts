// A life of the whole engine on a simulated host: a guest writes, zeroes and flushes while snapshots, reverts, deletions, commits,
// streams, mirrors, clones and resizes, backups into two repositories, views, and edits of bitmaps go on, and at changes of what is
// stored the host sets aside what a kill or a power loss would leave then, with what must be true of it. Whether it is,
// engine-crash.ts looks.

import assert from 'node:assert/strict'
import { Random } from '../../src/base/random.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import type { DiskRecord } from '../../src/engine/catalog.ts'
import type { HostOperation } from '../../src/host/simulated.ts'
import type { JobStatus } from '../../src/job/job.ts'
import { VIEW_LEASE_MS } from '../../src/base/limits.ts'
import { Lab, LAB_REPOSITORY, readWhole } from '../support/lab.ts'
import { BITMAP_COMMANDS, type BitmapCommand, BitmapCommands, meaningOf } from './bitmap-commands.ts'
import { type Known, TrackedBitmaps, VIEW_BITMAP } from './tracked-bitmaps.ts'
import { type Bounds, BLOCK, checkContent, exactly, VersionedGuest } from './versioned-guest.ts'

export const DISK = 'vm1'
/** Of most disks, and of every fifth: three regions of the dirty log, of which the guest writes to one at a time. */
const BLOCKS = 256
const MANY_BLOCKS = 3 * 1024
const LAYERS_MAX = 5
const CLONES_MAX = 2
const CHECKPOINTS_MAX = 3
/** The two that backups go to, in turn at random. */
export const REPOSITORIES = [LAB_REPOSITORY, '/repository-2'] as const
/** Guest requests that a view may outlast. */
const VIEW_TURNS = 12

/** What a crash takes: nothing, when the process is killed; of what is not synced, all or some, when the power fails. */
export const LOSSES = ['kill', 'all unsynced', 'some unsynced'] as const
export type Loss = (typeof LOSSES)[number]

/** Changes of what is stored. */
const CHANGES: ReadonlySet<HostOperation['kind']> = new Set([
  'create',
  'rename',
  'unlink',
  'syncFolder',
  'sync',
  'write',
  'punch',
  'zero',
  'truncate',
])

export interface Crash {
  readonly lab: Lab
  readonly loss: Loss
  /** The host's operation that it comes before. */
  readonly operation: number
  /** The commands that were under way. */
  readonly during: readonly string[]
  /** What the disk must show, one of several during a revert. */
  readonly content: readonly Bounds[]
  /** From what was acknowledged on, whatever is lost. */
  readonly acknowledged: Bounds
  readonly bitmaps: Known
  /** What each snapshot and clone must show, if it is there. */
  readonly moments: ReadonlyMap<string, Bounds>
  /** The snapshots and clones that must be there. */
  readonly certain: ReadonlySet<string>
  /** Backups that were reported done by then, where they are, and what they show. */
  readonly backups: ReadonlyMap<string, DoneBackup>
}

export interface DoneBackup {
  readonly repository: string
  readonly shown: Buffer
}

export interface LifeOptions {
  readonly seed: number
  readonly steps: number
  /** A crash is set aside at one in so many changes of what is stored. */
  readonly every: number
}

/** Lives it, and returns the crashes. The same seed makes the same again. */
export async function liveAndCrash(options: LifeOptions): Promise<Crash[]> {
  const random = new Random(options.seed)
  // Every other host answers late.
  const lab = await Lab.create(options.seed % 2 === 1 ? new Random(random.next()) : undefined)
  await lab.makeRepository(REPOSITORIES[1])
  const blocks = options.seed % 5 === 4 ? MANY_BLOCKS : BLOCKS
  const format = random.pick(['qcow2', 'qcow2', 'raw'] as const)
  await lab.engine.createDisk(DISK, '/images/vm1.qcow2', format, blocks * BLOCK)
  await lab.engine.editBitmaps(DISK, [{ edit: 'add', name: VIEW_BITMAP }])
  return new Life(lab, random, options, blocks).run()
}

/** Commands of which one is under way at a time. */
interface Lane {
  readonly commands: readonly (readonly [name: string, command: () => Promise<void>])[]
  readonly chance: number
  /** They change which snapshots and clones there are. */
  readonly isOfChain?: true
  /** The name of the command under way. */
  at: string | undefined
  running: Promise<void>
}

class Life {
  readonly #lab: Lab
  readonly #random: Random
  readonly #options: LifeOptions
  readonly #blocks: number
  readonly #guest: VersionedGuest
  readonly #bitmaps: TrackedBitmaps
  readonly #bitmapCommands: BitmapCommands
  /** Where the guest writes, of a disk of many blocks. */
  #spot = 0
  readonly #crashes: Crash[] = []
  readonly #moments = new Map<string, Bounds>()
  readonly #backups = new Map<string, DoneBackup>()
  /** A snapshot that is being taken shows something from here on. */
  #taking: { readonly name: string; readonly since: Bounds } | undefined
  #certain: ReadonlySet<string> = new Set()
  /** During a revert: what the disk shows after it, and the guest's writes held back. */
  #reverted: Bounds | undefined
  #requests = new Set<Promise<void>>()
  #names = 0

  constructor(lab: Lab, random: Random, options: LifeOptions, blocks: number) {
    this.#lab = lab
    this.#random = random
    this.#options = options
    this.#blocks = blocks
    this.#guest = new VersionedGuest(blocks)
    this.#bitmaps = new TrackedBitmaps(lab.disk(DISK), blocks)
    this.#bitmapCommands = new BitmapCommands(random)
  }

  async run(): Promise<Crash[]> {
    const idle = { at: undefined, running: Promise.resolve() }
    const edits = BITMAP_COMMANDS.map((name) => [name, () => this.#editBitmaps(name)] as const)
    const lanes: Lane[] = [
      { commands: Object.entries(this.#commands), chance: 0.3, isOfChain: true, ...idle },
      { commands: [['backup', () => this.#backup()]], chance: 0.04, ...idle },
      { commands: [['view', () => this.#openView()]], chance: 0.03, ...idle },
      { commands: edits, chance: 0.15, ...idle },
    ]
    const { id } = this.#lab.catalog.list('disk').find(({ name }) => name === DISK) as DiskRecord
    const slots = `/home/disks/${id}/slot.`
    this.#lab.host.beforeOperation = ({ kind, number, path }) => {
      if (kind === 'sync' && path.startsWith(slots)) this.#bitmaps.slotSync()
      if (!CHANGES.has(kind) || !this.#random.chance(1 / this.#options.every)) return
      const during = lanes.flatMap(({ at }) => (at === undefined ? [] : [at]))
      this.#crashes.push(this.#crash(number, during))
    }
    for (let step = 0; step < this.#options.steps; step++) {
      await this.#guestStep()
      for (const lane of lanes) if (lane.at === undefined && this.#random.chance(lane.chance)) this.#begin(lane)
    }
    await Promise.all(lanes.map(({ running }) => running))
    await Promise.all(this.#requests)
    this.#lab.host.beforeOperation = undefined
    await this.#lab.stop()
    return this.#crashes
  }

  #crash(operation: number, during: readonly string[]): Crash {
    const random = this.#random
    const loss = random.pick(LOSSES)
    const keep = { kill: undefined, 'all unsynced': 'none', 'some unsynced': random } as const
    const moments = new Map(this.#moments)
    if (this.#taking !== undefined) moments.set(this.#taking.name, this.#guest.since(this.#taking.since)[0] as Bounds)
    const now = this.#guest.bounds(loss === 'kill' ? 'kill' : 'power')
    return {
      lab: this.#lab.fork(keep[loss]),
      loss,
      operation,
      during,
      content: this.#reverted === undefined ? [now] : [now, this.#reverted],
      acknowledged: this.#guest.bounds('kill'),
      bitmaps: this.#bitmaps.known(),
      moments,
      certain: this.#certain,
      backups: new Map(this.#backups),
    }
  }

  async #guestStep(): Promise<void> {
    if (this.#reverted !== undefined) {
      await new Promise((resolve) => setImmediate(resolve))
      return
    }
    const device = this.#lab.guest(DISK)
    if (this.#random.chance(0.02)) this.#spot = this.#random.below(this.#blocks - BLOCKS + 1)
    const first = this.#spot + this.#random.below(BLOCKS - 4)
    const count = this.#random.between(1, 4)
    const kind = this.#random.pick(['write', 'write', 'write', 'write', 'zero', 'flush'] as const)
    const request = {
      write: () => this.#guest.write(device, first, count),
      zero: () => this.#guest.zero(device, first, count, this.#random.chance(0.5)),
      flush: () => this.#guest.flush(device),
    }[kind]()
    const tracked: Promise<void> = request.finally(() => this.#requests.delete(tracked))
    this.#requests.add(tracked)
    // Blocks of two writes in flight could end in either order; one at a time tells more.
    await tracked
    this.#bitmaps.acknowledged()
  }

  #begin(lane: Lane): void {
    const [name, command] = this.#random.pick(lane.commands)
    lane.at = name
    lane.running = command()
      .catch((error: unknown) => {
        // One that has to wait for a job or for a clone changes nothing.
        if (!isBlockError(error, 'busy')) throw error
      })
      .finally(() => {
        lane.at = undefined
        if (lane.isOfChain === true) this.#noteCertain()
      })
    // Told at the end.
    lane.running.catch(() => undefined)
  }

  get #layers(): readonly string[] {
    return this.#lab.engine.showDisk(DISK).layers.map(({ path }) => path)
  }

  get #snapshots(): readonly string[] {
    return this.#lab.engine.listSnapshots(DISK).map(({ name }) => name)
  }

  get #clones(): readonly string[] {
    return this.#lab.engine.listDisks().flatMap(({ name }) => (name === DISK ? [] : [name]))
  }

  /** Between commands: what is there now stays there. */
  #noteCertain(): void {
    this.#certain = new Set([...this.#snapshots, ...this.#clones])
  }

  /** From here on these may be gone after a crash. */
  #mayEnd(names: readonly string[]): void {
    this.#certain = new Set([...this.#certain].filter((name) => !names.includes(name)))
  }

  readonly #commands: Readonly<Record<string, () => Promise<void>>> = {
    snapshot: () => this.#snapshot(),
    'snapshot again': () => this.#snapshot(),
    revert: async () => {
      const [target] = this.#some(this.#snapshots)
      if (target !== undefined) await this.#revert(target)
    },
    delete: async () => {
      const [victim] = this.#some(this.#lab.engine.listSnapshots(DISK).map(({ name }) => name))
      if (victim === undefined) return
      this.#mayEnd([victim])
      const direction = this.#random.pick(['auto', 'down', 'up'] as const)
      const job = await this.#lab.engine.deleteSnapshot(DISK, victim, direction)
      await this.#ended(job.id)
    },
    commit: async () => {
      const layers = this.#layers
      if (layers.length < 2) return
      const from = this.#random.between(1, layers.length - 1)
      const range = [layers[from], layers[this.#random.below(from)]] as const
      this.#mayEnd(this.#lab.engine.planCommit(DISK, ...range))
      await this.#ended((await this.#lab.engine.commit(DISK, ...range)).id)
    },
    stream: async () => {
      const layers = this.#layers
      if (layers.length < 2) return
      const to = this.#random.between(1, layers.length - 1)
      const range = [layers[this.#random.between(-1, to - 2)], layers[to]] as const
      this.#mayEnd(this.#lab.engine.planStream(DISK, ...range))
      await this.#ended((await this.#lab.engine.stream(DISK, ...range)).id)
    },
    mirror: () => this.#mirror(),
    resize: async () => {
      const size = this.#lab.engine.showDisk(DISK).size + this.#random.between(1, 20) * 512
      await this.#lab.engine.resizeDisk(DISK, size)
    },
    clone: async () => {
      const [snapshot] = this.#some(this.#snapshots)
      if (snapshot === undefined || this.#clones.length >= CLONES_MAX) return
      const name = this.#name('c')
      this.#moments.set(name, this.#moments.get(snapshot) as Bounds)
      await this.#lab.engine.clone(DISK, snapshot, name)
    },
    remove: async () => {
      const [clone] = this.#some(this.#clones)
      if (clone === undefined) return
      this.#mayEnd([clone])
      await this.#lab.engine.removeDisk(clone)
    },
  }

  /** One of them; none when there is none. */
  #some(names: readonly string[]): readonly string[] {
    return names.length === 0 ? [] : [this.#random.pick(names)]
  }

  #name(kind: string): string {
    return `${kind}${++this.#names}`
  }

  async #snapshot(): Promise<void> {
    if (this.#layers.length >= LAYERS_MAX) return
    const name = this.#name('s')
    const since = this.#guest.bounds('kill')
    this.#taking = { name, since }
    try {
      await this.#lab.engine.createSnapshot(DISK, name)
      const until = this.#guest.since(since)
      const shown = await this.#show(name)
      checkContent(shown, until, BLOCK, `snapshot ${name}`)
      this.#moments.set(name, exactly(shown, this.#blocks))
    } finally {
      this.#taking = undefined
    }
  }

  async #show(snapshot: string): Promise<Buffer> {
    await this.#lab.engine.exportSnapshot(DISK, snapshot)
    const shown = await readWhole(this.#lab.view(`${DISK}@${snapshot}`) as BlockDevice)
    await this.#lab.engine.unexportSnapshot(DISK, snapshot)
    return shown
  }

  async #revert(target: string): Promise<void> {
    const after = this.#moments.get(target) as Bounds
    this.#reverted = after
    try {
      await Promise.all(this.#requests)
      const keep = this.#random.chance(0.5) && this.#layers.length < LAYERS_MAX ? this.#name('k') : undefined
      if (keep !== undefined) {
        const now = await readWhole(this.#lab.guest(DISK))
        this.#moments.set(keep, exactly(now, this.#blocks))
      }
      await this.#lab.engine.revert(DISK, target, keep)
      const shown = await readWhole(this.#lab.guest(DISK))
      checkContent(shown, [after], BLOCK, `the disk reverted to ${target}`)
      this.#guest.reset(shown)
    } finally {
      this.#reverted = undefined
    }
  }

  async #mirror(): Promise<void> {
    const finish = this.#random.pick(['pivot', 'pivot', 'copy'] as const)
    const sync = this.#layers.length > 1 ? this.#random.pick(['full', 'top'] as const) : 'full'
    if (finish === 'pivot' && sync === 'full')
      this.#mayEnd(this.#lab.engine.listSnapshots(DISK).flatMap(({ name, inChain }) => (inChain ? [name] : [])))
    const { id } = await this.#lab.engine.mirror(DISK, {
      target: `/images/${this.#name('m')}.qcow2`,
      format: 'qcow2',
      sync,
      mode: this.#random.pick(['background', 'write-blocking', 'auto'] as const),
      existing: false,
      finish,
      speed: 0,
    })
    await this.#ended(id)
  }

  async #backup(): Promise<void> {
    const { engine } = this.#lab
    const before = this.#guest.bounds('kill')
    const full = this.#random.chance(0.1)
    const repository = this.#random.pick(REPOSITORIES)
    const [since] = full || this.#random.chance(0.6) ? [] : this.#some(this.#checkpoints)
    if (this.#checkpoints.length >= CHECKPOINTS_MAX) await this.#removeCheckpoint()
    const checkpoint = this.#random.chance(0.4) ? this.#name('p') : undefined
    const marks = { ...(since === undefined ? {} : { since }), ...(checkpoint === undefined ? {} : { checkpoint }) }
    const job = await engine.backup({ disks: [DISK], repository, full, speed: 0, ...marks })
    const until = this.#guest.since(before)
    const ended = await this.#ended(job.id)
    const id = String(ended.details['backup'])
    this.#bitmaps.backupDone(`backup:${await this.#idOf(repository)}`, id)
    if (checkpoint !== undefined) this.#bitmaps.backupDone(`checkpoint:${checkpoint}`, id)
    const shown = await readBackup(this.#lab, id, repository)
    checkContent(shown, until, BLOCK, `backup ${id}`)
    this.#backups.set(id, { repository, shown })
  }

  get #checkpoints(): readonly string[] {
    const { bitmaps } = this.#lab.engine.showDisk(DISK)
    return bitmaps.flatMap(({ name, since }) =>
      name.startsWith('checkpoint:') && since !== undefined ? [name.slice('checkpoint:'.length)] : [],
    )
  }

  /** The oldest one. */
  async #removeCheckpoint(): Promise<void> {
    const name = `checkpoint:${this.#checkpoints[0]}`
    this.#bitmaps.forget(name)
    await this.#lab.engine.editBitmaps(DISK, [{ edit: 'remove', name }])
  }

  async #idOf(repository: string): Promise<string> {
    const opened = await this.#lab.repository(repository)
    await opened.close()
    return opened.id
  }

  async #editBitmaps(command: BitmapCommand): Promise<void> {
    const edits = this.#bitmapCommands.edits(command, this.#bitmaps.world)
    if (edits.length === 0) return
    this.#bitmaps.expect(meaningOf(edits, this.#blocks))
    await this.#lab.engine.editBitmaps(DISK, edits)
  }

  async #openView(): Promise<void> {
    let isTaken = false
    try {
      const { id } = await this.#lab.engine.openView({ disks: [DISK], bitmap: VIEW_BITMAP, leaseMs: VIEW_LEASE_MS })
      for (let turn = this.#random.below(VIEW_TURNS); turn > 0; turn--)
        await new Promise((resolve) => setImmediate(resolve))
      const verb = this.#random.pick(['finalize', 'finalize', 'cancel'] as const)
      if (verb === 'finalize') this.#bitmaps.completing()
      await this.#lab.engine.sayToJob(id, verb)
      const { error } = await this.#lab.engine.jobEnded(id)
      assert.equal(error?.kind, verb === 'finalize' ? undefined : 'cancelled')
      isTaken = verb === 'finalize'
    } finally {
      this.#bitmaps.viewEnded(isTaken)
    }
  }

  async #ended(id: string): Promise<JobStatus> {
    const ended = await this.#lab.engine.jobEnded(id)
    assert.equal(ended.error, undefined)
    return ended
  }
}

/** What a backup of the disk shows. */
export async function readBackup(lab: Lab, id: string, location: string): Promise<Buffer> {
  const repository = await lab.repository(location)
  const reader = await repository.openBackup(id)
  const device = reader.disks[0]?.device
  assert.ok(device !== undefined)
  const shown = await readWhole(device)
  await reader.close()
  await repository.close()
  return shown
}
