// Random lives of a dirty log, stopped before every operation of the host: by a kill, and by power losses that each keep another
// part of what was not synced. A guest writes data, and only after its mark. What is recovered is held against a model
// that knows, for each bitmap, the exact bits, since when it counts, and where too much is allowed.
//
// Until an edit is durable there are two worlds, that before and that after it, and recovery may find either; each edit
// numbers the world that it makes in the text of a bitmap. Requests in flight leave their granules uncertain.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { DIRTYLOG_REGION } from '../../src/base/limits.ts'
import { Random, seedOfRun } from '../../src/base/random.ts'
import type { HostFile } from '../../src/host/host.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'
import { type BitmapChange, DirtyLog, type DirtyLogFiles, type Recovery } from '../../src/dirtylog/dirty-log.ts'

const UNIT = 64 * 1024
const REGIONS = 12
const SIZE = REGIONS * DIRTYLOG_REGION - 3 * UNIT - 1000
const UNITS = Math.ceil(SIZE / UNIT)
const AREA_BYTES = 24 * 32
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
}

/** The host just before one of its operations, and what may be recovered from it. */
interface Moment {
  readonly host: SimulatedHost
  readonly worlds: readonly World[]
  readonly uncertain: readonly Range[]
  /** Too much is allowed in regions touched, and in granules cleared, since then. */
  readonly foldedAt: number
  readonly touchedAt: Uint32Array
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
  log!: DirtyLog
  #data!: HostFile
  #worlds: World[] = [{ number: 0, bitmaps: new Map() }]
  #worldNumber = 0
  #time = 1
  #foldedAt = 0
  readonly #touchedAt = new Uint32Array(REGIONS)
  #version = 0
  readonly #versions = new Uint32Array(UNITS)
  readonly #uncertain = new Set<Range>()
  readonly #guest = new Set<Promise<void>>()
  readonly #waitingClears = new Set<Promise<void>>()
  readonly #folds = new Set<Promise<void>>()
  #fireTimer: (() => void) | undefined

  constructor(seed: number) {
    this.random = new Random(seed)
    const scheduler = this.random.chance(0.4) ? new Random(seed) : undefined
    this.host = new SimulatedHost(scheduler === undefined ? {} : { scheduler })
  }

  async begin(): Promise<void> {
    const timer = (_delayMs: number, run: () => void): (() => void) => {
      this.#fireTimer = run
      return () => (this.#fireTimer = undefined)
    }
    const files = await openFiles(this.host)
    this.#data = await this.host.open('/data', { write: true, create: 'exclusive' })
    await this.#data.truncate(SIZE)
    await this.#data.sync()
    await this.host.syncFolder('/')
    this.log = await DirtyLog.create(files, { size: SIZE, bootId: this.host.bootId(), areaBytes: AREA_BYTES, timer })
    this.#edit([{ kind: 'add', name: MAIN, granule: UNIT, recording: true, fill: 'none', meta: '0' }], (world) => {
      world.bitmaps.set(MAIN, this.#newBitmap(UNIT, true, 0))
    })
    await Promise.all(this.#folds)
    this.host.beforeOperation = () => this.moments.push(this.#moment())
  }

  async step(): Promise<void> {
    this.#time++
    const kind = this.random.below(20)
    if (kind < 11) await this.#burst()
    else if (kind < 13) await this.#data.sync()
    else if (kind < 16) this.#clear()
    else if (kind < 17) this.#follow(this.log.fold())
    else if (kind < 18) this.#fireTimer?.()
    else await this.#randomEdit()
    if (this.random.chance(0.3)) await Promise.all([...this.#guest, ...this.#folds])
    if (this.random.chance(0.1)) await new Promise((resolve) => setImmediate(resolve))
  }

  async end(): Promise<void> {
    await Promise.all([...this.#guest, ...this.#waitingClears, ...this.#folds])
    this.moments.push(this.#moment())
    assert.deepEqual(this.log.health, { state: 'good' })
    for (const [name, bitmap] of (this.#worlds.at(-1) as World).bitmaps) {
      const bits = this.log.bitmaps.get(name)?.bits
      assert.ok(bits !== undefined)
      bitmap.bits.forEach((bit, index) =>
        assert.equal(bits.has(index), bit === 1, `${name}: granule ${index} in memory`),
      )
    }
    this.host.beforeOperation = undefined
    await this.log.abandon()
  }

  #moment(): Moment {
    const touchedAt = this.#touchedAt.slice()
    for (const range of this.#uncertain) this.#touch(touchedAt, range)
    return {
      host: this.host.clone({}),
      worlds: this.#worlds.map((world) => copyWorld(world)),
      uncertain: [...this.#uncertain],
      foldedAt: this.#foldedAt,
      touchedAt,
    }
  }

  #touch(touchedAt: Uint32Array, { offset, length }: Range): void {
    touchedAt.fill(this.#time, Math.floor(offset / DIRTYLOG_REGION), Math.ceil((offset + length) / DIRTYLOG_REGION))
  }

  /** Some guest writes at once. */
  async #burst(): Promise<void> {
    const writes = Array.from({ length: this.random.between(1, 4) }, () => {
      const offset = this.random.below(SIZE)
      const length = Math.min(
        SIZE - offset,
        this.random.chance(0.1) ? DIRTYLOG_REGION * 2 : this.random.between(1, UNIT * 2),
      )
      const work = this.#write(offset, length)
      this.#guest.add(work)
      return work.then(() => this.#guest.delete(work))
    })
    if (this.random.chance(0.7)) await Promise.all(writes)
  }

  async #write(offset: number, length: number): Promise<void> {
    const range = { offset, length }
    this.#uncertain.add(range)
    const pending = this.log.mark(offset, length)
    if (pending !== undefined) await pending
    this.#touch(this.#touchedAt, range)
    for (const { bitmaps } of this.#worlds) {
      for (const { granule, recording, bits } of bitmaps.values()) {
        if (recording) bits.fill(1, Math.floor(offset / granule), Math.ceil((offset + length) / granule))
      }
    }
    this.#uncertain.delete(range)
    const version = ++this.#version
    const tag = Buffer.alloc(4)
    tag.writeUInt32BE(version)
    const written: (Promise<void> | undefined)[] = []
    for (let unit = Math.floor(offset / UNIT); unit * UNIT < offset + length; unit++) {
      this.#versions[unit] = version
      written.push(this.#data.write(unit * UNIT, 4, tag, 0))
    }
    await Promise.all(written)
  }

  #clear(): void {
    const name = this.random.pick([...this.log.bitmaps.keys()])
    const offset = this.random.below(SIZE)
    const length = Math.min(SIZE - offset, this.random.between(1, 8 * UNIT))
    // A job clears what it has copied, and never while the guest writes there.
    const isBusy = [...this.#uncertain].some((range) => overlap(range, { offset, length }))
    if (isBusy || this.#waitingClears.size > 0) return
    const range = { offset, length }
    this.#uncertain.add(range)
    const before = this.#version
    const pending = this.log.clear(name, offset, length)
    if (pending === undefined) {
      this.#cleared(name, range)
      return
    }
    const versions = this.#versions.slice()
    const work = pending.then(() => {
      this.#waitingClears.delete(work)
      // Marks that came while it waited keep all of it.
      const bits = this.log.bitmaps.get(name)?.bits
      const model = this.#worlds.at(-1)?.bitmaps.get(name)
      const first = model === undefined ? 0 : Math.ceil(offset / model.granule)
      const isKept =
        bits !== undefined &&
        model !== undefined &&
        model.bits.some((bit, g) => g >= first && bit === 1 && bits.has(g) && g < endOf(model, range))
      if (!isKept) return this.#cleared(name, range)
      const touched = this.#versions.some(
        (version, unit) => version > before && overlap(range, { offset: unit * UNIT, length: UNIT }),
      )
      assert.ok(touched || versions.length === 0, 'a clear that nothing overlapped is done')
      this.#uncertain.delete(range)
      return undefined
    })
    this.#waitingClears.add(work)
  }

  #cleared(name: string, range: Range): void {
    this.#uncertain.delete(range)
    for (const { bitmaps } of this.#worlds) {
      const bitmap = bitmaps.get(name)
      if (bitmap === undefined) continue
      for (let g = Math.ceil(range.offset / bitmap.granule); g < endOf(bitmap, range); g++) {
        bitmap.bits[g] = 0
        bitmap.clearedAt[g] = this.#time
      }
      const units = { granule: UNIT, bits: this.#versions }
      for (let unit = Math.ceil(range.offset / UNIT); unit < endOf(units, range); unit++) {
        if (bitmap.bits[Math.floor((unit * UNIT) / bitmap.granule)] === 0)
          bitmap.since[unit] = this.#versions[unit] as number
      }
    }
  }

  async #randomEdit(): Promise<void> {
    // A drain: nothing is in flight, and what was written is durable, when a bitmap begins.
    await Promise.all([...this.#guest, ...this.#waitingClears])
    await this.#data.sync()
    const others = [...this.log.bitmaps.keys()].filter((name) => name !== MAIN)
    const name = this.random.pick(others.length > 0 ? others : [MAIN])
    const kind = this.random.below(6)
    if (kind < 2 && others.length < 3) this.#add(`b${this.#worldNumber}`)
    else if (kind === 2) {
      this.#edit([{ kind: 'clear', name }], (world) => {
        const { granule, recording } = world.bitmaps.get(name) as ModelBitmap
        world.bitmaps.set(name, this.#newBitmap(granule, recording, 0))
      })
    } else if (kind === 3 && name !== MAIN) {
      this.#edit(
        [
          { kind: 'merge', from: name, into: MAIN },
          { kind: 'remove', name },
        ],
        (world) => {
          const from = world.bitmaps.get(name) as ModelBitmap
          from.bits.forEach(
            (bit, g) => bit === 1 && setIn(world.bitmaps.get(MAIN) as ModelBitmap, g * from.granule, from.granule),
          )
          world.bitmaps.delete(name)
        },
      )
    } else if (kind === 4 && name !== MAIN) {
      const on = this.log.bitmaps.get(name)?.recording === false
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

  #newBitmap(granule: number, recording: boolean, bit: 0 | 1): ModelBitmap {
    const length = Math.ceil(SIZE / granule)
    return {
      granule,
      recording,
      bits: new Uint8Array(length).fill(bit),
      since: this.#versions.slice(),
      clearedAt: new Uint32Array(length),
    }
  }

  #edit(changes: readonly BitmapChange[], apply: (world: World) => void): void {
    const number = ++this.#worldNumber
    const world = copyWorld(this.#worlds.at(-1) as World, number)
    apply(world)
    const work = this.log.edit([...changes, { kind: 'meta', name: MAIN, meta: String(number) }])
    this.#worlds.push(world)
    this.#follow(
      work.then(() => {
        this.#worlds = this.#worlds.filter((each) => each.number >= number)
      }),
    )
  }

  #follow(fold: Promise<void>): void {
    const begun = this.#time
    const work = fold.then(() => {
      this.#folds.delete(work)
      this.#foldedAt = Math.max(this.#foldedAt, begun)
    })
    this.#folds.add(work)
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

function uncertainGranules(moment: Moment, bitmap: ModelBitmap): Uint8Array {
  const uncertain = new Uint8Array(bitmap.bits.length)
  for (const { offset, length } of moment.uncertain) {
    uncertain.fill(1, Math.floor(offset / bitmap.granule), Math.ceil((offset + length) / bitmap.granule))
  }
  return uncertain
}

/** Opens what is left, and compares; the log is left as a crash would. */
async function check(moment: Moment, host: SimulatedHost, expected: Recovery, note: string): Promise<void> {
  const { log, recovery } = await DirtyLog.open(await openFiles(host), { bootId: host.bootId() })
  assert.equal(recovery, expected, note)
  const world = moment.worlds.find(({ number }) => String(number) === log.bitmaps.get(MAIN)?.meta)
  assert.ok(world !== undefined, `${note}: recovered edit ${log.bitmaps.get(MAIN)?.meta}, which cannot be`)
  assert.deepEqual([...log.bitmaps.keys()].sort(), [...world.bitmaps.keys()].sort(), note)
  const versions = await readVersions(host)
  for (const [name, bitmap] of world.bitmaps) {
    const bits = log.bitmaps.get(name)?.bits
    assert.ok(bits !== undefined && log.bitmaps.get(name)?.recording === bitmap.recording, note)
    const uncertain = uncertainGranules(moment, bitmap)
    const perRegion = DIRTYLOG_REGION / bitmap.granule
    for (let g = 0; g < bitmap.bits.length; g++) {
      const has = bits.has(g) ? 1 : 0
      if (has === bitmap.bits[g] || uncertain[g] === 1) continue
      const isTouched = bitmap.recording && (moment.touchedAt[Math.floor(g / perRegion)] as number) >= moment.foldedAt
      const isCleared = (bitmap.clearedAt[g] as number) >= moment.foldedAt
      assert.ok(expected !== 'process', `${note}: "${name}" granule ${g} is ${has}`)
      assert.ok(has === 1, `${note}: "${name}" lacks granule ${g}`)
      assert.ok(isTouched || isCleared, `${note}: "${name}" has granule ${g} for no reason`)
    }
    if (!bitmap.recording) continue
    versions.forEach((version, unit) => {
      const isNewer = version > (bitmap.since[unit] as number)
      assert.ok(
        !isNewer || bits.has(Math.floor((unit * UNIT) / bitmap.granule)),
        `${note}: "${name}" misses unit ${unit}`,
      )
    })
  }
  await log.abandon()
}

async function readVersions(host: SimulatedHost): Promise<Uint32Array> {
  const data = await host.open('/data')
  const versions = new Uint32Array(UNITS)
  const tag = Buffer.alloc(4)
  const pieces: number[] = []
  await data.extents(0, SIZE, (length, extent) => pieces.push(length, extent) > 0)
  for (let i = 0, at = 0; i < pieces.length; at += pieces[i] as number, i += 2) {
    if (pieces[i + 1] !== 0) continue
    for (let unit = Math.ceil(at / UNIT); unit * UNIT < at + (pieces[i] as number); unit++) {
      await data.read(unit * UNIT, 4, tag, 0)
      versions[unit] = tag.readUInt32BE(0)
    }
  }
  return versions
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
    const life = new Life(lifeSeed)
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
