// One random life of a dirty log on a simulated host, with the model that follows it.

import assert from 'node:assert/strict'
import { DIRTYLOG_REGION } from '../../src/base/limits.ts'
import { Random } from '../../src/base/random.ts'
import { BlockError, isBlockError } from '../../src/block/error.ts'
import { type BitmapChange, DirtyLog, type DirtyLogOptions } from '../../src/dirtylog/dirty-log.ts'
import type { HostFile } from '../../src/host/host.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'
import {
  AREA_BYTES,
  MAIN,
  type ModelBitmap,
  type Moment,
  REGIONS,
  type Range,
  SIZE,
  TAG,
  UNIT,
  UNITS,
  type World,
  clearGranule,
  compare,
  copyWorld,
  endOf,
  openFiles,
  overlap,
  readVersions,
  setIn,
  wholeStart,
} from './dirtylog-model.ts'

/** A region that was written is hot for so many folds more. */
const HOT_FOLDS = 3

export class Life {
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
  /** When the last fold was seen to end, and the begins of those before it, the last first: what was written since then it may have made hot. */
  #foldEndedAt = 0
  #hotBegins: readonly number[] = [0]
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
      hotSince: this.#hotBegins.at(-1) as number,
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
      if (clear.isRecording === true && overlap(clear, range)) clear.marked?.push(range)
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
    const isRecording = this.#log.bitmaps.get(name)?.recording === true
    const range = { offset, length, marked: [] as Range[], isRecording }
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
      else if (begun >= this.#inTimeFrom) this.#noteFold(begun)
      if (this.#slotFailures === 0) this.#isLate = false
    }
    void this.#track(this.#folds, work())
  }

  #noteFold(begun: number): void {
    // One that was asked for earlier may have been the same fold.
    if (begun > this.#foldEndedAt) this.#hotBegins = [this.#foldedAt, ...this.#hotBegins].slice(0, HOT_FOLDS)
    this.#foldedAt = Math.max(this.#foldedAt, begun)
    this.#foldEndedAt = this.#time
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
    this.#foldedAt = this.#foldEndedAt = this.#time
    this.#hotBegins = [this.#time]
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
    this.#foldedAt = this.#foldEndedAt = this.#time
    this.#hotBegins = [this.#time]
    this.#mayBeClean = this.#mustBeClean = opened.recovery === 'clean'
    this.host.beforeOperation = hook
  }
}
