// Walks through the extents of a device in order. They are asked for a bounded number at a time, so that neither a disk in
// a million pieces nor one of 64 TiB is listed in memory; whoever walks takes them one by one.
//
//   extents   |data|hole        |data  |hole          |       in units of 4: a unit that holds two kinds is data
//   units     |data        |hole   |data        |hole |

import { roundDown } from '../base/round.ts'
import { IMAGE_WALK_BYTES, IMAGE_WALK_PIECES } from '../base/limits.ts'
import type { ExtentVisitor, Pending } from '../block/device.ts'
import { ExtentJoiner } from '../block/extents.ts'

/** Asks somebody for the extents of a range, as `BlockDevice.extents` does; other bits than those may be used. */
export type AskExtents = (offset: number, length: number, visit: ExtentVisitor) => Pending

/** The extent bits of a unit that holds more than one kind: to be read and looked at. */
const MIXED = 0

export interface WalkOptions {
  readonly ask: AskExtents
  /** Bytes: where it ends. It begins at 0. */
  readonly end: number
  /** Bytes: no piece ends but at a multiple of it, or at the end. 1 unless told. */
  readonly unit?: number
}

export class ExtentWalk {
  /** The piece at hand, in bytes. A length of 0: there is none before the first `advance` and after the last. */
  offset = 0
  length = 0
  extent = 0
  readonly #options: Required<WalkOptions>
  readonly #lengths = new Float64Array(IMAGE_WALK_PIECES)
  readonly #extents = new Uint8Array(IMAGE_WALK_PIECES)
  #count = 0
  #next = 0
  /** The part of the extent at hand that no piece has had yet. */
  #rest = 0
  #kind = 0

  constructor(options: WalkOptions) {
    this.#options = { unit: 1, ...options }
  }

  /** Goes to the next piece. */
  async advance(): Promise<void> {
    const { end, unit } = this.#options
    this.offset += this.length
    this.length = 0
    if (this.offset >= end) return
    if (this.#rest === 0) await this.#take()
    const stop = this.offset + this.#rest
    const whole = (stop === end ? end : roundDown(stop, unit)) - this.offset
    this.extent = whole > 0 ? this.#kind : MIXED
    this.length = whole > 0 ? whole : Math.min(unit, end - this.offset)
    for (let passed = 0; passed < this.length; ) {
      if (this.#rest === 0) await this.#take(this.offset + passed)
      const piece = Math.min(this.#rest, this.length - passed)
      this.#rest -= piece
      passed += piece
    }
  }

  async #take(from = this.offset): Promise<void> {
    if (this.#next === this.#count) await this.#ask(from)
    this.#rest = this.#lengths[this.#next] as number
    this.#kind = this.#extents[this.#next] as number
    this.#next++
  }

  async #ask(from: number): Promise<void> {
    this.#count = 0
    this.#next = 0
    const joiner = new ExtentJoiner((length, extent) => {
      this.#lengths[this.#count] = length
      this.#extents[this.#count++] = extent
      return this.#count < IMAGE_WALK_PIECES
    })
    const length = Math.min(this.#options.end - from, IMAGE_WALK_BYTES)
    const wait = this.#options.ask(from, length, (piece, extent) => joiner.add(piece, extent))
    if (wait !== undefined) await wait
    joiner.end()
  }
}
