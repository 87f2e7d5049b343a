// Random life of an engine on a simulated host that answers late, in an order that the seed makes: guests of several disks write,
// zero, trim and read, while snapshots, reverts, deletions, commits, streams, mirrors, backups, resizes, clones, exports and restarts
// happen, a backup beside whatever else is done to its disk; every disk, snapshot, mirror and backup is held against a plain model. What
// the engine refuses must change nothing.

import assert from 'node:assert/strict'
import { Random } from '../../src/base/random.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import { isBlockError } from '../../src/block/error.ts'
import { Lab, LAB_REPOSITORY } from '../support/lab.ts'
import { assertEqual, ModelDisk, readStamps, SECTOR, stampsOf } from './model-disk.ts'

const SECTORS = 1024
const SECTORS_MAX = 2048
const DISKS_MAX = 4
const SNAPSHOTS_MAX = 6
const REQUESTS_MAX = 6
/** Refusals that random commands meet. */
const REFUSALS = ['busy', 'invalid-argument', 'exists', 'not-found', 'unsupported'] as const

/** Snapshots more often: most of the others need one. */
const COMMANDS = [
  ...([
    'snapshot',
    'snapshot',
    'snapshot',
    'revert',
    'delete',
    'delete',
    'commit',
    'commit',
    'stream',
    'stream',
  ] as const),
  ...(['mirror', 'mirror', 'copy', 'backup', 'backup', 'backup', 'resize', 'clone', 'remove'] as const),
]

/** What changes a disk in a way that its model's moment knows nothing of. */
const UNSEEN: readonly string[] = ['revert', 'resize', 'remove']

/** How often each command was done, and how often refused. */
export type Tally = Map<string, { done: number; refused: number }>

export class EngineModel {
  readonly #lab: Lab
  readonly #random: Random
  readonly #disks = new Map<string, ModelDisk>()
  /** Disks that a command is at, and the command. */
  readonly #busy = new Map<string, { readonly kind: string; readonly done: Promise<void> }>()
  /** Disks that are backed up, beside another command; of these, those whose moment is not taken yet. */
  readonly #backups = new Map<string, Promise<void>>()
  readonly #unmomented = new Set<string>()
  readonly #begun: Promise<void>[] = []
  readonly tally: Tally = new Map()
  #names = 0

  private constructor(lab: Lab, random: Random) {
    this.#lab = lab
    this.#random = random
  }

  static async create(seed: number): Promise<EngineModel> {
    const random = new Random(seed)
    const model = new EngineModel(await Lab.create(new Random(random.next())), random)
    for (const [name, format] of [
      ['a', 'qcow2'],
      ['b', 'raw'],
    ] as const) {
      await model.#lab.engine.createDisk(name, `/images/${name}.${format}`, format, SECTORS * SECTOR)
      model.#disks.set(name, new ModelDisk(model.#lab, random, name, new Uint32Array(SECTORS)))
    }
    return model
  }

  /** Runs so many operations of guests and commands, then checks everything, before and after a restart. */
  async run(operations: number): Promise<void> {
    for (let operation = 0; operation < operations; operation++) {
      const disk = this.#random.pick([...this.#disks.values()])
      if (disk.requests >= REQUESTS_MAX) await disk.idle(false)
      if (this.#random.chance(0.04)) this.#command(disk)
      else if (this.#random.chance(0.01)) await this.#check(disk)
      else if (this.#random.chance(0.002)) await this.#restart()
      else disk.begin()
    }
    await this.#restart()
    await Promise.all(this.#begun)
  }

  async #restart(): Promise<void> {
    await this.#quiet()
    await this.#lab.stop()
    await this.#lab.start()
    for (const disk of this.#disks.values()) await this.#check(disk)
    assert.deepEqual(this.#lab.catalog.list('garbage'), [])
  }

  async #quiet(): Promise<void> {
    await Promise.all(this.#backups.values())
    await Promise.all([...this.#busy.values()].map(({ done }) => done))
    for (const disk of this.#disks.values()) await disk.idle()
  }

  async #check(disk: ModelDisk): Promise<void> {
    await this.#busy.get(disk.name)?.done
    if (!this.#disks.has(disk.name)) return
    await disk.idle()
    await disk.check('check')
    const listed = this.#lab.engine.listSnapshots(disk.name).map(({ name }) => name)
    assert.deepEqual(listed.sort(), [...disk.snapshots.keys()].sort(), `the snapshots of ${disk.name}`)
    for (const name of disk.snapshots.keys()) await this.#checkSnapshot(disk, name)
  }

  async #checkSnapshot(disk: ModelDisk, snapshot: string): Promise<void> {
    assertEqual(
      await this.#show(disk, snapshot),
      disk.snapshots.get(snapshot) as Uint32Array,
      `snapshot ${snapshot} of ${disk.name}`,
    )
  }

  async #show(disk: ModelDisk, snapshot: string): Promise<Uint32Array> {
    await this.#lab.engine.exportSnapshot(disk.name, snapshot)
    const view = this.#lab.view(`${disk.name}@${snapshot}`)
    assert.ok(view !== undefined)
    const stamps = await readStamps(view)
    await this.#lab.engine.unexportSnapshot(disk.name, snapshot)
    return stamps
  }

  #name(): string {
    return `n${++this.#names}`
  }

  /** Begins a command on a disk, unless one is at it that does not go with this; the guests go on. */
  #command(disk: ModelDisk): void {
    const kind = this.#random.pick(COMMANDS)
    const other = this.#busy.get(disk.name)
    if (kind === 'backup') {
      if (this.#backups.has(disk.name) || UNSEEN.includes(other?.kind ?? '')) return
      this.#begin(
        kind,
        () => this.#backUp(disk),
        this.#backups,
        disk.name,
        (done) => done,
      )
      return
    }
    if (other !== undefined || (UNSEEN.includes(kind) && this.#unmomented.has(disk.name))) return
    this.#begin(
      kind,
      () => this.#commands[kind](disk),
      this.#busy,
      disk.name,
      (done) => ({ kind, done }),
    )
  }

  #begin<T>(
    kind: string,
    command: () => Promise<boolean>,
    places: Map<string, T>,
    name: string,
    place: (done: Promise<void>) => T,
  ): void {
    const count = this.tally.get(kind) ?? { done: 0, refused: 0 }
    this.tally.set(kind, count)
    const work = async (): Promise<void> => {
      try {
        if (await command()) count.done++
      } catch (error) {
        if (!REFUSALS.some((refusal) => isBlockError(error, refusal))) throw error
        count.refused++
      } finally {
        places.delete(name)
      }
    }
    const done = work()
    done.catch(() => undefined)
    places.set(name, place(done))
    this.#begun.push(done)
  }

  async #backUp(disk: ModelDisk): Promise<boolean> {
    this.#unmomented.add(disk.name)
    let id = ''
    let check: (shown: Uint32Array, note: string) => void
    try {
      check = await disk.moment(async () => {
        const request = { disks: [disk.name], repository: LAB_REPOSITORY, full: this.#random.chance(0.2) }
        id = (await this.#lab.engine.backup(request)).id
      })
    } finally {
      this.#unmomented.delete(disk.name)
    }
    await this.#ended(id)
    const backup = String(this.#lab.engine.showJob(id).details['backup'])
    const repository = await this.#lab.repository()
    const reader = await repository.openBackup(backup)
    check(await readStamps((reader.disks[0] as { readonly device: BlockDevice }).device), `${backup} of ${disk.name}`)
    await reader.close()
    await repository.close()
    return true
  }

  /** Each command, on a disk that no other command is at; false when there is nothing it could be done to. */
  readonly #commands = {
    snapshot: async (disk: ModelDisk): Promise<boolean> => {
      if (disk.snapshots.size >= SNAPSHOTS_MAX) return false
      const others = [...this.#disks.values()].filter(
        (other) => this.#random.chance(0.3) && !this.#busy.has(other.name) && other.snapshots.size < SNAPSHOTS_MAX,
      )
      const disks = [...new Set([disk, ...others])]
      const name = this.#name()
      const free = Promise.withResolvers<void>()
      for (const other of disks.slice(1)) this.#busy.set(other.name, { kind: 'snapshot', done: free.promise })
      const together = (rest: readonly ModelDisk[]): Promise<unknown> => {
        const [first, ...others] = rest
        if (first === undefined) {
          const names = disks.map((one) => one.name)
          return names.length === 1
            ? this.#lab.engine.createSnapshot(disk.name, name)
            : this.#lab.engine.createSnapshots(names, name)
        }
        return first.moment(() => together(others)).then((check) => checks.push([first, check]))
      }
      const checks: [ModelDisk, (shown: Uint32Array, note: string) => void][] = []
      try {
        await together(disks)
        for (const [one, check] of checks) {
          const shown = await this.#show(one, name)
          check(shown, `new snapshot ${name} of ${one.name}`)
          one.snapshots.set(name, shown)
        }
      } finally {
        for (const other of disks.slice(1)) this.#busy.delete(other.name)
        free.resolve()
      }
      return true
    },
    revert: async (disk: ModelDisk): Promise<boolean> => {
      const target = this.#pickSnapshot(disk)
      if (target === undefined) return false
      disk.isHeld = true
      try {
        await disk.idle()
        const keep = this.#random.chance(0.5) && disk.snapshots.size < SNAPSHOTS_MAX ? this.#name() : undefined
        await this.#lab.engine.revert(disk.name, target, keep)
        if (keep !== undefined) disk.snapshots.set(keep, disk.now)
        // A revert keeps the size.
        const now = new Uint32Array(disk.now.length)
        now.set(disk.snapshots.get(target) as Uint32Array)
        disk.now = now
      } finally {
        disk.isHeld = false
      }
      return true
    },
    delete: async (disk: ModelDisk): Promise<boolean> => {
      const victim = this.#pickSnapshot(disk)
      if (victim === undefined) return false
      const direction = this.#random.pick(['auto', 'auto', 'down', 'up'] as const)
      await this.#ended((await this.#lab.engine.deleteSnapshot(disk.name, victim, direction)).id)
      disk.snapshots.delete(victim)
      return true
    },
    commit: async (disk: ModelDisk): Promise<boolean> => {
      const paths = this.#lab.engine.showDisk(disk.name).layers.map(({ path }) => path)
      const from = this.#random.below(paths.length)
      const range = [paths[from], paths[this.#random.below(from + 1)]] as const
      const ends = this.#lab.engine.planCommit(disk.name, ...range)
      await this.#ended((await this.#lab.engine.commit(disk.name, ...range)).id)
      for (const name of ends) disk.snapshots.delete(name)
      return true
    },
    stream: async (disk: ModelDisk): Promise<boolean> => {
      const paths = this.#lab.engine.showDisk(disk.name).layers.map(({ path }) => path)
      const to = this.#random.below(paths.length)
      const range = [this.#random.chance(0.4) ? undefined : paths[this.#random.below(to + 1)], paths[to]] as const
      const ends = this.#lab.engine.planStream(disk.name, ...range)
      await this.#ended((await this.#lab.engine.stream(disk.name, ...range)).id)
      for (const name of ends) disk.snapshots.delete(name)
      return true
    },
    mirror: async (disk: ModelDisk): Promise<boolean> => {
      const target = `/images/${this.#name()}.qcow2`
      const { id } = await this.#lab.engine.mirror(disk.name, {
        target,
        format: 'qcow2',
        sync: this.#random.pick(['full', 'top'] as const),
        mode: this.#random.pick(['background', 'write-blocking', 'auto'] as const),
        existing: false,
        finish: 'pivot',
      })
      await this.#ended(id)
      const left = new Set(this.#lab.engine.listSnapshots(disk.name).map(({ name }) => name))
      for (const name of disk.snapshots.keys()) if (!left.has(name)) disk.snapshots.delete(name)
      return true
    },
    copy: async (disk: ModelDisk): Promise<boolean> => {
      const target = `/images/${this.#name()}.raw`
      const check = await disk.moment(async () => {
        const { id } = await this.#lab.engine.mirror(disk.name, {
          target,
          format: 'raw',
          sync: 'full',
          mode: this.#random.pick(['background', 'write-blocking', 'auto'] as const),
          existing: false,
          finish: 'copy',
        })
        await this.#ended(id)
      })
      const file = await this.#lab.host.open(target, {})
      const bytes = Buffer.alloc(file.size())
      await file.read(0, bytes.length, bytes, 0)
      await file.close()
      await this.#lab.host.unlink(target)
      check(stampsOf(bytes, target), `a copy of ${disk.name}`)
      return true
    },
    resize: async (disk: ModelDisk): Promise<boolean> => {
      const sectors = disk.now.length + this.#random.between(-20, 80)
      if (sectors > SECTORS_MAX) return false
      disk.isHeld = true
      try {
        await disk.idle()
        await this.#lab.engine.resizeDisk(disk.name, sectors * SECTOR)
        const now = new Uint32Array(sectors)
        now.set(disk.now)
        disk.now = now
      } finally {
        disk.isHeld = false
      }
      return true
    },
    clone: async (disk: ModelDisk): Promise<boolean> => {
      const snapshot = this.#pickSnapshot(disk)
      if (snapshot === undefined || this.#disks.size >= DISKS_MAX) return false
      const name = this.#name()
      await this.#lab.engine.clone(disk.name, snapshot, name)
      const content = disk.snapshots.get(snapshot) as Uint32Array
      const clone = new ModelDisk(this.#lab, this.#random, name, content.slice())
      clone.snapshots.set(snapshot, content)
      this.#disks.set(name, clone)
      return true
    },
    remove: async (disk: ModelDisk): Promise<boolean> => {
      if (disk.name === 'a' || disk.name === 'b') return false
      disk.isHeld = true
      try {
        await disk.idle()
        await this.#lab.engine.removeDisk(disk.name)
        this.#disks.delete(disk.name)
      } finally {
        disk.isHeld = false
      }
      return true
    },
  }

  #pickSnapshot(disk: ModelDisk): string | undefined {
    return disk.snapshots.size === 0 ? undefined : this.#random.pick([...disk.snapshots.keys()])
  }

  async #ended(id: string): Promise<void> {
    const { error } = await this.#lab.engine.jobEnded(id)
    assert.equal(error, undefined, `job ${id}: ${error?.message}`)
  }
}
