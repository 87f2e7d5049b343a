// What an image keeps beside the disk, through any crash: internal snapshots, each of which holds exactly what the disk held when it
// was made, and persistent bitmaps, which have every change since they were begun or say that they are inconsistent. A world
// is one state of both; each operation on them makes the next, and acknowledged means durable.

import assert from 'node:assert/strict'
import type { Random } from '../../src/base/random.ts'
import type { Layer } from '../../src/block/device.ts'
import { hasAutoclear } from '../../src/format/qcow2/header.ts'
import type { Qcow2Image } from '../../src/format/qcow2/image.ts'
import { AUTOCLEAR_BITMAPS } from '../../src/format/qcow2/spec.ts'
import { SECTOR } from './crash-disk.ts'
import { type Act, idOf, ZEROS } from './sector-model.ts'

/** What each sector held at a moment: the ids of its requests. */
export type Ids = readonly number[]

export interface World {
  readonly snapshots: ReadonlyMap<string, Ids>
  /** What the disk held when the bitmap was empty. */
  readonly bitmaps: ReadonlyMap<string, Ids>
}

export const FIRST_WORLD: World = { snapshots: new Map(), bitmaps: new Map() }

/** How many of each an image has at most. */
const SNAPSHOTS_MAX = 3
const BITMAPS_MAX = 2

export function idsOf(bytes: Uint8Array): Ids {
  const words = new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4)
  const ids: number[] = []
  for (let i = 0; i < bytes.length / SECTOR; i++) ids.push(idOf(words, i, 0))
  return ids
}

/** An operation on what an image keeps: what the next world is, how it is made, and what the disk becomes. */
export interface Step {
  readonly next: World
  readonly make: (image: Qcow2Image) => Promise<unknown>
  readonly disk?: Ids
}

/** Draws an operation on snapshots; `disk` is what the disk holds. `name` is one that was never used. */
export function snapshotStep(world: World, random: Random, disk: Ids, name: string): Step {
  const names = [...world.snapshots.keys()]
  const chosen = random.pick(names)
  if (names.length === 0 || (names.length < SNAPSHOTS_MAX && random.chance(0.4))) {
    const snapshots = new Map(world.snapshots).set(name, disk)
    return { next: { ...world, snapshots }, make: (image) => image.createSnapshot(name) }
  }
  if (random.chance(0.4)) {
    const held = world.snapshots.get(chosen) as Ids
    // A smaller disk loses what its bitmaps said of the rest.
    const bitmaps = new Map(Array.from(world.bitmaps, ([bitmap, ids]) => [bitmap, ids.slice(0, held.length)]))
    return { next: { ...world, bitmaps }, make: (image) => image.applySnapshot(chosen), disk: held }
  }
  const snapshots = new Map(world.snapshots)
  snapshots.delete(chosen)
  return { next: { ...world, snapshots }, make: (image) => image.deleteSnapshot(chosen) }
}

/** Draws an operation on bitmaps. */
export function bitmapStep(world: World, image: Qcow2Image, random: Random, disk: Ids, name: string): Step {
  const inconsistent = image.bitmaps.find(({ isConsistent }) => !isConsistent)?.name
  const names = [...world.bitmaps.keys()]
  const chosen = inconsistent ?? random.pick(names)
  const bitmaps = new Map(world.bitmaps)
  if (names.length === 0 || (inconsistent === undefined && names.length < BITMAPS_MAX && random.chance(0.5))) {
    const granularity = random.pick([512, 4096])
    bitmaps.set(name, disk)
    return { next: { ...world, bitmaps }, make: ({ bitmapEdits }) => bitmapEdits.add(name, granularity, true) }
  }
  if (inconsistent !== undefined || random.chance(0.3)) {
    bitmaps.delete(chosen)
    return { next: { ...world, bitmaps }, make: ({ bitmapEdits }) => bitmapEdits.remove(chosen) }
  }
  bitmaps.set(chosen, disk)
  return { next: { ...world, bitmaps }, make: ({ bitmapEdits }) => bitmapEdits.clear(chosen) }
}

/**
 * Which world the image is in, of those that are allowed; fails when it is none of them. Bitmaps that nothing vouches for are not held
 * against it: they are of no use, and while they get new places even their names may go.
 */
export function worldOf(image: Qcow2Image, worlds: readonly World[], allowed: (id: number) => boolean): World {
  const bitmaps = listed(image.bitmaps.map(({ name }) => name))
  const snapshots = listed(image.snapshots.map(({ name }) => name))
  const candidates = worlds.filter((world, id) => listed(world.snapshots.keys()) === snapshots && allowed(id))
  const exact = candidates.findLast((world) => listed(world.bitmaps.keys()) === bitmaps)
  if (exact !== undefined) return exact
  const [any] = candidates
  if (any !== undefined && !hasAutoclear(image.header, AUTOCLEAR_BITMAPS)) return any
  return assert.fail(`no world that it may be in has the image's snapshots (${snapshots}) and bitmaps (${bitmaps})`)
}

function listed(names: Iterable<string>): string {
  return [...names].sort().join(', ')
}

/** Fails unless the snapshot is what it was when it was made. */
export async function checkSnapshot(image: Qcow2Image, name: string, expected: Ids, when: string): Promise<void> {
  const snapshot: Layer = await image.openSnapshot(name)
  try {
    const bytes = new Uint8Array(snapshot.size)
    await snapshot.read(0, bytes.length, bytes, 0)
    const ids = idsOf(bytes)
    assert.equal(ids.length, expected.length, `${when}, snapshot ${name} has another size`)
    const wrong = ids.findIndex((id, i) => id !== expected[i])
    if (wrong >= 0)
      assert.fail(`${when}, sector ${wrong} of snapshot ${name} holds ${ids[wrong]}, not ${expected[wrong]}`)
  } finally {
    await snapshot.close()
  }
}

/** Fails when a consistent bitmap misses a change that the disk shows. */
export async function checkBitmaps(image: Qcow2Image, world: World, disk: Ids, when: string): Promise<void> {
  for (const { name, isConsistent } of image.bitmaps) {
    if (!isConsistent) continue
    const before = world.bitmaps.get(name) as Ids
    const bitmap = await image.readBitmap(name)
    const missed = disk.findIndex((id, i) => id !== (before[i] ?? ZEROS) && !bitmap.hasAny(i * SECTOR, SECTOR))
    if (missed >= 0) assert.fail(`${when}, bitmap ${name} misses the change of sector ${missed}`)
  }
}

/** Acts that make the disk `ids`, sector by sector. */
export function actsFor(ids: Ids, issued: number): Act[] {
  return ids.map((id) => ({ id, issued, done: Number.POSITIVE_INFINITY, isSure: true }))
}
