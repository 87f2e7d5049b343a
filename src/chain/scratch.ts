// The scratch of one point in time: old granules, kept until the backup has read them: in memory as long as there is room, which costs the
// guest a copy, else in a file of the host. When memory is scarce, what is in it goes to the file in larger pieces beside the guest, so
// that its next saves find room again. Nothing here survives the process, so nothing is synced.
//
//   granule 7 -> memory 0     memory   | 7 | 3 | . | 9 |        --spill-->
//   granule 5 -> file 0       file     | 5 | 1 | . | 6 | ...    slots freed are used again before it grows
//   granule 4 -> zero         (a granule of zeros takes no slot)

import { assert } from '../base/assert.ts'
import { copyBytes, isZero } from '../base/bytes.ts'
import { SCRATCH_SLAB } from '../base/limits.ts'
import type { Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { copyPool } from '../block/pool.ts'
import type { HostFile } from '../host/host.ts'
import type { ScratchBudget } from './scratch-budget.ts'
import type { ScratchMemory } from './scratch-memory.ts'

const REGION_GRANULES = 1024
const NOT_SAVED = 0
const SAVED_ZERO = -1
/** Saved in memory: the slot + 1. In the file: the slot + this; far more than there are slots of memory. */
const FILE = 2 ** 24

export interface ScratchPlaces {
  readonly memory: ScratchMemory
  readonly file: HostFile
}

export class Scratch {
  readonly granule: number
  readonly #file: HostFile
  readonly #memory: ScratchMemory
  readonly #budgets: readonly ScratchBudget[]
  /** By region of the disk, where each granule is, NOT_SAVED or SAVED_ZERO; regions without a saved granule are absent. */
  readonly #regions: (Int32Array | undefined)[] = []
  /** Of the file. */
  readonly #freeSlots: number[] = []
  #slots = 0
  #granules = 0
  #spilling: Promise<void> | undefined
  #isClosed = false
  /** Bytes in use at most so far. */
  peak = 0

  constructor({ memory, file }: ScratchPlaces, granule: number, budgets: readonly ScratchBudget[]) {
    this.#memory = memory
    this.#file = file
    this.granule = granule
    this.#budgets = budgets
  }

  /** Bytes in use. */
  get used(): number {
    return this.#granules * this.granule
  }

  has(index: number): boolean {
    return this.#placeOf(index) !== NOT_SAVED
  }

  /** The first saved granule from `from` on that is below `end`, or `end`. */
  nextSaved(from: number, end: number): number {
    for (let index = from; index < end; index++) {
      const region = this.#regions[Math.floor(index / REGION_GRANULES)]
      if (region === undefined) index = (Math.floor(index / REGION_GRANULES) + 1) * REGION_GRANULES - 1
      else if (region[index % REGION_GRANULES] !== NOT_SAVED) return index
    }
    return end
  }

  /** Room in memory for a granule that is about to be saved: its bytes are to be put there, and then kept or not. Undefined when there is none. */
  take(): number | undefined {
    return this.#memory.take()
  }

  slabOf(slot: number): Uint8Array {
    return this.#memory.slabOf(slot)
  }

  placeOf(slot: number): number {
    return this.#memory.placeOf(slot)
  }

  /** Keeps what was put into a slot as a granule's old bytes. Kind 'no-space' when a budget has no room; the slot is then free. */
  keep(index: number, slot: number, length: number): void {
    assert(!this.has(index), 'a granule is saved once')
    if (isZero(this.slabOf(slot), this.placeOf(slot), length)) {
      this.#setPlace(index, SAVED_ZERO)
      this.leave(slot)
      return
    }
    try {
      this.#takeBudget()
    } catch (error) {
      this.leave(slot)
      throw error
    }
    this.#memory.own(slot, index)
    this.#setPlace(index, slot + 1)
    if (this.#memory.isScarce) this.#spill()
  }

  /** Nothing is to be kept in a slot. */
  leave(slot: number): void {
    this.#memory.give(slot)
  }

  /** Keeps a granule's old bytes, wherever there is room. Kind 'no-space' when a budget has none. */
  save(index: number, from: Uint8Array, at: number, length: number): Pending {
    const slot = this.take()
    if (slot !== undefined) {
      copyBytes(from, at, this.slabOf(slot), this.placeOf(slot), length)
      this.keep(index, slot, length)
      return undefined
    }
    assert(!this.has(index), 'a granule is saved once')
    if (isZero(from, at, length)) {
      this.#setPlace(index, SAVED_ZERO)
      return undefined
    }
    this.#takeBudget()
    const place = (this.#freeSlots.pop() ?? this.#slots++) + FILE
    const pending = this.#file.write((place - FILE) * this.granule, length, from, at)
    if (pending === undefined) {
      this.#setPlace(index, place)
      return undefined
    }
    return pending.then(() => this.#setPlace(index, place))
  }

  /** Reads `length` bytes from byte `within` of a saved granule. */
  read(index: number, within: number, length: number, into: Uint8Array, at: number): Pending {
    const place = this.#placeOf(index)
    assert(place !== NOT_SAVED, 'only a saved granule is read')
    if (place >= FILE) return this.#file.read((place - FILE) * this.granule + within, length, into, at)
    if (place === SAVED_ZERO) into.fill(0, at, at + length)
    else this.#memory.read(place - 1, within, length, into, at)
    return undefined
  }

  /** Gives back what granules `first` to `end` - 1 took. */
  free(first: number, end: number): void {
    for (let index = this.nextSaved(first, end); index < end; index = this.nextSaved(index + 1, end)) {
      const place = this.#placeOf(index)
      this.#setPlace(index, NOT_SAVED)
      if (place === SAVED_ZERO) continue
      if (place >= FILE) this.#freeSlots.push(place - FILE)
      else this.#memory.give(place - 1)
      this.#granules--
      for (const budget of this.#budgets) budget.give(this.granule)
    }
  }

  /** Gives everything back and closes the file. */
  async close(): Promise<void> {
    this.#isClosed = true
    await this.#spilling
    for (const budget of this.#budgets) budget.give(this.used)
    this.#granules = 0
    this.#regions.length = 0
    this.#memory.close()
    await this.#file.close()
  }

  #placeOf(index: number): number {
    return this.#regions[Math.floor(index / REGION_GRANULES)]?.[index % REGION_GRANULES] ?? NOT_SAVED
  }

  #setPlace(index: number, place: number): void {
    const region = (this.#regions[Math.floor(index / REGION_GRANULES)] ??= new Int32Array(REGION_GRANULES))
    region[index % REGION_GRANULES] = place
  }

  /** For one granule. */
  #takeBudget(): void {
    for (let i = 0; i < this.#budgets.length; i++) {
      const budget = this.#budgets[i] as ScratchBudget
      if (budget.take(this.granule)) continue
      for (const other of this.#budgets.slice(0, i)) other.give(this.granule)
      const message = `the scratch budget of ${budget.limit} bytes is used up: the backup is given up, the guest goes on`
      throw new BlockError('no-space', message, { path: this.#file.path })
    }
    this.#granules++
    this.peak = Math.max(this.peak, this.used)
  }

  /** Memory goes to the file until it is scarce no longer. What cannot be written stays; saves then meet the trouble themselves. */
  #spill(): void {
    this.#spilling ??= this.#spillAll()
      .catch(() => undefined)
      .finally(() => (this.#spilling = undefined))
  }

  async #spillAll(): Promise<void> {
    const buffer = copyPool.take(SCRATCH_SLAB)
    try {
      while (!this.#isClosed && this.#memory.isScarce) await this.#spillSome(buffer)
    } finally {
      copyPool.give(buffer)
    }
  }

  async #spillSome(buffer: Uint8Array): Promise<void> {
    const { granule } = this
    const moving: { readonly index: number; readonly from: number }[] = []
    this.#memory.copySome(SCRATCH_SLAB / granule, buffer, (index, from) => moving.push({ index, from }))
    const slots = this.#takeSlots(moving.length)
    try {
      for (let first = 0, next = 1; first < slots.length; first = next++) {
        const slot = slots[first] as number
        while (slots[next] === slot + next - first) next++
        await this.#file.write(slot * granule, (next - first) * granule, buffer, first * granule)
      }
    } catch (error) {
      this.#freeSlots.push(...slots)
      throw error
    }
    for (const [number, { index, from }] of moving.entries()) {
      const slot = slots[number] as number
      if (this.#memory.has(from, index)) {
        this.#memory.give(from)
        this.#setPlace(index, slot + FILE)
      } else this.#freeSlots.push(slot)
    }
  }

  /** Slots of the file in order, so that there are few runs of them. */
  #takeSlots(count: number): number[] {
    const slots = this.#freeSlots.splice(Math.max(0, this.#freeSlots.length - count)).toSorted((a, b) => a - b)
    while (slots.length < count) slots.push(this.#slots++)
    return slots
  }
}
