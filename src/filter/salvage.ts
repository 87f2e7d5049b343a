// A view of a device that reads over what cannot be read: as zeros, and telling which ranges these were. Who cannot say what is
// allocated says that all of it is.

import type { ExtentVisitor, Pending } from '../block/device.ts'
import { isBlockError } from '../block/error.ts'
import { Filter } from '../block/filter.ts'
import type { BlockDevice } from '../block/device.ts'

/** Granule of what is given up, in bytes. */
const UNIT = 4096

/** Is told of each range that is lost, in bytes: apart, in no order, and once for each read of it. */
export type Lost = (offset: number, length: number, reason: string) => void

export class SalvageFilter extends Filter {
  readonly #lost: Lost

  constructor(inner: BlockDevice, lost: Lost) {
    super(inner)
    this.#lost = lost
  }

  override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    const pending = this.inner.read(offset, length, into, at)
    return pending?.catch((error: unknown) => this.#halves(error, offset, length, into, at))
  }

  override extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    let said = 0
    let isEnough = false
    const counted: ExtentVisitor = (piece, extent) => {
      said += piece
      isEnough = !visit(piece, extent)
      return !isEnough
    }
    const pending = this.inner.extents(offset, length, counted)
    return pending?.catch((error: unknown) => {
      if (!isBlockError(error)) throw error
      if (!isEnough && said < length) visit(length - said, 0)
    })
  }

  /** Reads each half by itself, down to the granules. */
  async #halves(error: unknown, offset: number, length: number, into: Uint8Array, at: number): Promise<void> {
    if (!isBlockError(error)) throw error
    if (length <= UNIT) {
      into.fill(0, at, at + length)
      return this.#lost(offset, length, error.message)
    }
    // Cut where a granule begins, whatever the offset.
    const middle = Math.max(offset + 1, Math.ceil((offset + length / 2) / UNIT) * UNIT)
    const first = middle < offset + length ? middle - offset : length >>> 1
    for (const [start, size] of [
      [0, first],
      [first, length - first],
    ] as const) {
      const pending = this.read(offset + start, size, into, at + start)
      if (pending !== undefined) await pending
    }
  }
}
