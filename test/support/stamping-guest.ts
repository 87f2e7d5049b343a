// A guest that writes pieces of a disk, each stamped with a growing number, and knows what may be read of each after a crash.

import assert from 'node:assert/strict'
import type { BlockDevice } from '../../src/block/device.ts'

/** Bytes of a piece, and of what may be torn from it. */
export const STAMPED_PIECE = 4096
const SECTOR = 512

/** Stamps pieces, at most 255 times: a stamp is a byte, and 0 is a piece that was never written. */
export class StampingGuest {
  readonly issued: Uint8Array
  readonly acknowledged: Uint8Array
  readonly flushed: Uint8Array
  #next = 1

  /** `size` of the disk, in bytes. */
  constructor(size: number) {
    this.issued = new Uint8Array(size / STAMPED_PIECE)
    this.acknowledged = new Uint8Array(size / STAMPED_PIECE)
    this.flushed = new Uint8Array(size / STAMPED_PIECE)
  }

  async write(device: BlockDevice, piece: number): Promise<void> {
    const stamp = this.#next++
    assert.ok(stamp < 256, 'a stamp is a byte')
    this.issued[piece] = stamp
    await device.write(piece * STAMPED_PIECE, STAMPED_PIECE, Buffer.alloc(STAMPED_PIECE, stamp), 0, 0)
    this.acknowledged[piece] = stamp
  }

  async flush(device: BlockDevice): Promise<void> {
    const before = this.acknowledged.slice()
    await device.flush()
    this.flushed.set(before)
  }
}

/** Fails unless every sector of `bytes` has one stamp, and none older or newer than its piece may have. */
export function checkStamps(bytes: Buffer, oldest: Uint8Array, newest: Uint8Array, note: string): void {
  for (let at = 0; at < bytes.length; at += SECTOR) {
    const stamp = bytes[at] as number
    const piece = Math.floor(at / STAMPED_PIECE)
    assert.ok(bytes.subarray(at, at + SECTOR).equals(Buffer.alloc(SECTOR, stamp)), `${note}: torn at ${at}`)
    const isRight = stamp >= (oldest[piece] as number) && stamp <= (newest[piece] as number)
    assert.ok(isRight, `${note}: ${stamp} at ${at}, not ${oldest[piece]} to ${newest[piece]}`)
  }
}
