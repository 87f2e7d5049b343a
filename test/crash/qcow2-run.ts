// Random operations on a qcow2 image, recorded: one log of what reached the page cache, which syncs completed, and what was asked
// of the image and acknowledged. Requests overlap in time and place; the process is killed now and then, and the image is
// repaired and goes on, so that later states are those of an image with a past. What crashes leave of it is judged by
// qcow2-states.ts.

import { mock } from 'node:test'
import zlib from 'node:zlib'
import { assert } from '../../src/base/assert.ts'
import { Random } from '../../src/base/random.ts'
import { type BlockDevice, MAY_UNMAP, type Pending } from '../../src/block/device.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { type CreateOptions, createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { type Change, Content, CrashDisk, SECTOR, type Synced } from './crash-disk.ts'
import { actsFor, bitmapStep, FIRST_WORLD, idsOf, snapshotStep, type World } from './qcow2-worlds.ts'
import { type Act, BELOW, fillSectors, idOf, ZEROS } from './sector-model.ts'

export const IMAGE = '/disk.qcow2'

/** Names of one and the same backing file; the second one does not fit in the place of the first. */
export const REFERENCES = ['base', './base', './././././base'] as const

export interface Setting {
  readonly name: string
  /** Operations complete late and out of order, and more of them are in flight. */
  readonly isLate: boolean
  readonly isDevice: boolean
  readonly hasBacking: boolean
  /** Internal snapshots and persistent bitmaps are used too. */
  readonly keeps: boolean
  /** The disk becomes smaller too. */
  readonly shrinks: boolean
  readonly create: Omit<CreateOptions, 'backing'>
}

export type Marker =
  | { readonly kind: 'issued'; readonly act: Act; readonly first: number; readonly count: number }
  | { readonly kind: 'resizing' | 'referring' | 'keeping' | 'acked'; readonly act: Act }
  /** The whole disk becomes something else, an act for each sector. */
  | { readonly kind: 'applying'; readonly acts: readonly Act[] }
  /** What a read after a trim or a restart found, sector by sector. */
  | { readonly kind: 'seen'; readonly first: number; readonly ids: readonly number[]; readonly issued: number }
  | { readonly kind: 'flushing' | 'killed' }
  /** All that was acknowledged before entry `upTo` is flushed. */
  | { readonly kind: 'flushed'; readonly upTo: number }

export type Entry = Change | Synced | Marker

export interface Recording {
  readonly setting: Setting
  readonly seed: number
  readonly log: readonly Entry[]
  /** What the image kept beside the disk, one after the other. */
  readonly worlds: readonly World[]
  /** The files when the log begins, all durable. */
  readonly start: ReadonlyMap<string, Content>
  readonly operations: number
  /** The power failed before it begins, so that even a kill may leave what only a power loss leaves. */
  readonly isAfterLoss?: boolean
}

/** How large a disk may grow, in times its first size. */
export const SIZE_MAX_FACTOR = 2
/** Host block devices have so many clusters, and not less than a few megabytes. */
const DEVICE_CLUSTERS = 1024
const DEVICE_MIN = 4 * 1024 * 1024

/** What lies below the image: the first half is data. */
export function backingOf(setting: Setting): MemoryDevice | undefined {
  if (!setting.hasBacking) return undefined
  const device = new MemoryDevice(setting.create.size - 3 * SECTOR)
  const data = fillSectors(new Uint8Array(backedSectors(setting) * SECTOR), 0, BELOW)
  void device.write(0, data.length, data, 0, 0)
  return device
}

/** How many sectors from the start of the disk show data of the backing file. */
export function backedSectors(setting: Setting): number {
  return setting.hasBacking ? Math.floor(setting.create.size / SECTOR / 2) : 0
}

/** Reads the whole disk, into the buffer where it fits. */
export async function readAll(image: BlockDevice, into?: Uint8Array): Promise<Uint8Array> {
  const { size } = image
  const bytes = into !== undefined && into.length >= size ? into.subarray(0, size) : new Uint8Array(size)
  await image.read(0, size, bytes, 0)
  return bytes
}

export async function openImage(disk: CrashDisk, backing: BlockDevice | undefined): Promise<Qcow2Image> {
  const image = await openQcow2(disk, IMAGE, { name: 'disk' })
  image.backing = backing
  return image
}

export async function record(setting: Setting, seed: number, operations: number): Promise<Recording> {
  const log: Entry[] = []
  const late = setting.isLate ? { late: new Random(seed + 1) } : {}
  const disk = new CrashDisk({ isDevice: setting.isDevice, log, ...late })
  await makeImage(disk, setting)
  // The new image is durable as it is; its making is not part of the log.
  log.length = 0
  const start = new Map(Array.from(disk.files, ([name, content]) => [name, new Content(content)]))
  const run = new Run(setting, seed, disk, log)
  await withoutTime(() => run.go(operations))
  return { setting, seed, log, start, operations, worlds: run.worlds }
}

/** Long loops pause by the clock. Stopped, it has a run be the same on a slow machine. */
async function withoutTime(work: () => Promise<void>): Promise<void> {
  const stopped = mock.method(performance, 'now', () => 0)
  try {
    await work()
  } finally {
    stopped.mock.restore()
  }
}

async function makeImage(disk: CrashDisk, setting: Setting): Promise<void> {
  const reference = setting.hasBacking ? { backing: { name: REFERENCES[0], format: 'raw' } } : {}
  const plain = new CrashDisk()
  await createQcow2(plain, IMAGE, { ...setting.create, ...reference })
  for (const [name, content] of plain.files) {
    const file = new Content(content)
    const { clusterSize = 0 } = setting.create
    if (setting.isDevice) file.truncate(Math.max(DEVICE_MIN, DEVICE_CLUSTERS * clusterSize))
    disk.files.set(name, file)
  }
}

/** Operations, and how often each is drawn. */
const WEIGHTS = {
  write: 600,
  zero: 100,
  trim: 90,
  flush: 90,
  settle: 40,
  grow: 4,
  refer: 6,
  reopen: 10,
  rest: 5,
  kill: 8,
  pack: 60,
  snapshot: 25,
  bitmap: 20,
} as const

type Operation = keyof typeof WEIGHTS

const DRAWN: readonly Operation[] = (Object.keys(WEIGHTS) as Operation[]).flatMap((operation) =>
  Array<Operation>(WEIGHTS[operation]).fill(operation),
)

/** Sectors that a request in flight may change. */
interface Busy {
  readonly first: number
  readonly end: number
  readonly isTrim: boolean
}

class Run {
  readonly #setting: Setting
  readonly #random: Random
  readonly #disk: CrashDisk
  readonly #log: Entry[]
  readonly #backing: BlockDevice | undefined
  readonly #inFlight = new Set<Promise<void>>()
  readonly #busy = new Set<Busy>()
  readonly #undone = new Set<Act>()
  #image: Qcow2Image | undefined
  #failure: unknown
  #life = 0
  #ids = BELOW
  #reference = 0
  readonly worlds: World[] = [FIRST_WORLD]

  constructor(setting: Setting, seed: number, disk: CrashDisk, log: Entry[]) {
    this.#setting = setting
    this.#random = new Random(seed)
    this.#disk = disk
    this.#log = log
    this.#backing = backingOf(setting)
  }

  async go(operations: number): Promise<void> {
    await this.#open()
    for (let step = 0; step < operations; step++) {
      await this.#do(this.#random.pick(DRAWN))
      if (this.#failure !== undefined) throw this.#failure
    }
    await this.#quiet()
    await this.#image?.close()
  }

  get #opened(): Qcow2Image {
    assert(this.#image !== undefined, 'the image is open')
    return this.#image
  }

  async #do(operation: Operation): Promise<void> {
    const depth = this.#setting.isLate ? 6 : 3
    while (this.#inFlight.size >= depth) await Promise.race(this.#inFlight)
    if (operation === 'write' || operation === 'zero' || operation === 'trim') return this.#request(operation)
    if (operation === 'pack') return this.#pack()
    if (operation === 'flush') return this.#flush()
    if (operation === 'kill') return this.#kill()
    if (operation === 'snapshot' && !this.#setting.keeps) return
    if (operation === 'bitmap' && (!this.#setting.keeps || this.#setting.create.version === 2)) return
    await this.#quiet()
    if (operation === 'grow') return this.#grow()
    if (operation === 'refer') return this.#refer()
    if (operation === 'reopen') return this.#reopen()
    if (operation === 'rest') return this.#rest()
    if (operation === 'snapshot' || operation === 'bitmap') return this.#keep(operation)
  }

  async #open(): Promise<void> {
    this.#image = await openImage(this.#disk, this.#backing)
    await this.#image.setAccess('write')
  }

  #request(operation: 'write' | 'zero' | 'trim'): void {
    const random = this.#random
    const sectors = this.#opened.size / SECTOR
    const first = random.chance(0.5) ? random.below(sectors) : random.below(Math.ceil(sectors / 8)) * 8
    const most = random.pick([1, 2, 8, 16, 24, 80])
    const count = Math.min(sectors - first, 1 + random.below(most))
    const offset = first * SECTOR
    const length = count * SECTOR
    const range: Busy = { first, end: first + count, isTrim: operation === 'trim' }
    // What a trim left can only be told when nothing else changes it meanwhile.
    for (const busy of this.#busy)
      if (busy.first < range.end && first < busy.end && (range.isTrim || busy.isTrim)) return
    if (operation === 'trim') return this.#trim(range)
    const act = this.#begin(operation === 'write' ? ++this.#ids : ZEROS, true)
    this.#log.push({ kind: 'issued', act, first, count })
    const bytes = operation === 'write' ? fillSectors(new Uint8Array(length), first, act.id) : undefined
    const flags = random.chance(0.5) ? MAY_UNMAP : 0
    this.#follow(
      range,
      () =>
        bytes === undefined
          ? this.#opened.zero(offset, length, flags)
          : this.#opened.write(offset, length, bytes, 0, 0),
      () => this.#end(act),
    )
  }

  /** Writes a whole cluster, compressed. */
  #pack(): void {
    const { clusterSize = 0, dataFile } = this.#setting.create
    if (dataFile !== undefined) return
    const { size } = this.#opened
    const offset = this.#random.below(Math.ceil(size / clusterSize)) * clusterSize
    const length = Math.min(clusterSize, size - offset)
    const range: Busy = { first: offset / SECTOR, end: (offset + length) / SECTOR, isTrim: false }
    for (const busy of this.#busy) if (busy.isTrim && busy.first < range.end && range.first < busy.end) return
    const act = this.#begin(++this.#ids, true)
    this.#log.push({ kind: 'issued', act, first: range.first, count: range.end - range.first })
    const cluster = new Uint8Array(clusterSize)
    fillSectors(cluster.subarray(0, length), range.first, act.id)
    const level = this.#random.pick([0, 1, 9])
    const packed =
      this.#setting.create.compression === 'zstd'
        ? zlib.zstdCompressSync(cluster)
        : zlib.deflateRawSync(cluster, { windowBits: 12, level })
    const fits = packed.length < clusterSize ? packed : undefined
    this.#follow(
      range,
      () => this.#opened.writeCompressed(offset, fits, cluster, 0, length),
      () => this.#end(act),
    )
  }

  #trim(range: Busy): void {
    const { first } = range
    const count = range.end - first
    const act = this.#begin(ZEROS, false)
    this.#log.push({ kind: 'issued', act, first, count })
    const bytes = new Uint8Array(count * SECTOR)
    this.#follow(
      range,
      () => {
        const image = this.#opened
        const wait = image.trim(first * SECTOR, bytes.length, 0)
        const read = (): Pending => image.read(first * SECTOR, bytes.length, bytes, 0)
        return wait === undefined ? read() : wait.then(read)
      },
      () => {
        this.#end(act)
        this.#saw(bytes, first, act.issued)
      },
    )
  }

  #flush(): void {
    const upTo = this.#mark('flushing')
    this.#follow(
      undefined,
      () => this.#opened.flush(),
      () => this.#log.push({ kind: 'flushed', upTo }),
    )
  }

  /** Makes a request and sees to what follows it, unless the process dies before. */
  #follow(range: Busy | undefined, work: () => Pending, done: () => void): void {
    const life = this.#life
    if (range !== undefined) this.#busy.add(range)
    const end = (): void => {
      if (life !== this.#life) return
      if (range !== undefined) this.#busy.delete(range)
      done()
    }
    const wait = work()
    if (wait === undefined) return end()
    const ended = wait
      .then(end, (error) => {
        if (life === this.#life) this.#failure = error
      })
      .finally(() => this.#inFlight.delete(ended))
    this.#inFlight.add(ended)
  }

  async #quiet(): Promise<void> {
    while (this.#inFlight.size > 0) await Promise.race(this.#inFlight)
    if (this.#failure !== undefined) throw this.#failure
  }

  async #grow(): Promise<void> {
    const { size: first } = this.#setting.create
    const image = this.#opened
    // With snapshots a disk of version 2 keeps its size.
    if (this.#setting.create.version === 2 && image.snapshots.length > 0) return
    const old = image.size / SECTOR
    const isSmaller = this.#setting.shrinks && this.#random.chance(0.5)
    const by = this.#random.between(1, Math.ceil(first / 2 / SECTOR))
    const now = isSmaller ? Math.max(1, old - by) : old + by
    if (now * SECTOR > first * SIZE_MAX_FACTOR) return
    // What is cut off may be gone, and what is below may show there, as soon as the disk begins to shrink. What is added is zeros.
    const zeros = this.#begin(ZEROS, !isSmaller)
    this.#log.push({ kind: 'issued', act: zeros, first: Math.min(old, now), count: Math.abs(now - old) })
    const below = this.#begin(BELOW, false)
    if (isSmaller && this.#setting.hasBacking)
      this.#log.push({ kind: 'issued', act: below, first: now, count: old - now })
    const act = this.#begin(now * SECTOR, true)
    this.#log.push({ kind: 'resizing', act })
    await (isSmaller ? image.resize(now * SECTOR, { shrink: true }) : image.grow(now * SECTOR))
    this.#end(zeros)
    this.#end(below)
    this.#end(act)
  }

  async #refer(): Promise<void> {
    if (!this.#setting.hasBacking) return
    this.#reference = (this.#reference + 1) % REFERENCES.length
    const act = this.#begin(this.#reference, true)
    this.#log.push({ kind: 'referring', act })
    await this.#opened.setBackingReference({ name: REFERENCES[this.#reference] as string, format: 'raw' })
    this.#end(act)
  }

  /** Something with snapshots or bitmaps. */
  async #keep(operation: 'snapshot' | 'bitmap'): Promise<void> {
    const image = this.#opened
    const disk = idsOf(await readAll(image))
    const world = this.worlds.at(-1) as World
    const name = `${operation}-${this.worlds.length}`
    const random = this.#random
    const step =
      operation === 'snapshot' ? snapshotStep(world, random, disk, name) : bitmapStep(world, image, random, disk, name)
    const acts: Act[] = []
    if (step.disk !== undefined) {
      acts.push(...actsFor(step.disk, this.#log.length))
      this.#log.push({ kind: 'applying', acts })
      const resized = this.#begin(step.disk.length * SECTOR, true)
      acts.push(resized)
      this.#log.push({ kind: 'resizing', act: resized })
    }
    const act = this.#begin(this.worlds.push(step.next) - 1, true)
    this.#log.push({ kind: 'keeping', act })
    await step.make(image)
    for (const each of acts) each.done = this.#log.length
    for (const each of acts) this.#undone.delete(each)
    this.#end(act)
    const now = idsOf(await readAll(image))
    assert(now.join() === (step.disk ?? disk).join(), 'the disk is what the step says')
  }

  async #reopen(): Promise<void> {
    const upTo = this.#mark('flushing')
    await this.#opened.close()
    this.#log.push({ kind: 'flushed', upTo })
    await this.#open()
  }

  /** Gives write access back for a moment. */
  async #rest(): Promise<void> {
    const upTo = this.#mark('flushing')
    await this.#opened.setAccess('read')
    this.#log.push({ kind: 'flushed', upTo })
    await this.#opened.setAccess('write')
  }

  async #kill(): Promise<void> {
    const image = this.#opened
    this.#life++
    this.#disk.kill()
    this.#inFlight.clear()
    this.#busy.clear()
    const killed = this.#mark('killed')
    for (const act of this.#undone) {
      act.done = killed
      act.isSure = false
    }
    this.#undone.clear()
    // It fails, which has it forget what it holds in memory.
    image.close().catch(() => undefined)
    await this.#open()
    this.#saw(await readAll(this.#opened), 0, killed)
  }

  #begin(id: number, isSure: boolean): Act {
    const act: Act = { id, issued: this.#log.length, done: Number.POSITIVE_INFINITY, isSure }
    this.#undone.add(act)
    return act
  }

  #end(act: Act): void {
    act.done = this.#log.length
    this.#log.push({ kind: 'acked', act })
    this.#undone.delete(act)
  }

  /** Adds an entry and gives its place. */
  #mark(kind: 'flushing' | 'killed'): number {
    return this.#log.push({ kind }) - 1
  }

  #saw(bytes: Uint8Array, first: number, issued: number): void {
    const sectors = new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4)
    const ids = Array.from({ length: bytes.length / SECTOR }, (_, i) => idOf(sectors, i, first))
    this.#log.push({ kind: 'seen', first, ids, issued })
  }
}
