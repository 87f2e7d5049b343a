// Which regions of a disk are hot: named by a durable record of this epoch. A mark of a cold region waits for a sync of the log,
// and all marks that come until that sync begins share it. One sync at a time.
//
//   mark ─┐                ┌─ mark           gathering: their records are written, the sync has not begun
//   mark ─┼─ sync ──────── ┼─ sync ───>
//   mark ─┘                └─ mark
//
// A new epoch begins with all regions cold. Those that were written lately are told apart, so that they can be made hot together, by one
// sync, before their next writes wait for one each.

import { DIRTYLOG_HEAT_SHARE, DIRTYLOG_HOT_REGIONS, DIRTYLOG_REGION } from '../base/limits.ts'
import { divideUp } from '../base/round.ts'
import type { Pending } from '../block/device.ts'

const COLD = 0
const WAITING = 1
const HOT = 2

/**
 * A region counts as written lately in the epoch of its last write and in the next three: the beginning of a job edits the log several times
 * in a row, and each edit ends an epoch.
 */
const RECENT_EPOCHS = 4

interface Batch {
  readonly epoch: number
  /** First region and the one after the last, over and over. */
  readonly ranges: number[]
  done: Promise<void>
}

export class HotRegions {
  readonly #sync: (epoch: number) => Promise<void>
  #states: Uint8Array
  /** For how many epochs more a region counts as written lately. */
  #recent: Uint8Array
  #epoch: number
  #count = 0
  /** Takes more marks until its sync begins. */
  #gathering: Batch | undefined
  /** Batches whose sync has not ended, oldest first. */
  readonly #batches: Batch[] = []

  /** `sync` makes the records of an epoch durable; what it rejects with, the waiting marks are rejected with. */
  constructor(size: number, epoch: number, sync: (epoch: number) => Promise<void>) {
    this.#states = new Uint8Array(divideUp(size, DIRTYLOG_REGION))
    this.#recent = new Uint8Array(this.#states.length)
    this.#epoch = epoch
    this.#sync = sync
  }

  /** How many regions are hot in this epoch, or about to be. */
  get count(): number {
    return this.#count
  }

  /** True while any sync is under way. */
  get busy(): boolean {
    return this.#batches.length > 0
  }

  isCold(offset: number, length: number): boolean {
    return this.#has(COLD, offset, length)
  }

  /** The range is written. */
  touch(offset: number, length: number): void {
    const first = Math.floor(offset / DIRTYLOG_REGION)
    this.#recent[first] = RECENT_EPOCHS
    const last = Math.floor((offset + length - 1) / DIRTYLOG_REGION)
    for (let region = first + 1; region <= last; region++) this.#recent[region] = RECENT_EPOCHS
  }

  /** Visits the runs of regions that were written lately, in bytes, until the visitor says false; not more than a share of so many records. */
  visitRecent(records: number, visit: (offset: number, length: number) => boolean): void {
    const recent = this.#recent
    let [runs, regions] = [records * DIRTYLOG_HEAT_SHARE, DIRTYLOG_HOT_REGIONS * DIRTYLOG_HEAT_SHARE]
    for (let region = 0; region < recent.length; region++) {
      if (recent[region] === 0) continue
      const first = region
      while (region < recent.length && recent[region] !== 0) region++
      regions -= region - first
      if (--runs < 0 || regions < 0) return
      if (!visit(first * DIRTYLOG_REGION, (region - first) * DIRTYLOG_REGION)) return
    }
  }

  /** Waits until what was marked before in this range is durable. */
  wait(offset: number, length: number): Pending {
    const [oldest] = this.#batches
    if (oldest === undefined) return undefined
    // Which regions wait for a sync of an older epoch is not known any more: all do, for that short time.
    const mustWait = oldest.epoch !== this.#epoch || this.#has(WAITING, offset, length)
    return mustWait ? this.#batches.at(-1)?.done : undefined
  }

  /** Makes the range hot, whose record is written: resolves when it is durable. */
  heat(offset: number, length: number): Promise<void> {
    const batch = this.#gathering ?? this.#newBatch()
    const first = Math.floor(offset / DIRTYLOG_REGION)
    const end = divideUp(offset + length, DIRTYLOG_REGION)
    for (let region = first; region < end; region++) {
      if (this.#states[region] !== COLD) continue
      this.#states[region] = WAITING
      this.#count++
    }
    batch.ranges.push(first, end)
    return batch.done
  }

  /** All regions are cold from now on. Marks that wait keep waiting for their records in the old area. */
  begin(epoch: number): void {
    this.#epoch = epoch
    this.#gathering = undefined
    if (this.#count > 0) this.#states.fill(COLD)
    this.#count = 0
    const recent = this.#recent
    for (let region = 0; region < recent.length; region++) if (recent[region] !== 0) recent[region]!--
  }

  resize(size: number): void {
    const old = this.#states
    this.#states = new Uint8Array(divideUp(size, DIRTYLOG_REGION))
    this.#states.set(old.subarray(0, this.#states.length))
    const recent = this.#recent
    this.#recent = new Uint8Array(this.#states.length)
    this.#recent.set(recent.subarray(0, this.#states.length))
    this.#count = this.#states.reduce((count, state) => (state === COLD ? count : count + 1), 0)
  }

  #has(state: number, offset: number, length: number): boolean {
    const end = divideUp(offset + length, DIRTYLOG_REGION)
    for (let region = Math.floor(offset / DIRTYLOG_REGION); region < end; region++) {
      if (this.#states[region] === state) return true
    }
    return false
  }

  #newBatch(): Batch {
    const batch: Batch = { epoch: this.#epoch, ranges: [], done: Promise.resolve() }
    batch.done = this.#run(batch, this.#batches.at(-1)?.done)
    this.#batches.push(batch)
    this.#gathering = batch
    return batch
  }

  async #run(batch: Batch, before: Promise<void> | undefined): Promise<void> {
    try {
      // Even with none before it this lets the call stack end: marks of one burst of requests share the sync.
      await (before ?? Promise.resolve())
      if (this.#gathering === batch) this.#gathering = undefined
      await this.#sync(batch.epoch)
      if (batch.epoch === this.#epoch) this.#becomeHot(batch)
    } finally {
      this.#batches.splice(this.#batches.indexOf(batch), 1)
    }
  }

  #becomeHot(batch: Batch): void {
    for (let i = 0; i < batch.ranges.length; i += 2) {
      this.#states.fill(HOT, batch.ranges[i], batch.ranges[i + 1])
    }
  }
}
