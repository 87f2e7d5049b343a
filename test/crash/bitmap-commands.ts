// Edits of users' bitmaps at random, and what each means for the bits. What the log makes of them is found by opening it after a crash
// (tracked-check.ts).

import type { Random } from '../../src/base/random.ts'
import type { BitmapEdit } from '../../src/engine/bitmaps.ts'
import { type Bits, type ModelBitmap, VIEW_BITMAP, type World } from './tracked-bitmaps.ts'
import { BLOCK } from './versioned-guest.ts'

const BITMAPS_MAX = 5
const GRANULES = [BLOCK, BLOCK, 4 * BLOCK, 16 * BLOCK] as const
const OUTLIVES = ['host', 'host', 'host', 'process', 'none'] as const

export const BITMAP_COMMANDS = [
  'bitmap add',
  'bitmap add',
  'bitmap copy',
  'bitmap clear',
  'bitmap enable',
  'bitmap disable',
  'bitmap rename',
  'bitmap swap',
  'bitmap set aside',
  'bitmap merge',
  'bitmap remove',
] as const

export type BitmapCommand = (typeof BITMAP_COMMANDS)[number]

/** Makes the edits of a command: none when there are too few bitmaps for it, or too many. */
export class BitmapCommands {
  readonly #random: Random
  #names = 0

  constructor(random: Random) {
    this.#random = random
  }

  edits(command: BitmapCommand, world: World): BitmapEdit[] {
    const names = this.#shuffled([...world.keys()])
    const [one, other] = names
    if (command === 'bitmap add') return names.length < BITMAPS_MAX ? [this.#addition()] : []
    if (one === undefined) return []
    switch (command) {
      case 'bitmap copy':
        return names.length < BITMAPS_MAX ? [{ ...this.#addition(), from: one }] : []
      case 'bitmap clear':
        return [{ edit: 'clear', name: one }]
      case 'bitmap enable':
        return [{ edit: 'enable', name: one }]
      case 'bitmap disable':
        return [{ edit: 'disable', name: one }]
      case 'bitmap rename':
        return [{ edit: 'rename', name: one, to: this.#name() }]
      case 'bitmap remove':
        return [{ edit: 'remove', name: one }]
      case 'bitmap set aside':
        return names.length < BITMAPS_MAX ? this.#setAside(one) : []
      case 'bitmap swap':
        return other === undefined ? [] : this.#swap(one, other)
      case 'bitmap merge':
        return other === undefined ? [] : [{ edit: 'merge', name: one, into: other }]
    }
  }

  #addition(): BitmapEdit & { readonly edit: 'add' } {
    return {
      edit: 'add',
      name: this.#name(),
      granule: this.#random.pick(GRANULES),
      disabled: this.#random.chance(0.2),
      durability: this.#random.pick(OUTLIVES),
    }
  }

  /** As a program does that takes an incremental by itself: what was so far stays, and a new one counts from here. */
  #setAside(name: string): BitmapEdit[] {
    const to = this.#name()
    return [
      { edit: 'rename', name, to },
      { edit: 'disable', name: to },
      { edit: 'add', name },
    ]
  }

  #swap(one: string, other: string): BitmapEdit[] {
    const between = this.#name()
    return [
      { edit: 'rename', name: one, to: between },
      { edit: 'rename', name: other, to: one },
      { edit: 'rename', name: between, to: other },
    ]
  }

  #name(): string {
    return `b${++this.#names}`
  }

  #shuffled(names: string[]): string[] {
    return names
      .filter((name) => name !== VIEW_BITMAP)
      .map((name) => ({ name, at: this.#random.next() }))
      .sort((a, b) => a.at - b.at)
      .map(({ name }) => name)
  }
}

/** The world after the edits, of a disk of so many blocks; that given stays as it is. */
export function meaningOf(edits: readonly BitmapEdit[], blocks: number): (world: World) => World {
  return (world) => edits.reduce<World>((before, edit) => apply(before, edit, blocks), world)
}

function apply(world: World, edit: BitmapEdit, blocks: number): World {
  const after = new Map(world)
  const bitmap = world.get(edit.name)
  if (edit.edit === 'add') {
    const from = edit.from === undefined ? undefined : (world.get(edit.from) as ModelBitmap)
    const granule = edit.granule ?? from?.granule ?? BLOCK
    const empty = { must: new Uint8Array(blocks), may: new Uint8Array(blocks) }
    const bits = from === undefined ? empty : union(empty, outward(from))
    const { durability = 'host' } = edit
    return after.set(edit.name, { ...bits, granule, durability, recording: edit.disabled !== true })
  }
  if (bitmap === undefined) return after
  switch (edit.edit) {
    case 'remove':
      after.delete(edit.name)
      return after
    case 'clear':
      return after.set(edit.name, { ...bitmap, must: bitmap.must.map(() => 0), may: bitmap.may.map(() => 0) })
    case 'enable':
    case 'disable':
      return after.set(edit.name, { ...bitmap, recording: edit.edit === 'enable' })
    case 'rename':
      after.delete(edit.name)
      return after.set(edit.to, bitmap)
    case 'merge': {
      const into = world.get(edit.into) as ModelBitmap
      return after.set(edit.into, { ...into, ...union(into, outward(bitmap)) })
    }
  }
}

function union(one: Bits, other: Bits): Bits {
  return { must: either(one.must, other.must), may: either(one.may, other.may) }
}

function either(one: Uint8Array, other: Uint8Array): Uint8Array {
  return one.map((bit, block) => bit | (other[block] as number))
}

/** Every block of a granule, where one of it is set: so it is copied into a bitmap of smaller granules. */
function outward({ must, may, granule }: ModelBitmap): Bits {
  return { must: wholeGranules(must, granule / BLOCK), may: wholeGranules(may, granule / BLOCK) }
}

function wholeGranules(bits: Uint8Array, blocks: number): Uint8Array {
  const whole = new Uint8Array(bits.length)
  for (let at = 0; at < bits.length; at += blocks)
    if (bits.subarray(at, at + blocks).includes(1)) whole.fill(1, at, at + blocks)
  return whole
}
