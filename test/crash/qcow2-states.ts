// What a crash may leave of a recorded run, and what must hold of it. The moment before each change of a file is a crash: the
// process is killed there (all that was written is kept) or the power fails (of what no sync covered, any part is kept). Each
// state is opened, read, repaired, checked, written to and closed again.
//
//   durable (a copy that syncs move on)  +  unsynced changes: kept, lost or torn, each  =  state
//
// What a prefix of the changes leaves is the same at every later crash until a sync moves on, so all prefixes are judged when
// every 'kill' is; the others are drawn from a seed of their own, so that each state can be made again without the rest.

import assert from 'node:assert/strict'
import { Random } from '../../src/base/random.ts'
import { roundDown } from '../../src/base/round.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import type { Qcow2Image } from '../../src/format/qcow2/image.ts'
import { repairQcow2 } from '../../src/format/qcow2/repair.ts'
import { INCOMPAT_DIRTY } from '../../src/format/qcow2/spec.ts'
import { type Change, Content, CrashDisk, SECTOR, type Synced } from './crash-disk.ts'
import { recordRepair } from './qcow2-again.ts'
import {
  backedSectors,
  backingOf,
  type Entry,
  IMAGE,
  openImage,
  readAll,
  type Recording,
  REFERENCES,
  SIZE_MAX_FACTOR,
} from './qcow2-run.ts'
import { checkBitmaps, checkSnapshot, type Ids, idsOf, type World, worldOf } from './qcow2-worlds.ts'
import { type Death, DiskModel, fillSectors } from './sector-model.ts'

/** How a state came about. */
export const MANNERS = ['kill', 'torn kill', 'nothing', 'prefix', 'subset', 'all but one', 'only one'] as const
export type Manner = (typeof MANNERS)[number]

/** What became of one unsynced change. */
type Fate = 'lost' | 'kept' | 'torn'

/** What is drawn at a boundary beside the kill and, where it is new, the loss of all. */
const DRAWN: readonly Manner[] = [
  'torn kill',
  ...Array<Manner>(2).fill('prefix'),
  ...Array<Manner>(4).fill('subset'),
  ...Array<Manner>(3).fill('all but one'),
  'only one',
]

export interface State {
  /** Place in the log: entries before it have happened. */
  readonly boundary: number
  /** 0 for the kill, then the others of this boundary. */
  readonly index: number
  readonly manner: Manner
  readonly disk: CrashDisk
  /** Of each unsynced change. */
  readonly fates: readonly Fate[]
}

export interface Finding {
  readonly setting: string
  readonly seed: number
  readonly operations: number
  readonly boundary: number
  readonly index: number
  readonly manner: Manner
  readonly message: string
}

export interface JudgeOptions {
  /** States drawn at each crash, beside the kill and, where it is another state than before, the loss of all. */
  readonly draws: number
  /** No states before this place in the log. */
  readonly from?: number
  /** No more states than this. */
  readonly most?: number
  /** Judge this one alone. */
  readonly only?: { readonly boundary: number; readonly index: number }
  /** Of one state in so many, the repair too is cut short by crashes. */
  readonly again?: number
  /** Sees a state with what Varve reads there: as it was found, and again when Varve has written to it and closed it. */
  readonly look?: Look
  /** Is told of each state what it was made of. */
  readonly tell?: (lines: readonly string[]) => void
}

export type Look = (state: State, content: Uint8Array, when: 'found' | 'closed') => void

export type Counts = Record<Manner, number>

export const NO_STATES = Object.fromEntries(MANNERS.map((manner) => [manner, 0])) as Readonly<Counts>

export function sumOf(counts: Readonly<Counts>): number {
  return MANNERS.reduce((sum, manner) => sum + counts[manner], 0)
}

export interface Verdict {
  readonly counts: Counts
  readonly boundaries: number
  readonly findings: readonly Finding[]
}

const FINDINGS_MAX = 20

/** Judges the states of a recorded run. */
export async function judge(recording: Recording, options: JudgeOptions): Promise<Verdict> {
  const { draws, from = 0, most = Number.POSITIVE_INFINITY, only } = options
  const replay = new Replay(recording)
  const counts = { ...NO_STATES }
  const findings: Finding[] = []
  let boundaries = 0
  let total = 0
  while (total < most && findings.length < FINDINGS_MAX && replay.advance()) {
    const { boundary } = replay
    if (boundary < from) continue
    boundaries++
    for (let index = 0; index <= draws + 1; index++) {
      const isWanted = only === undefined || (only.boundary === boundary && only.index === index)
      const state = isWanted ? replay.build(index) : undefined
      if (state === undefined) continue
      counts[state.manner]++
      total++
      options.tell?.(replay.describe(state))
      try {
        if (options.again !== undefined && (boundary * 13 + index) % options.again === 0)
          total += await judgeRepair(recording, state, replay, counts)
        await replay.examine(state, options.look)
      } catch (error) {
        const { setting, seed, operations } = recording
        const message = error instanceof Error ? (error.stack ?? error.message) : String(error)
        const { manner } = state
        findings.push({ setting: setting.name, seed, operations, boundary, index, manner, message })
      }
      replay.revert()
    }
  }
  return { counts, boundaries, findings }
}

/** Judges the states of the repair of one; gives their number. */
async function judgeRepair(recording: Recording, state: State, replay: Replay, counts: Counts): Promise<number> {
  const verdict = await judge(await recordRepair(recording, state.disk, replay.worldsAfter(state)), { draws: 3 })
  const [finding] = verdict.findings
  if (finding !== undefined)
    assert.fail(`in the repair, at ${finding.boundary}, ${finding.manner} ${finding.index}: ${finding.message}`)
  for (const manner of MANNERS) counts[manner] += verdict.counts[manner]
  return sumOf(verdict.counts)
}

function deathBy(manner: Manner): Death {
  return manner === 'kill' || manner === 'torn kill' ? 'process' : 'host'
}

/** Walks along a recorded run, and makes and judges the states of each moment. */
class Replay {
  readonly #recording: Recording
  readonly #backing: BlockDevice | undefined
  readonly #model: DiskModel
  readonly #durable: Map<string, Content>
  readonly #disk: CrashDisk
  /** What the disk reads as: as found, and now. */
  readonly #found: Uint8Array
  readonly #now: Uint8Array
  #unsynced: { readonly change: Change; readonly place: number }[] = []
  #place = -1
  /** The loss of everything unsynced would be another state than before. */
  #isLossNew = true

  constructor(recording: Recording) {
    const { setting, start } = recording
    this.#recording = recording
    this.#backing = backingOf(setting)
    this.#model = new DiskModel(setting.create.size, backedSectors(setting))
    this.#durable = new Map(Array.from(start, ([name, content]) => [name, new Content(content)]))
    this.#disk = new CrashDisk({ isDevice: setting.isDevice })
    for (const [name, content] of start) this.#disk.files.set(name, new Content(content))
    this.#found = new Uint8Array(setting.create.size * SIZE_MAX_FACTOR)
    this.#now = new Uint8Array(setting.create.size * SIZE_MAX_FACTOR)
  }

  get boundary(): number {
    return this.#place
  }

  /** Goes on to the moment before the next change, or to the end; false when that is behind. */
  advance(): boolean {
    const { log } = this.#recording
    if (this.#place === log.length) return false
    if (this.#place >= 0) this.#happen(log[this.#place] as Entry)
    for (this.#place++; this.#place < log.length; this.#place++) {
      const entry = log[this.#place] as Entry
      if (isChange(entry)) break
      this.#happen(entry)
    }
    return true
  }

  /**
   * Puts the disk into state `index` of this moment: 0 is the kill, 1 the loss of all. Undefined when it would be one that was
   * there before.
   */
  build(index: number): State | undefined {
    const { seed, setting, log } = this.#recording
    const random = new Random(Math.imul(seed + this.#place, 0x9e37_79b1) + Math.imul(index, 0x85eb_ca6b))
    const count = this.#unsynced.length
    let manner: Manner = index === 0 ? 'kill' : 'nothing'
    if (index === 1 && !this.#isLossNew) return undefined
    if (index === 1) this.#isLossNew = false
    if (index > 1) manner = random.pick(DRAWN)
    if (index > 1 && manner !== 'torn kill' && count === 0) return undefined
    const fates = fatesOf(manner, count, random)
    for (const [i, { change }] of this.#unsynced.entries()) this.#apply(change, fates[i] as Fate, random)
    const next = log[this.#place]
    if (manner === 'torn kill') {
      // The last thing that the process did was in part done.
      if (next === undefined || !isChange(next) || next.kind !== 'write' || next.data.length <= SECTOR) {
        this.revert()
        return undefined
      }
      const length = SECTOR * random.between(1, Math.ceil(next.data.length / SECTOR) - 1)
      this.#fileOf(next).write(next.offset, next.data, 0, length)
    } else if (manner !== 'kill' && !setting.isDevice && random.chance(0.25)) this.#resizeFiles(random)
    return { boundary: this.#place, index, manner, disk: this.#disk, fates }
  }

  /** The unsynced changes with their fates, a line each. */
  describe(state: State): string[] {
    return this.#unsynced.map(({ change, place }, i) => {
      const what =
        change.kind === 'truncate'
          ? `to ${change.size}`
          : `${change.offset}+${change.kind === 'write' ? change.data.length : change.length}`
      return `${place} ${change.kind} ${change.file} ${what}: ${state.fates[i]}`
    })
  }

  revert(): void {
    for (const [name, content] of this.#disk.files) content.revert(this.#durable.get(name) as Content)
  }

  /** Which of the recording's worlds the image may be in now. */
  worldsAfter({ manner }: State): (id: number) => boolean {
    const { world } = this.#model
    return (id) => world.allows(id, deathBy(manner), this.#place)
  }

  /** Opens the state as Varve would after the crash, and fails where it is not what it must be. */
  async examine(state: State, look: Look | undefined): Promise<void> {
    const died = deathBy(state.manner)
    let image = await openImage(this.#disk, this.#backing)
    try {
      this.#checkReference(image, died)
      const found = await readAll(image, this.#found)
      const wrong = this.#model.firstWrong(found, died, this.#place)
      assert.equal(wrong, undefined)
      await this.#checkAsFound(image, died)
      this.#checkRaw(found)
      const world = await this.#checkWorld(image, state, found)
      look?.(state, found, 'found')
      if ((state.boundary + state.index) % 4 === 3) {
        await image.close()
        await this.#repairAll('after a repair of everything')
        image = await openImage(this.#disk, this.#backing)
      }
      await image.setAccess('write')
      await expectSame(image, this.#now, found, 'after the repair')
      await this.#checkClean(image, 'after the repair')
      await useAgain(image, this.#now, found, this.#place)
      await image.close()
      image = await openImage(this.#disk, this.#backing)
      assert.equal(image.header.incompatible & INCOMPAT_DIRTY, 0, 'the dirty bit is clear after the close')
      await expectSame(image, this.#now, found, 'after writes and a close')
      await this.#checkClean(image, 'after writes and a close')
      await this.#checkKept(image, world, found, 'after writes and a close')
      await image.close()
      if (image.header.version === 2) await this.#repairAll('after a repair at the end')
      look?.(state, found, 'closed')
    } finally {
      // What a failure left open is forgotten; that it cannot be closed is no finding of its own.
      await image.close().catch(() => undefined)
    }
  }

  async #checkAsFound(image: Qcow2Image, died: Death): Promise<void> {
    if ((image.header.incompatible & INCOMPAT_DIRTY) === 0) return this.#checkClean(image, 'as found, closed cleanly')
    // The repair refuses what may not be; that nothing else is reported before it is looked at now and then.
    if (this.#place % 4 !== 0) return
    const behind = BEHIND[this.#recording.isAfterLoss === true ? 'host' : died]
    const { problems } = await image.check()
    const wrong = problems.filter((problem) => !behind.test(problem))
    assert.deepEqual(wrong, [], 'as found')
  }

  /**
   * Version 2 has no dirty bit, so that nothing is counted anew: a crash may leave clusters that are counted too often, and so
   * copied flags that are not as they should be.
   */
  async #checkClean(image: Qcow2Image, when: string): Promise<void> {
    const { corruptions, leaks, problems } = await image.check()
    if (corruptions + leaks === 0) return
    const isStrict = image.header.version !== 2 || problems.some((problem) => !TOO_HIGH.test(problem))
    if (isStrict) assert.fail(`${corruptions} corruptions and ${leaks} leaks ${when}: ${problems.join('; ')}`)
  }

  /** A raw data file is what the disk reads as. */
  #checkRaw(found: Uint8Array): void {
    const { dataFile, dataFileRaw } = this.#recording.setting.create
    if (dataFile === undefined || dataFileRaw !== true) return
    const raw = this.#now.subarray(0, found.length)
    const data = this.#disk.files.get(`/${dataFile}`) as Content
    data.read(0, raw.length, raw, 0)
    const at = raw.findIndex((byte, i) => byte !== found[i])
    assert.equal(at, -1, `the raw data file holds something else from byte ${at} on`)
  }

  /** Repairs the image as `varve image check -r all` does, and finds nothing wrong after. */
  async #repairAll(when: string): Promise<void> {
    const { corruptions, leaks, problems } = await repairQcow2(this.#disk, IMAGE, 'all')
    if (corruptions + leaks > 0)
      assert.fail(`${corruptions} corruptions and ${leaks} leaks ${when}: ${problems.join('; ')}`)
  }

  async #checkWorld(image: Qcow2Image, state: State, found: Uint8Array): Promise<World> {
    const world = worldOf(image, this.#recording.worlds, this.worldsAfter(state))
    await this.#checkKept(image, world, found, 'as found')
    return world
  }

  /** All bitmaps and, of the snapshots, one. */
  async #checkKept(image: Qcow2Image, world: World, disk: Uint8Array, when: string): Promise<void> {
    if (world.bitmaps.size > 0) await checkBitmaps(image, world, idsOf(disk), when)
    const names = [...world.snapshots.keys()]
    const name = names[this.#place % names.length]
    if (name !== undefined) await checkSnapshot(image, name, world.snapshots.get(name) as Ids, when)
  }

  #checkReference(image: Qcow2Image, died: Death): void {
    if (this.#backing === undefined) return
    const name = image.backingReference?.name ?? ''
    const number = (REFERENCES as readonly string[]).indexOf(name)
    assert.ok(this.#model.reference.allows(number, died, this.#place), `the backing file is ${JSON.stringify(name)}`)
    assert.equal(image.backingReference?.format, 'raw')
  }

  #happen(entry: Entry): void {
    const model = this.#model
    switch (entry.kind) {
      case 'issued':
        return model.add(entry.act, entry.first, entry.count)
      case 'resizing':
        return model.size.add(entry.act)
      case 'referring':
        return model.reference.add(entry.act)
      case 'keeping':
        return model.world.add(entry.act)
      case 'applying':
        return entry.acts.forEach((act, i) => model.add(act, i, 1))
      case 'acked':
        // Of these, and of them alone, an acknowledgement says that they are durable.
        model.size.settle(this.#place + 1)
        model.world.settle(this.#place + 1)
        return model.reference.settle(this.#place + 1)
      case 'seen':
        for (const [i, id] of entry.ids.entries())
          model.add({ id, issued: entry.issued, done: this.#place, isSure: true }, entry.first + i, 1)
        return
      case 'flushed':
        this.#isLossNew = true
        return model.settle(entry.upTo)
      case 'synced':
        return this.#synced(entry)
      case 'flushing':
      case 'killed':
        return
      case 'write':
      case 'punch':
      case 'zero':
      case 'truncate':
        this.#unsynced.push({ change: entry, place: this.#place })
    }
  }

  #synced({ file, upTo }: Synced): void {
    const durable = this.#durable.get(file) as Content
    const work = this.#disk.files.get(file) as Content
    this.#unsynced = this.#unsynced.filter(({ change, place }) => {
      if (change.file !== file || place >= upTo) return true
      durable.apply(change)
      work.apply(change)
      this.#isLossNew = true
      return false
    })
    work.revert(durable)
  }

  #apply(change: Change, fate: Fate, random: Random): void {
    const content = this.#fileOf(change)
    if (fate === 'kept') content.apply(change)
    if (fate !== 'torn') return
    if (change.kind === 'truncate') {
      if (random.chance(0.5)) content.apply(change)
      return
    }
    const length = change.kind === 'write' ? change.data.length : change.length
    const share = random.pick([0.2, 0.5, 0.8])
    for (let at = 0; at < length; ) {
      const stop = Math.min(length, roundDown(change.offset + at, SECTOR) + SECTOR - change.offset)
      if (random.chance(share)) {
        if (change.kind === 'write') content.write(change.offset + at, change.data, at, stop - at)
        else content.clear(change.offset + at, stop - at, change.kind === 'zero')
      }
      at = stop
    }
  }

  /** A file system may have logged another length than what arrived: a shorter one, or a longer one that ends in zeros. */
  #resizeFiles(random: Random): void {
    for (const [name, content] of this.#disk.files) {
      const durable = (this.#durable.get(name) as Content).size
      let longest = Math.max(durable, content.size)
      for (const { change } of this.#unsynced) {
        if (change.file !== name || change.kind === 'punch') continue
        if (change.kind === 'truncate') longest = Math.max(longest, change.size)
        else longest = Math.max(longest, change.offset + (change.kind === 'write' ? change.data.length : change.length))
      }
      const shortest = Math.min(durable, content.size)
      // Compressed clusters may end within a sector.
      const first = Math.ceil(shortest / SECTOR)
      const last = Math.floor(longest / SECTOR)
      if (first <= last) content.truncate(random.between(first, last) * SECTOR)
    }
  }

  #fileOf(change: Change): Content {
    return this.#disk.files.get(change.file) as Content
  }
}

function isChange(entry: Entry): entry is Change {
  return entry.kind === 'write' || entry.kind === 'punch' || entry.kind === 'zero' || entry.kind === 'truncate'
}

function fatesOf(manner: Manner, count: number, random: Random): Fate[] {
  // The changes made last are those whose order matters most.
  const one = random.chance(0.5) ? count - 1 - random.below(Math.min(count, 4)) : random.below(count)
  const share = random.pick([0.2, 0.5, 0.8])
  const fateOf = (i: number): Fate => {
    if (manner === 'kill' || manner === 'torn kill') return 'kept'
    if (manner === 'nothing') return 'lost'
    if (manner === 'only one') return i === one ? 'kept' : 'lost'
    if (manner === 'all but one') return i !== one ? 'kept' : random.chance(0.5) ? 'torn' : 'lost'
    if (manner === 'prefix') return i < one ? 'kept' : i === one ? 'torn' : 'lost'
    if (!random.chance(share)) return 'lost'
    return random.chance(0.25) ? 'torn' : 'kept'
  }
  return Array.from({ length: count }, (_, i) => fateOf(i))
}

/**
 * What may be wrong with a dirty image before its repair: refcounts, and so the copied flags that are held against them; and after a
 * power loss, entries that arrived without what they lead to.
 */
const BEHIND: Readonly<Record<Death, RegExp>> = {
  process: /counted|copied flag/,
  host: /counted|copied flag|(past|after) the end of the file/,
}

const TOO_HIGH = /is counted \d+ times and used|copied flag/

async function expectSame(image: Qcow2Image, into: Uint8Array, expected: Uint8Array, when: string): Promise<void> {
  const now = await readAll(image, into)
  if (Buffer.compare(now, expected) === 0) return
  const at = now.findIndex((byte, i) => byte !== expected[i])
  assert.fail(`sector ${Math.floor(at / SECTOR)} reads otherwise ${when}`)
}

/** Uses the image a little, and has `content` follow. */
async function useAgain(image: Qcow2Image, into: Uint8Array, content: Uint8Array, salt: number): Promise<void> {
  const random = new Random(salt)
  const sectors = content.length / SECTOR
  for (let i = 0; i < 3; i++) {
    const first = random.below(sectors)
    const count = Math.min(sectors - first, random.between(1, 12))
    const piece = content.subarray(first * SECTOR, (first + count) * SECTOR)
    if (i === 1) {
      piece.fill(0)
      await image.zero(first * SECTOR, piece.length, 0)
    } else {
      const bytes = fillSectors(new Uint8Array(piece.length), first, 0xffff_0000 + i)
      piece.set(bytes)
      await image.write(first * SECTOR, bytes.length, bytes, 0, 0)
      if (i === 0) await image.flush()
    }
  }
  await expectSame(image, into, content, 'after writes')
}
