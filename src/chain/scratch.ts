// The scratch of one point in time: old granules, kept in a file of the host until the backup has read them. Slots are
// granule-sized; freed ones are used again before the file grows. Nothing here survives the process, so nothing is synced.
//
//   granule 7 -> slot 0     scratch file   | 7 | 3 | . | 9 |
//   granule 3 -> slot 1     free slots       2
//   granule 5 -> zero       (a granule of zeros takes no slot)

import { assert } from '../base/assert.ts'
import { isZero } from '../base/bytes.ts'
import type { Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { HostFile } from '../host/host.ts'
import type { ScratchBudget } from './scratch-budget.ts'

const REGION_GRANULES = 1024
const NOT_SAVED = 0
const SAVED_ZERO = -1

export class Scratch {
  readonly granule: number
  readonly #file: HostFile
  readonly #budgets: readonly ScratchBudget[]
  /** By region of the disk, each granule's slot + 1, NOT_SAVED or SAVED_ZERO; regions without a saved granule are absent. */
  readonly #regions = new Map<number, Int32Array>()
  readonly #freeSlots: number[] = []
  #slots = 0
  /** Bytes of slots in use at most so far. */
  peak = 0

  constructor(file: HostFile, granule: number, budgets: readonly ScratchBudget[]) {
    this.#file = file
    this.granule = granule
    this.#budgets = budgets
  }

  /** Slots in use, in bytes. */
  get used(): number {
    return (this.#slots - this.#freeSlots.length) * this.granule
  }

  has(index: number): boolean {
    return this.#slotOf(index) !== NOT_SAVED
  }

  /** The first saved granule from `from` on that is below `end`, or `end`. */
  nextSaved(from: number, end: number): number {
    for (let index = from; index < end; index++) {
      const region = this.#regions.get(Math.floor(index / REGION_GRANULES))
      if (region === undefined) index = (Math.floor(index / REGION_GRANULES) + 1) * REGION_GRANULES - 1
      else if (region[index % REGION_GRANULES] !== NOT_SAVED) return index
    }
    return end
  }

  /** Keeps a granule's old bytes. Kind 'no-space' when a budget has no room. */
  save(index: number, from: Uint8Array, at: number, length: number): Pending {
    assert(!this.has(index), 'a granule is saved once')
    if (isZero(from, at, length)) {
      this.#setSlot(index, SAVED_ZERO)
      return undefined
    }
    const slot = this.#takeSlot()
    const pending = this.#file.write(slot * this.granule, length, from, at)
    if (pending === undefined) {
      this.#setSlot(index, slot + 1)
      return undefined
    }
    return pending.then(() => this.#setSlot(index, slot + 1))
  }

  /** Reads `length` bytes from byte `within` of a saved granule. */
  read(index: number, within: number, length: number, into: Uint8Array, at: number): Pending {
    const slot = this.#slotOf(index)
    assert(slot !== NOT_SAVED, 'only a saved granule is read')
    if (slot !== SAVED_ZERO) return this.#file.read((slot - 1) * this.granule + within, length, into, at)
    into.fill(0, at, at + length)
    return undefined
  }

  /** Gives back what granules `first` to `end` - 1 took. */
  free(first: number, end: number): void {
    for (let index = this.nextSaved(first, end); index < end; index = this.nextSaved(index + 1, end)) {
      const slot = this.#slotOf(index)
      this.#setSlot(index, NOT_SAVED)
      if (slot === SAVED_ZERO) continue
      this.#freeSlots.push(slot - 1)
      for (const budget of this.#budgets) budget.give(this.granule)
    }
  }

  /** Gives everything back and closes the file. */
  async close(): Promise<void> {
    for (const budget of this.#budgets) budget.give(this.used)
    this.#slots = 0
    this.#freeSlots.length = 0
    this.#regions.clear()
    await this.#file.close()
  }

  #slotOf(index: number): number {
    return this.#regions.get(Math.floor(index / REGION_GRANULES))?.[index % REGION_GRANULES] ?? NOT_SAVED
  }

  #setSlot(index: number, slot: number): void {
    const regionIndex = Math.floor(index / REGION_GRANULES)
    let region = this.#regions.get(regionIndex)
    if (region === undefined) this.#regions.set(regionIndex, (region = new Int32Array(REGION_GRANULES)))
    region[index % REGION_GRANULES] = slot
  }

  #takeSlot(): number {
    const taken: ScratchBudget[] = []
    for (const budget of this.#budgets) {
      if (budget.take(this.granule)) {
        taken.push(budget)
        continue
      }
      for (const other of taken) other.give(this.granule)
      const message = `the scratch budget of ${budget.limit} bytes is used up: the backup is given up, the guest goes on`
      throw new BlockError('no-space', message, { path: this.#file.path })
    }
    const slot = this.#freeSlots.pop() ?? this.#slots++
    this.peak = Math.max(this.peak, this.used)
    return slot
  }
}
