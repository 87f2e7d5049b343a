// Where the bytes of one connection arrive. The socket reads straight into `room`; whoever parses takes them from
// `bytes[start, end)` and moves `start`. A long payload is diverted: its rest is read straight to where it shall lie.
// Knows nothing of NBD.
//
//   bytes   | parsed, perhaps still used by slow requests | start: not parsed yet | end: room for the next read |

import { copyBytes } from '../base/bytes.ts'
import { SharedBuffer } from './shared-buffer.ts'

interface Diversion {
  readonly into: Uint8Array
  at: number
  readonly end: number
}

export class Receiver {
  readonly #capacity: number
  #buffer: SharedBuffer
  start = 0
  end = 0
  #diversion: Diversion | undefined
  #roomIsDiverted = false

  /** `capacity` bytes: at least twice the longest message that is not diverted. */
  constructor(capacity: number) {
    this.#capacity = capacity
    this.#buffer = new SharedBuffer(capacity)
  }

  get bytes(): Uint8Array {
    return this.#buffer.bytes
  }

  /** The buffer behind `bytes`, for a request that uses its data for longer: retain it. */
  get buffer(): SharedBuffer {
    return this.#buffer
  }

  get length(): number {
    return this.end - this.start
  }

  /** True while the data of a diverted payload is not complete. */
  get isDiverting(): boolean {
    return this.#diversion !== undefined
  }

  /** Where the next bytes are to be read; valid until `arrived`. Never empty. */
  room(): Uint8Array {
    const diversion = this.#diversion
    this.#roomIsDiverted = diversion !== undefined
    if (diversion !== undefined) return diversion.into.subarray(diversion.at, diversion.end)
    if (!this.#buffer.isShared) {
      if (this.start === this.end) this.start = this.end = 0
      else if (this.end > this.#capacity / 2) this.#moveToFront(this.#buffer)
    } else if (this.end > this.#capacity / 2) this.#replace()
    return this.end === 0 ? this.bytes : this.bytes.subarray(this.end)
  }

  /** `count` bytes were read into the `room` given last. */
  arrived(count: number): void {
    const diversion = this.#diversion
    if (!this.#roomIsDiverted) {
      this.end += count
      if (diversion !== undefined) this.#feed(diversion)
    } else if (diversion !== undefined) {
      diversion.at += count
      if (diversion.at === diversion.end) this.#diversion = undefined
    }
  }

  /** Sends the next `length` bytes to `into[at]`: those that are here at once, the others as they arrive. */
  divert(into: Uint8Array, at: number, length: number): void {
    this.#diversion = { into, at, end: at + length }
    this.#feed(this.#diversion)
  }

  /** Gives the buffer back. The socket must be closed: it no longer writes to `room`. */
  dispose(): void {
    this.#diversion = undefined
    this.start = this.end = 0
    this.#buffer.release()
  }

  #feed(diversion: Diversion): void {
    const count = Math.min(this.length, diversion.end - diversion.at)
    copyBytes(this.bytes, this.start, diversion.into, diversion.at, count)
    this.start += count
    diversion.at += count
    if (diversion.at === diversion.end) this.#diversion = undefined
  }

  #moveToFront(target: SharedBuffer): void {
    const length = this.length
    copyBytes(this.bytes, this.start, target.bytes, 0, length)
    this.start = 0
    this.end = length
  }

  /** Slow requests use data in the buffer: leaves it to them and goes on in another. */
  #replace(): void {
    const old = this.#buffer
    const fresh = new SharedBuffer(this.#capacity)
    this.#moveToFront(fresh)
    this.#buffer = fresh
    old.release()
  }
}
