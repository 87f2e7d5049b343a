// The target of a full that is made by comparison: all of the disk comes here, and only the granules in which it differs from an earlier
// backup go on to the new one, which has the others from that. What lies past the earlier one's end was zeros.

import { GRANULE } from '../base/limits.ts'
import { roundUp } from '../base/round.ts'
import { type BlockDevice, ZERO } from '../block/device.ts'
import { copyPool } from '../block/pool.ts'
import type { CopyTarget } from './copier.ts'

export class ComparedTarget implements CopyTarget {
  readonly #target: CopyTarget
  readonly #before: BlockDevice
  /** Bytes that were found to differ. */
  differentBytes = 0

  /** `before` is the disk as the earlier backup has it. */
  constructor(target: CopyTarget, before: BlockDevice) {
    this.#target = target
    this.#before = before
  }

  async write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Promise<void> {
    const old = copyPool.take(length)
    try {
      await readPadded(this.#before, offset, length, old)
      for (const [start, end] of differences(from, at, old, length)) {
        this.differentBytes += end - start
        const pending = this.#target.write(offset + start, end - start, from, at + start, flags)
        if (pending !== undefined) await pending
      }
    } finally {
      copyPool.give(old)
    }
  }

  /** What was zeros by the earlier backup's map stays as it is. */
  async zero(offset: number, length: number, flags: number): Promise<void> {
    const present = Math.max(0, Math.min(length, this.#before.size - offset))
    if (present === 0) return
    const data: [number, number][] = []
    let position = offset
    const asked = this.#before.extents(offset, present, (piece, extent) => {
      if ((extent & ZERO) === 0) data.push([position, piece])
      position += piece
      return true
    })
    if (asked !== undefined) await asked
    for (const [start, piece] of data) {
      // The earlier backup may end within a granule.
      const whole = Math.min(roundUp(piece, GRANULE), offset + length - start)
      this.differentBytes += whole
      const pending = this.#target.zero(start, whole, flags)
      if (pending !== undefined) await pending
    }
  }
}

/** Reads the range; what lies past the device's end is zeros. */
export async function readPadded(device: BlockDevice, offset: number, length: number, into: Uint8Array): Promise<void> {
  const present = Math.max(0, Math.min(length, device.size - offset))
  const pending = present === 0 ? undefined : device.read(offset, present, into, 0)
  if (pending !== undefined) await pending
  if (present < length) into.fill(0, present, length)
}

/** Runs of granules in which two buffers differ, as offsets from their beginnings. */
export function* differences(
  one: Uint8Array,
  at: number,
  other: Uint8Array,
  length: number,
): Iterable<readonly [start: number, end: number]> {
  let begun = -1
  for (let start = 0; start < length; start += GRANULE) {
    const end = Math.min(length, start + GRANULE)
    const isSame = Buffer.compare(one.subarray(at + start, at + end), other.subarray(start, end)) === 0
    if (!isSame && begun < 0) begun = start
    if (isSame && begun >= 0) {
      yield [begun, start]
      begun = -1
    }
  }
  if (begun >= 0) yield [begun, length]
}
