// A device that seems longer than it is: past its end there are zeros. For reading only.

import {
  andThen,
  type BlockDevice,
  type Capabilities,
  type ExtentVisitor,
  HOLE,
  type Pending,
  ZERO,
} from '../block/device.ts'
import { Filter } from '../block/filter.ts'

/** Shows the inner device, and zeros after it up to `size` bytes. Closing it closes the inner device. */
export class PaddedFilter extends Filter {
  readonly #size: number
  readonly #capabilities: Capabilities

  constructor(inner: BlockDevice, size: number) {
    super(inner)
    this.#size = Math.max(size, inner.size)
    this.#capabilities = { ...inner.can, write: false }
  }

  override get size(): number {
    return this.#size
  }

  override get can(): Capabilities {
    return this.#capabilities
  }

  override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    const shown = this.#shown(offset, length)
    into.fill(0, at + shown, at + length)
    return shown === 0 ? undefined : this.inner.read(offset, shown, into, at)
  }

  override extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    const shown = this.#shown(offset, length)
    let isStopped = false
    const visitInner: ExtentVisitor = (piece, extent) => {
      isStopped = !visit(piece, extent)
      return !isStopped
    }
    const wait = shown === 0 ? undefined : this.inner.extents(offset, shown, visitInner)
    return andThen(wait, () => {
      if (shown < length && !isStopped) visit(length - shown, HOLE | ZERO)
      return undefined
    })
  }

  /** How many bytes of the range the inner device has. */
  #shown(offset: number, length: number): number {
    return Math.min(length, Math.max(0, this.inner.size - offset))
  }
}
