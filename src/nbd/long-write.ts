// A write that is longer than what has arrived of it: which part of its data can go to the device now. Parts go straight from
// where they arrived, in pieces that end on multiples of what the device writes best, so that no cluster is copied on
// write twice. Only a block longer than the receiver keeps together is gathered first. Asks no device and answers nobody.
//
//   offset |  piece  |  piece  |  piece  | what is left, arriving |
//              \ in flight, or done /

import { copyBytes } from '../base/bytes.ts'
import { NBD_RECEIVE_BUFFER, NBD_WRITE_PIECE } from '../base/limits.ts'
import { roundDown, roundUp } from '../base/round.ts'
import type { Receiver } from './receiver.ts'
import { SharedBuffer } from './shared-buffer.ts'
import { REQUEST_SIZE } from './spec.ts'

export class LongWrite {
  /** The request as it came, without its data. */
  readonly header = new Uint8Array(REQUEST_SIZE)
  /** Where the next piece belongs on the device, and how much of the request is left, with it; bytes. */
  offset = 0
  left = 0
  /** A flush is owed when all is written. */
  needsFlush = false
  /** What the device has not finished: pieces, then the flush. */
  inFlight = 0
  /** The first failure; what arrives after it is thrown away. */
  failure: unknown
  /** The piece that is ready lies in `buffer` at `at`. */
  buffer: SharedBuffer | undefined
  at = 0
  length = 0
  #block = 1
  #gathering: SharedBuffer | undefined

  /** Begins with the request at `bytes[start]`. `bestBlock` is the device's. */
  begin(bytes: Uint8Array, start: number, offset: number, length: number, bestBlock: number): void {
    copyBytes(bytes, start, this.header, 0, REQUEST_SIZE)
    this.offset = offset
    this.left = length
    this.needsFlush = false
    this.failure = undefined
    this.#block = bestBlock
  }

  /** True when there is a piece to deal with: to write, or after a failure to throw away. Deal with it, then `take` it. */
  isReady(receiver: Receiver): boolean {
    const here = receiver.length
    this.at = receiver.start
    if (this.#gathering !== undefined) {
      this.at = 0
      return !receiver.isDiverting
    }
    this.buffer = receiver.buffer
    if (this.failure !== undefined) {
      this.length = Math.min(here, this.left)
      return this.length > 0
    }
    const least = this.#leastPiece()
    if (here >= least) {
      this.length = here >= this.left ? this.left : roundDown(this.offset + here, this.#block) - this.offset
      return true
    }
    // The receiver keeps half its buffer together while more arrives.
    if (least > NBD_RECEIVE_BUFFER / 2) this.#gather(receiver, least)
    return false
  }

  /** The piece is dealt with: on to the next. */
  take(receiver: Receiver): void {
    if (this.#gathering === undefined) receiver.start += this.length
    this.offset += this.length
    this.left -= this.length
    this.drop()
  }

  /** Lets go of the piece. */
  drop(): void {
    this.#gathering?.release()
    this.#gathering = undefined
    this.buffer = undefined
  }

  /** The shortest piece that is worth a request of its own: it ends a block, or the whole. */
  #leastPiece(): number {
    const block = this.#block
    const end = roundUp(this.offset + (block > NBD_WRITE_PIECE ? 1 : NBD_WRITE_PIECE), block)
    return Math.min(this.left, end - this.offset)
  }

  #gather(receiver: Receiver, length: number): void {
    this.#gathering = new SharedBuffer(length)
    this.buffer = this.#gathering
    this.length = length
    receiver.divert(this.#gathering.bytes, 0, length)
  }
}
