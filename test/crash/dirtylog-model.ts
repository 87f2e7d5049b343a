// What the crash test of the dirty log knows of a log: its worlds, what is uncertain, and where recovery may set too much.

import assert from 'node:assert/strict'
import { DIRTYLOG_REGION } from '../../src/base/limits.ts'
import type { Bitmap } from '../../src/bitmap/bitmap.ts'
import type { DirtyLog, DirtyLogFiles, Recovery } from '../../src/dirtylog/dirty-log.ts'
import type { HostFile } from '../../src/host/host.ts'
import type { SimulatedHost } from '../../src/host/simulated.ts'

export const UNIT = 64 * 1024
export const REGIONS = 12
export const SIZE = REGIONS * DIRTYLOG_REGION - 3 * UNIT - 1000
export const UNITS = Math.ceil(SIZE / UNIT)
/** The simulated disk holds of each unit only the number of the write that made it what it is, in so many bytes. */
export const TAG = 4
export const AREA_BYTES = 64 * 32
export const NAMES = ['area0', 'area1', 'slot0', 'slot1'] as const
export const MAIN = 'main'

export interface ModelBitmap {
  readonly granule: number
  recording: boolean
  readonly bits: Uint8Array
  /** Of each unit: data of a later version must be marked. */
  readonly since: Uint32Array
  /** Of each granule: when it was last cleared. */
  readonly clearedAt: Uint32Array
}

export interface World {
  readonly number: number
  readonly bitmaps: Map<string, ModelBitmap>
}

/** A range that a request in flight may or may not have marked or cleared already. */
export interface Range {
  readonly offset: number
  readonly length: number
  /** Of a clear: marks made while it waited, whose granules are set for certain. */
  readonly marked?: Range[]
  /** Of a clear: whether marks set anything in its bitmap. */
  readonly isRecording?: boolean
  /** Of a clear: whether any mark of its granules was asked for while it waited. */
  met?: boolean
}

/** The host just before one of its operations, and what may be recovered from it. */
export interface Moment {
  readonly host: SimulatedHost
  readonly worlds: readonly World[]
  readonly uncertain: readonly Range[]
  /** Too much is allowed in granules cleared since the last fold, and in regions touched since the one before it. */
  readonly foldedAt: number
  readonly hotSince: number
  readonly touchedAt: Uint32Array
  /** Whether the log may, and must, be found cleanly closed. */
  readonly mayBeClean: boolean
  readonly mustBeClean: boolean
}

export function copyBitmap(bitmap: ModelBitmap): ModelBitmap {
  const { bits, since, clearedAt } = bitmap
  return { ...bitmap, bits: bits.slice(), since: since.slice(), clearedAt: clearedAt.slice() }
}

export function copyWorld(world: World, number = world.number): World {
  return { number, bitmaps: new Map(Array.from(world.bitmaps, ([name, bitmap]) => [name, copyBitmap(bitmap)])) }
}

export async function openFiles(host: SimulatedHost): Promise<DirtyLogFiles> {
  const open = (name: string): Promise<HostFile> => host.open(`/${name}`, { write: true, create: 'if-missing' })
  const [area0, area1, slot0, slot1] = NAMES.map(open)
  return {
    areas: [(await area0) as HostFile, (await area1) as HostFile],
    slots: [(await slot0) as HostFile, (await slot1) as HostFile],
  }
}

export function overlap(a: Range, b: Range): boolean {
  return a.offset < b.offset + b.length && b.offset < a.offset + a.length
}

export function setIn(bitmap: ModelBitmap, offset: number, length: number): void {
  bitmap.bits.fill(1, Math.floor(offset / bitmap.granule), Math.ceil((offset + length) / bitmap.granule))
}

/** The granule after the last that lies whole in the range. */
export function endOf(
  { granule, bits }: { granule: number; bits: { length: number } },
  { offset, length }: Range,
): number {
  return offset + length >= SIZE ? bits.length : Math.floor((offset + length) / granule)
}

/** From now on only data later than these versions needs its mark. */
export function clearGranule(bitmap: ModelBitmap, g: number, versions: readonly number[], time: number): void {
  bitmap.bits[g] = 0
  bitmap.clearedAt[g] = time
  const firstUnit = (g * bitmap.granule) / UNIT
  for (let unit = firstUnit; unit < Math.min(UNITS, firstUnit + bitmap.granule / UNIT); unit++) {
    bitmap.since[unit] = versions[unit] as number
  }
}

/** The first byte of the first granule that begins in the range. */
export function wholeStart(granule: number, { offset }: Range): number {
  return Math.ceil(offset / granule) * granule
}

export function uncertainGranules(moment: Moment, bitmap: ModelBitmap): Uint8Array {
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
export function compare(
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

export function compareBits(
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
    const isTouched = bitmap.recording && (moment.touchedAt[Math.floor(g / perRegion)] as number) >= moment.hotSince
    const isCleared = (bitmap.clearedAt[g] as number) >= moment.foldedAt
    assert.ok(mayExceed, `${note} granule ${g} is ${has}`)
    assert.ok(has === 1, `${note} lacks granule ${g}`)
    assert.ok(isTouched || isCleared, `${note} has granule ${g} for no reason`)
  }
}

export async function readVersions(host: SimulatedHost): Promise<number[]> {
  const data = await host.open('/data')
  const tags = Buffer.alloc(UNITS * TAG)
  await data.read(0, tags.length, tags, 0)
  return Array.from({ length: UNITS }, (_, unit) => tags.readUInt32BE(unit * TAG))
}
