// Random lives of a dirty log: guest writes, clears, folds, edits, clean closes, kills, power losses, slots that cannot be written for
// a while. Before operations of the host drawn by lot a copy of it is put aside, and is killed or loses power in several ways: any
// part of what was not synced is kept. What is recovered is held against a model that knows, for each bitmap, the exact bits,
// since when it counts, and where too much is allowed. A guest writes its data only after its mark.
//
// Until an edit is durable there are two worlds, that before and that after it, and recovery may find either; each edit
// numbers the world that it makes in the text of a bitmap. Requests in flight leave their granules uncertain.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { DIRTYLOG_REGION } from '../../src/base/limits.ts'
import type { Bitmap } from '../../src/bitmap/bitmap.ts'
import { BlockError, isBlockError } from '../../src/block/error.ts'
import { Random, seedOfRun } from '../../src/base/random.ts'
import type { HostFile } from '../../src/host/host.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'
import {
  type BitmapChange,
  DirtyLog,
  type DirtyLogFiles,
  type DirtyLogOptions,
  type Recovery,
} from '../../src/dirtylog/dirty-log.ts'

const UNIT = 64 * 1024
const REGIONS = 12
const SIZE = REGIONS * DIRTYLOG_REGION - 3 * UNIT - 1000
const UNITS = Math.ceil(SIZE / UNIT)
/** The simulated disk holds of each unit only the number of the write that made it what it is, in so many bytes. */
const TAG = 4
const AREA_BYTES = 64 * 32
const NAMES = ['area0', 'area1', 'slot0', 'slot1'] as const
const MAIN = 'main'

interface ModelBitmap {
  readonly granule: number
  recording: boolean
  readonly bits: Uint8Array
  /** Of each unit: data of a later version must be marked. */
  readonly since: Uint32Array
  /** Of each granule: when it was last cleared. */
  readonly clearedAt: Uint32Array
}

interface World {
  readonly number: number
  readonly bitmaps: Map<string, ModelBitmap>
}

/** A range that a request in flight may or may not have marked or cleared already. */
interface Range {
  readonly offset: number
  readonly length: number
  /** Of a clear: marks made while it waited, whose granules are set for certain. */
  readonly marked?: Range[]
  /** Of a clear: whether any mark of its granules was asked for while it waited. */
  met?: boolean
}

/** The host just before one of its operations, and what may be recovered from it. */
interface Moment {
  readonly host: SimulatedHost
  readonly worlds: readonly World[]
  readonly uncertain: readonly Range[]
  /** Too much is allowed in regions touched, and in granules cleared, since then. */
  readonly foldedAt: number
  readonly touchedAt: Uint32Array
  /** Whether the log may, and must, be found cleanly closed. */
  readonly mayBeClean: boolean
  readonly mustBeClean: boolean
}

function copyBitmap(bitmap: ModelBitmap): ModelBitmap {
  const { bits, since, clearedAt } = bitmap
  return { ...bitmap, bits: bits.slice(), since: since.slice(), clearedAt: clearedAt.slice() }
}

function copyWorld(world: World, number = world.number): World {
  return { number, bitmaps: new Map(Array.from(world.bitmaps, ([name, bitmap]) => [name, copyBitmap(bitmap)])) }
}

async function openFiles(host: SimulatedHost): Promise<DirtyLogFiles> {
  const open = (name: string): Promise<HostFile> => host.open(`/${name}`, { write: true, create: 'if-missing' })
  const [area0, area1, slot0, slot1] = NAMES.map(open)
  return {
    areas: [(await area0) as HostFile, (await area1) as HostFile],
    slots: [(await slot0) as HostFile, (await slot1) as HostFile],
  }
}

class Life {
  readonly random: Random
  readonly host: SimulatedHost
  readonly moments: Moment[] = []
  /** One of so many moments is kept. */
  readonly #rarity: number
  readonly #spot: number
  #log!: DirtyLog
  #data!: HostFile
  #process = 0
  #worlds: World[] = [{ number: 0, bitmaps: new Map() }]
  #worldNumber = 0
  #time = 1
  #foldedAt = 0
  #touchedAt = new Uint32Array(REGIONS)
  #version = 0
  #versions: number[] = Array.from({ length: UNITS }, () => 0)
  #mayBeClean = false
  #mustBeClean = false
  readonly #uncertain = new Set<Range>()
  /** Guest writes, clears that wait, folds and edits that are under way. */
  readonly #guest = new Set<Promise<void>>()
  readonly #clears = new Set<Promise<void>>()
  readonly #folds = new Set<Promise<void>>()
  #slotFailures = 0
  #isLate = false
  #inTimeFrom = 0
  #fireTimer: (() => void) | undefined

  constructor(seed: number, rarity: number) {
    this.random = new Random(seed)
    this.#rarity = rarity
    this.#spot = this.random.below(UNITS - 10) * UNIT
    const scheduler = this.random.chance(0.7) ? new Random(seed) : undefined
    this.host = new SimulatedHost(scheduler === undefined ? {} : { scheduler })
  }

  async begin(): Promise<void> {
    const files = await openFiles(this.host)
    this.#data = await this.host.open('/data', { write: true, create: 'exclusive' })
    await this.#data.truncate(UNITS * TAG)
    await this.#data.sync()
    await this.host.syncFolder('/')
    this.#log = await DirtyLog.create(files, { ...this.#options(), size: SIZE, areaBytes: AREA_BYTES })
    this.#edit([{ kind: 'add', name: MAIN, granule: UNIT, recording: true, fill: 'none', meta: '0' }], (world) => {
      world.bitmaps.set(MAIN, this.#newBitmap(UNIT, true, 0))
    })
    await Promise.all(this.#folds)
    this.host.beforeOperation = (operation) => {
      if (this.random.chance(1 / this.#rarity)) this.moments.push(this.#moment())
      const mayFail = operation.path.startsWith('/slot') && (operation.kind === 'write' || operation.kind === 'sync')
      if (mayFail && this.#slotFailures > 0) throw new BlockError('io', 'injected')
    }
  }

  async step(): Promise<void> {
    this.#time++
    const kind = this.random.below(42)
    if (kind < 20) await this.#burst()
    else if (kind < 23) await this.#data.sync()
    else if (kind < 28) this.#clear()
    else if (kind < 30) this.#fold()
    else if (kind < 32) this.#fireTimer?.()
    else if (kind < 38) await this.#randomEdit()
    else if (kind < 39) this.#breakSlots()
    else if (kind < 40) await this.#close()
    else await this.#die(kind === 40 ? 'process' : 'host')
    if (this.#slotFailures > 0 && --this.#slotFailures === 0) this.#fold()
    if (this.random.chance(0.3)) await Promise.all([...this.#guest, ...this.#folds])
    if (this.random.chance(0.1)) await new Promise((resolve) => setImmediate(resolve))
  }

  /** Waits for all that is under way; what is in memory must then be what the model has. */
  async end(): Promise<void> {
    this.#slotFailures = 0
    this.#fold()
    await Promise.all([...this.#guest, ...this.#clears, ...this.#folds])
    assert.deepEqual(this.#log.health, { state: 'good' })
    for (const [name, bitmap] of this.#world.bitmaps) {
      const bits = this.#log.bitmaps.get(name)?.bits
      assert.ok(bits !== undefined)
      bitmap.bits.forEach((bit, g) => assert.equal(bits.has(g), bit === 1, `${name}: granule ${g} in memory`))
    }
    this.moments.push(this.#moment())
    this.host.beforeOperation = undefined
    await this.#log.abandon()
  }

  /** The bitmaps as they are in memory. */
  get #world(): World {
    return this.#worlds.at(-1) as World
  }

  #options(): DirtyLogOptions {
    const timer = (_delayMs: number, run: () => void): (() => void) => {
      this.#fireTimer = run
      return () => (this.#fireTimer = undefined)
    }
    return { bootId: this.host.bootId(), timer }
  }

  #moment(): Moment {
    const touchedAt = this.#touchedAt.slice()
    for (const range of this.#uncertain) this.#touch(touchedAt, range)
    return {
      host: this.host.clone({}),
      worlds: this.#worlds.map((world) => copyWorld(world)),
      uncertain: Array.from(this.#uncertain, (range) =>
        range.marked ? { ...range, marked: [...range.marked] } : range,
      ),
      foldedAt: this.#foldedAt,
      touchedAt,
      mayBeClean: this.#mayBeClean,
      mustBeClean: this.#mustBeClean,
    }
  }

  #touch(touchedAt: Uint32Array, { offset, length }: Range): void {
    touchedAt.fill(this.#time, Math.floor(offset / DIRTYLOG_REGION), Math.ceil((offset + length) / DIRTYLOG_REGION))
  }

  /** Some guest writes at once, often in the same place. */
  async #burst(): Promise<void> {
    const writes = Array.from({ length: this.random.between(1, 4) }, () => {
      const offset = this.random.chance(0.6) ? this.#spot + this.random.below(5 * UNIT) : this.random.below(SIZE)
      const longest = this.random.chance(0.1) ? DIRTYLOG_REGION * 2 : UNIT * 2
      return this.#track(this.#guest, this.#write(offset, Math.min(SIZE - offset, this.random.between(1, longest))))
    })
    if (this.random.chance(0.6)) await Promise.all(writes)
  }

  async #write(offset: number, length: number): Promise<void> {
    const process = this.#process
    const range = { offset, length }
    for (const clear of this.#uncertain) if (overlap(clear, range)) clear.met = true
    this.#uncertain.add(range)
    this.#mustBeClean = false
    const pending = this.#log.mark(offset, length)
    if (pending !== undefined) await pending
    if (process !== this.#process) return
    this.#mayBeClean = false
    for (const clear of this.#uncertain)
      if (clear.marked !== undefined && overlap(clear, range)) clear.marked.push(range)
    this.#touch(this.#touchedAt, range)
    for (const { bitmaps } of this.#worlds) {
      for (const bitmap of bitmaps.values()) if (bitmap.recording) setIn(bitmap, offset, length)
    }
    this.#uncertain.delete(range)
    const version = ++this.#version
    const tag = Buffer.alloc(TAG)
    tag.writeUInt32BE(version)
    const written: (Promise<void> | undefined)[] = []
    for (let unit = Math.floor(offset / UNIT); unit * UNIT < offset + length; unit++) {
      this.#versions[unit] = version
      written.push(this.#data.write(unit * TAG, TAG, tag, 0))
    }
    await Promise.all(written)
  }

  /** Clears a range of a bitmap, as a job does that has copied it: not while the guest writes there. */
  #clear(): void {
    const name = this.random.pick([...this.#log.bitmaps.keys()])
    const offset = this.random.chance(0.5) ? this.#spot : this.random.below(SIZE)
    const length = Math.min(SIZE - offset, this.random.between(1, 8 * UNIT))
    const range = { offset, length, marked: [] as Range[] }
    if (this.#clears.size > 0 || [...this.#uncertain].some((busy) => overlap(busy, range))) return
    this.#uncertain.add(range)
    this.#mustBeClean = false
    const pending = this.#log.clear(name, range.offset, range.length)
    if (pending === undefined) {
      this.#uncertain.delete(range)
      this.#cleared(name, range)
      return
    }
    void this.#track(this.#clears, this.#clearWhenDone(name, range, pending))
  }

  async #clearWhenDone(name: string, range: Range, pending: Promise<void>): Promise<void> {
    const process = this.#process
    try {
      await pending
    } catch (error) {
      if (process !== this.#process || !isBlockError(error, 'io')) throw error
      this.#uncertain.delete(range)
      return
    }
    if (process !== this.#process) return
    this.#uncertain.delete(range)
    const { marked = [] } = range
    if (range.met !== true) return this.#cleared(name, range)
    // A mark that came while the clear waited keeps all of it; one that came just after leaves the rest cleared.
    const bits = this.#log.bitmaps.get(name)?.bits
    const granule = bits?.granule ?? UNIT
    for (let offset = wholeStart(granule, range); offset < range.offset + range.length; offset += granule) {
      const whole = { offset, length: Math.min(granule, SIZE - offset) }
      if (bits?.hasAny(offset, 1) === false && !marked.some((each) => overlap(each, whole))) this.#cleared(name, whole)
    }
  }

  #cleared(name: string, range: Range): void {
    // A clear is logged only when no edit is on its way: worlds before this one cannot come back.
    const bitmap = this.#world.bitmaps.get(name)
    if (bitmap === undefined) return
    const end = endOf(bitmap, range)
    for (let g = Math.ceil(range.offset / bitmap.granule); g < end; g++) {
      clearGranule(bitmap, g, this.#versions, this.#time)
    }
  }

  async #randomEdit(): Promise<void> {
    // A drain: nothing is in flight, and what was written is durable, when a bitmap begins.
    await Promise.all([...this.#guest, ...this.#clears])
    await this.#data.sync()
    if (this.random.chance(0.5)) this.#fold()
    const others = [...this.#log.bitmaps.keys()].filter((name) => name !== MAIN)
    const name = this.random.pick(others.length > 0 ? others : [MAIN])
    const kind = this.random.below(6)
    if (kind < 2 && others.length < 3) this.#add(`b${this.#worldNumber}`)
    else if (kind === 2) {
      this.#edit([{ kind: 'clear', name }], (world) => {
        const { granule, recording } = world.bitmaps.get(name) as ModelBitmap
        world.bitmaps.set(name, this.#newBitmap(granule, recording, 0))
      })
    } else if (kind === 3 && name !== MAIN) this.#merge(name)
    else if (kind === 4 && name !== MAIN) {
      const on = this.#log.bitmaps.get(name)?.recording === false
      this.#edit([{ kind: 'record', name, on }], (world) => {
        const bitmap = world.bitmaps.get(name) as ModelBitmap
        bitmap.recording = on
        if (on) bitmap.since.set(this.#versions)
      })
    } else if (kind === 5 && name !== MAIN) {
      this.#edit([{ kind: 'rename', name, to: `${name}r` }], (world) => {
        world.bitmaps.set(`${name}r`, world.bitmaps.get(name) as ModelBitmap)
        world.bitmaps.delete(name)
      })
    }
  }

  #add(name: string): void {
    const granule = this.random.pick([UNIT, 4 * UNIT])
    const recording = this.random.chance(0.7)
    const fill = this.random.pick(['none', 'all'] as const)
    this.#edit([{ kind: 'add', name, granule, recording, fill }], (world) => {
      world.bitmaps.set(name, this.#newBitmap(granule, recording, fill === 'all' ? 1 : 0))
    })
  }

  #merge(name: string): void {
    const isRemoved = this.random.chance(0.5)
    const removal: BitmapChange[] = isRemoved ? [{ kind: 'remove', name }] : []
    this.#edit([{ kind: 'merge', from: name, into: MAIN }, ...removal], (world) => {
      const { granule, bits } = world.bitmaps.get(name) as ModelBitmap
      const main = world.bitmaps.get(MAIN) as ModelBitmap
      bits.forEach((bit, g) => bit === 1 && setIn(main, g * granule, granule))
      if (isRemoved) world.bitmaps.delete(name)
    })
  }

  #newBitmap(granule: number, recording: boolean, bit: 0 | 1): ModelBitmap {
    const length = Math.ceil(SIZE / granule)
    const bits = new Uint8Array(length).fill(bit)
    return { granule, recording, bits, since: Uint32Array.from(this.#versions), clearedAt: new Uint32Array(length) }
  }

  #edit(changes: readonly BitmapChange[], apply: (world: World) => void): void {
    const number = ++this.#worldNumber
    const world = copyWorld(this.#world, number)
    apply(world)
    this.#mustBeClean = false
    const edited = this.#log.edit([...changes, { kind: 'meta', name: MAIN, meta: String(number) }])
    this.#worlds.push(world)
    this.#follow(edited, () => {
      this.#worlds = this.#worlds.filter((each) => each.number >= number)
    })
  }

  #breakSlots(): void {
    this.#slotFailures = this.random.between(1, 3)
    this.#isLate = true
  }

  #fold(): void {
    this.#mustBeClean = false
    this.#follow(this.#log.fold(), () => undefined)
  }

  #follow(fold: Promise<void>, then: () => void): void {
    const [begun, process] = [this.#time, this.#process]
    const work = async (): Promise<void> => {
      try {
        await fold
      } catch (error) {
        if (process !== this.#process || !isBlockError(error, 'io')) throw error
        return
      }
      if (process !== this.#process) return
      this.#mayBeClean = false
      then()
      // The epoch of a fold that failed goes on after the next try: its regions stay hot.
      if (this.#isLate) this.#inTimeFrom = this.#time + 1
      else if (begun >= this.#inTimeFrom) this.#foldedAt = Math.max(this.#foldedAt, begun)
      if (this.#slotFailures === 0) this.#isLate = false
    }
    void this.#track(this.#folds, work())
  }

  async #track(set: Set<Promise<void>>, work: Promise<void>): Promise<void> {
    const process = this.#process
    const tracked = work.catch((error: unknown) => {
      // What is under way when its process dies may end as it likes.
      if (process === this.#process) throw error
    })
    set.add(tracked)
    try {
      await tracked
    } finally {
      set.delete(tracked)
    }
  }

  /** A clean close, and an open that finds it so. */
  async #close(): Promise<void> {
    this.#slotFailures = 0
    await Promise.all([...this.#guest, ...this.#clears, ...this.#folds])
    // During the close both answers are right.
    this.#mayBeClean = true
    await this.#log.close(`stamp ${this.#time}`)
    this.#mustBeClean = true
    const number = this.#world.number
    this.#worlds = this.#worlds.filter((each) => each.number === number)
    const { log, recovery, stamp } = await DirtyLog.open(await openFiles(this.host), this.#options())
    assert.deepEqual([recovery, stamp], ['clean', `stamp ${this.#time}`])
    this.#log = log
    this.#foldedAt = this.#time
  }

  /** The process or the host dies, and life goes on with what is left. */
  async #die(what: 'process' | 'host'): Promise<void> {
    const moment = this.#moment()
    this.#process++
    if (what === 'process') this.host.killProcess()
    else this.host.crash(this.random)
    await Promise.allSettled([...this.#guest, ...this.#clears, ...this.#folds])
    this.#slotFailures = 0
    const hook = this.host.beforeOperation
    this.host.beforeOperation = undefined
    this.#data = await this.host.open('/data', { write: true })
    const opened = await DirtyLog.open(await openFiles(this.host), this.#options())
    this.#log = opened.log
    const found = await readVersions(this.host)
    const world = compare(moment, opened.log, opened.recovery, what, found, `life ${this.random.seed} went on`)
    // What the page cache holds may be older than what a power loss can still bring back: two writes may cross.
    this.#versions = found.map((version, unit) =>
      what === 'host' ? version : Math.max(version, this.#versions[unit] ?? 0),
    )
    for (const [name, bitmap] of world.bitmaps) {
      const bits = this.#log.bitmaps.get(name)?.bits
      bitmap.bits.forEach((bit, g) => {
        const has = bits?.has(g) === true ? 1 : 0
        // A clear that was under way is done.
        if (bit === 1 && has === 0) clearGranule(bitmap, g, this.#versions, this.#time)
        bitmap.bits[g] = has
      })
    }
    this.#worlds = [world]
    this.#uncertain.clear()
    this.#foldedAt = this.#time
    this.#mayBeClean = this.#mustBeClean = opened.recovery === 'clean'
    this.host.beforeOperation = hook
  }
}

function overlap(a: Range, b: Range): boolean {
  return a.offset < b.offset + b.length && b.offset < a.offset + a.length
}

function setIn(bitmap: ModelBitmap, offset: number, length: number): void {
  bitmap.bits.fill(1, Math.floor(offset / bitmap.granule), Math.ceil((offset + length) / bitmap.granule))
}

/** The granule after the last that lies whole in the range. */
function endOf({ granule, bits }: { granule: number; bits: { length: number } }, { offset, length }: Range): number {
  return offset + length >= SIZE ? bits.length : Math.floor((offset + length) / granule)
}

/** From now on only data later than these versions needs its mark. */
function clearGranule(bitmap: ModelBitmap, g: number, versions: readonly number[], time: number): void {
  bitmap.bits[g] = 0
  bitmap.clearedAt[g] = time
  const firstUnit = (g * bitmap.granule) / UNIT
  for (let unit = firstUnit; unit < Math.min(UNITS, firstUnit + bitmap.granule / UNIT); unit++) {
    bitmap.since[unit] = versions[unit] as number
  }
}

/** The first byte of the first granule that begins in the range. */
function wholeStart(granule: number, { offset }: Range): number {
  return Math.ceil(offset / granule) * granule
}

function uncertainGranules(moment: Moment, bitmap: ModelBitmap): Uint8Array {
  const uncertain = new Uint8Array(bitmap.bits.length)
  const put = (value: 0 | 1, { offset, length }: Range): void => {
    uncertain.fill(value, Math.floor(offset / bitmap.granule), Math.ceil((offset + length) / bitmap.granule))
  }
  const clears = moment.uncertain.filter(({ marked }) => marked !== undefined)
  for (const clear of clears) put(1, clear)
  for (const clear of clears) for (const range of clear.marked ?? []) put(0, range)
  for (const range of moment.uncertain) if (range.marked === undefined) put(1, range)
  return uncertain
}

/** Fails unless what was recovered is what the moment allows; returns the world that it is. */
function compare(
  moment: Moment,
  log: DirtyLog,
  recovery: Recovery,
  died: 'process' | 'host',
  versions: readonly number[],
  note: string,
): World {
  const isAllowed = recovery === 'clean' ? moment.mayBeClean : recovery === died && !moment.mustBeClean
  assert.ok(isAllowed, `${note}: recovery says ${recovery}`)
  const meta = log.bitmaps.get(MAIN)?.meta
  const world = moment.worlds.find(({ number }) => String(number) === meta)
  assert.ok(world !== undefined, `${note}: recovered edit ${meta}, which cannot be`)
  assert.deepEqual([...log.bitmaps.keys()].sort(), [...world.bitmaps.keys()].sort(), note)
  for (const [name, bitmap] of world.bitmaps) {
    const logged = log.bitmaps.get(name)
    assert.ok(logged?.recording === bitmap.recording && logged.state === 'valid', note)
    const uncertain = uncertainGranules(moment, bitmap)
    compareBits(moment, bitmap, logged.bits, uncertain, died === 'host', `${note}: "${name}"`)
    if (!bitmap.recording) continue
    for (let unit = 0; unit < UNITS; unit++) {
      const g = Math.floor((unit * UNIT) / bitmap.granule)
      if ((versions[unit] as number) <= (bitmap.since[unit] as number) || uncertain[g] === 1) continue
      assert.ok(logged.bits.has(g), `${note}: "${name}" misses unit ${unit}`)
    }
  }
  return world
}

function compareBits(
  moment: Moment,
  bitmap: ModelBitmap,
  bits: Bitmap,
  uncertain: Uint8Array,
  mayExceed: boolean,
  note: string,
): void {
  const perRegion = DIRTYLOG_REGION / bitmap.granule
  for (let g = 0; g < bitmap.bits.length; g++) {
    const has = bits.has(g) ? 1 : 0
    if (has === bitmap.bits[g] || uncertain[g] === 1) continue
    const isTouched = bitmap.recording && (moment.touchedAt[Math.floor(g / perRegion)] as number) >= moment.foldedAt
    const isCleared = (bitmap.clearedAt[g] as number) >= moment.foldedAt
    assert.ok(mayExceed, `${note} granule ${g} is ${has}`)
    assert.ok(has === 1, `${note} lacks granule ${g}`)
    assert.ok(isTouched || isCleared, `${note} has granule ${g} for no reason`)
  }
}

/** Opens what is left, and compares; leaves the log as a crash would. */
async function check(moment: Moment, host: SimulatedHost, died: 'process' | 'host', note: string): Promise<void> {
  const { log, recovery } = await DirtyLog.open(await openFiles(host), { bootId: host.bootId() })
  compare(moment, log, recovery, died, await readVersions(host), note)
  await log.abandon()
}

async function readVersions(host: SimulatedHost): Promise<number[]> {
  const data = await host.open('/data')
  const tags = Buffer.alloc(UNITS * TAG)
  await data.read(0, tags.length, tags, 0)
  return Array.from({ length: UNITS }, (_, unit) => tags.readUInt32BE(unit * TAG))
}

/** Stops a recovery itself before each of its operations. */
async function checkRecoveryCrashes(moment: Moment, random: Random, note: string): Promise<number> {
  const host = moment.host.clone()
  host.crash(random)
  const stops: SimulatedHost[] = []
  host.beforeOperation = () => stops.push(host.clone())
  await check(moment, host, 'host', note)
  for (const [i, stop] of stops.entries()) {
    stop.crash(random)
    await check(moment, stop, 'host', `${note}, and again before its operation ${i}`)
  }
  return stops.length
}

test('after a kill at any operation the bitmaps are exact, and after a power loss no bit is missing and few are too many', async (t) => {
  const seed = seedOfRun()
  t.diagnostic(`VARVE_SEED=${seed}`)
  const seeds = new Random(seed)
  const wanted = Number(process.env['VARVE_CRASH_STATES'] ?? 24_000)
  let [kills, losses, recoveries] = [0, 0, 0]
  while (kills + losses + recoveries < wanted) {
    const lifeSeed = seeds.next()
    const life = new Life(lifeSeed, 6)
    await life.begin()
    const steps = life.random.between(10, 60)
    for (let step = 0; step < steps; step++) await life.step()
    await life.end()
    for (const [i, moment] of life.moments.entries()) {
      const note = `VARVE_SEED=${seed}, life ${lifeSeed}, before operation ${i}`
      await check(moment, moment.host.clone(), 'process', `${note}, killed`)
      kills++
      for (const keep of ['none', 'all', life.random, life.random, life.random] as const) {
        const host = moment.host.clone()
        host.crash(keep)
        await check(moment, host, 'host', `${note}, power lost`)
        losses++
      }
      if (life.random.chance(0.02)) recoveries += await checkRecoveryCrashes(moment, life.random, `${note}, power lost`)
    }
  }
  console.log(`      ${kills} kills, ${losses} power losses, ${recoveries} power losses during recovery`)
  assert.ok(kills > 0 && losses > 0 && recoveries > 0)
})
