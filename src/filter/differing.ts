// A device that is written only where that changes it: what is there already is read and compared instead. Writes of a range must not
// overlap with others meanwhile.

import { isZero } from '../base/bytes.ts'
import { GRANULE } from '../base/limits.ts'
import { FUA, type Pending } from '../block/device.ts'
import { Filter } from '../block/filter.ts'
import { copyPool } from '../block/pool.ts'

export class DifferingFilter extends Filter {
  /** Bytes that were compared, and bytes that had to be written. */
  comparedBytes = 0
  changedBytes = 0

  override write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    if ((flags & FUA) !== 0) return this.inner.write(offset, length, from, at, flags)
    return this.#change(
      offset,
      length,
      (there, start, size) => !isEqual(there, start, from, at + start, size),
      (start, size) => this.inner.write(offset + start, size, from, at + start, flags),
    )
  }

  override zero(offset: number, length: number, flags: number): Pending {
    if ((flags & FUA) !== 0) return this.inner.zero(offset, length, flags)
    return this.#change(
      offset,
      length,
      (there, start, size) => !isZero(there, start, size),
      (start, size) => this.inner.zero(offset + start, size, flags),
    )
  }

  /** Compares a range, granule by granule, with what is there, and changes the runs that differ. */
  async #change(
    offset: number,
    length: number,
    differs: (there: Uint8Array, start: number, size: number) => boolean,
    change: (start: number, size: number) => Pending,
  ): Promise<void> {
    const there = copyPool.take(length)
    try {
      const read = this.inner.read(offset, length, there, 0)
      if (read !== undefined) await read
      this.comparedBytes += length
      let run = 0
      for (let start = 0; start < length; ) {
        const size = Math.min(length - start, GRANULE - ((offset + start) % GRANULE))
        const isDifferent = differs(there, start, size)
        start += size
        if (isDifferent) run += size
        const end = isDifferent ? start : start - size
        if (run === 0 || (isDifferent && start < length)) continue
        this.changedBytes += run
        const pending = change(end - run, run)
        run = 0
        if (pending !== undefined) await pending
      }
    } finally {
      copyPool.give(there)
    }
  }
}

function isEqual(one: Uint8Array, oneAt: number, two: Uint8Array, twoAt: number, length: number): boolean {
  return Buffer.compare(one.subarray(oneAt, oneAt + length), two.subarray(twoAt, twoAt + length)) === 0
}
