// A part of a device as a device of its own: a partition, or the data inside a container file.

import type { ExtentVisitor, Pending } from '../block/device.ts'
import type { BlockDevice } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { Filter } from '../block/filter.ts'

/** Shows `size` bytes of the inner device, from byte `start`. Closing it closes the inner device. */
export class SliceFilter extends Filter {
  readonly #start: number
  readonly #size: number

  /** Fails with kind 'out-of-range' when the part is not inside the device, or not made of its smallest blocks. */
  constructor(inner: BlockDevice, start: number, size: number) {
    super(inner)
    const unit = inner.can.minimumBlock
    const isInside = Number.isSafeInteger(start) && Number.isSafeInteger(size) && start >= 0 && size >= 0
    if (!isInside || start + size > inner.size || start % unit !== 0 || size % unit !== 0) {
      const message = `${inner.name}: ${size} bytes at ${start} are not a part of its ${inner.size} bytes in units of ${unit}`
      throw new BlockError('out-of-range', message, { device: inner.name, offset: start, length: size })
    }
    this.#start = start
    this.#size = size
  }

  override get size(): number {
    return this.#size
  }

  override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.inner.read(this.#start + offset, length, into, at)
  }

  override write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    return this.inner.write(this.#start + offset, length, from, at, flags)
  }

  override zero(offset: number, length: number, flags: number): Pending {
    return this.inner.zero(this.#start + offset, length, flags)
  }

  override trim(offset: number, length: number, flags: number): Pending {
    return this.inner.trim(this.#start + offset, length, flags)
  }

  override extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.inner.extents(this.#start + offset, length, visit)
  }
}
