// The part of scratch that is memory: slots of a granule, in slabs that are taken from a budget as they are needed and given back at the
// end. It knows which granule is in a slot, so that those that have been here longest can go to the file, and moves none itself.
//
//   slabs   | 7 | 3 | . | 9 |  | 5 | . | . | . |      free slots  2 5 6 7
//                                  ^ next to go

import { SCRATCH_SLAB } from '../base/limits.ts'
import { copyBytes } from '../base/bytes.ts'
import { pool } from '../block/pool.ts'
import type { ScratchBudget } from './scratch-budget.ts'

const NOBODY = -1
/** Memory is scarce when no more slabs are to be had and less than this part of the slots is free. */
const FREE_SHARE = 0.25

export class ScratchMemory {
  readonly #granule: number
  readonly #budget: ScratchBudget
  readonly #slabs: Uint8Array[] = []
  /** By slot: the granule that is in it, or NOBODY. */
  readonly #owners: number[] = []
  readonly #free: number[] = []
  readonly #slotsOfSlab: number
  #next = 0
  #isRefused = false

  constructor(granule: number, budget: ScratchBudget) {
    this.#granule = granule
    this.#budget = budget
    this.#slotsOfSlab = SCRATCH_SLAB / granule
  }

  /** It is time to bring some of it elsewhere. */
  get isScarce(): boolean {
    return this.#isRefused && this.#free.length < this.#owners.length * FREE_SHARE
  }

  /** A slot for a granule's bytes, which are to be put there; undefined where there is no room. */
  take(): number | undefined {
    // A slab ahead, so that it is known in time when there are no more.
    if (this.#free.length < this.#slotsOfSlab) this.#grow()
    return this.#free.pop()
  }

  /** Where a slot's bytes are: from `placeOf` of it. */
  slabOf(slot: number): Uint8Array {
    return this.#slabs[Math.floor(slot / this.#slotsOfSlab)] as Uint8Array
  }

  placeOf(slot: number): number {
    return (slot % this.#slotsOfSlab) * this.#granule
  }

  /** The granule's bytes are in the slot. */
  own(slot: number, granule: number): void {
    this.#owners[slot] = granule
  }

  /** `length` bytes from byte `within` of a slot. */
  read(slot: number, within: number, length: number, into: Uint8Array, at: number): void {
    copyBytes(this.slabOf(slot), this.placeOf(slot) + within, into, at, length)
  }

  give(slot: number): void {
    this.#owners[slot] = NOBODY
    this.#free.push(slot)
  }

  /** True while the granule is in that slot. */
  has(slot: number, granule: number): boolean {
    return this.#owners[slot] === granule
  }

  /** Copies up to `count` granules, going round the slots, one behind the other into `into`; calls `copied` with each granule and its slot. */
  copySome(count: number, into: Uint8Array, copied: (granule: number, slot: number) => void): void {
    const slots = this.#owners.length
    let done = 0
    for (let seen = 0; seen < slots && done < count; seen++) {
      const slot = this.#next
      this.#next = (slot + 1) % slots
      const granule = this.#owners[slot] as number
      if (granule === NOBODY) continue
      this.read(slot, 0, this.#granule, into, done++ * this.#granule)
      copied(granule, slot)
    }
  }

  /** Nothing of it is used any more. */
  close(): void {
    for (const slab of this.#slabs) pool.give(slab)
    this.#budget.give(this.#slabs.length * SCRATCH_SLAB)
    this.#slabs.length = 0
    this.#owners.length = 0
    this.#free.length = 0
  }

  #grow(): void {
    this.#isRefused = !this.#budget.take(SCRATCH_SLAB)
    if (this.#isRefused) return
    const first = this.#owners.length
    this.#slabs.push(pool.take(SCRATCH_SLAB))
    // The lowest is taken first.
    for (let slot = first; slot < first + this.#slotsOfSlab; slot++) this.#owners.push(NOBODY)
    for (let slot = first + this.#slotsOfSlab - 1; slot >= first; slot--) this.#free.push(slot)
  }
}
