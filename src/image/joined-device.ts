// Several devices one after the other as one, to be read: what a conversion with several sources takes.
//
//   | first ...... | second ... | third |

import { assert } from '../base/assert.ts'
import { andThen, type BlockDevice, type ExtentVisitor, type Pending } from '../block/device.ts'
import { ReadOnlyDevice } from '../block/read-only-device.ts'

export class JoinedDevice extends ReadOnlyDevice {
  readonly name: string
  readonly size: number
  readonly #parts: readonly { readonly device: BlockDevice; readonly start: number; readonly end: number }[]

  /** Takes the devices over: closing this closes them. */
  constructor(devices: readonly BlockDevice[]) {
    super()
    let end = 0
    this.#parts = devices.map((device) => ({ device, start: end, end: (end += device.size) }))
    this.name = devices.map(({ name }) => name).join(' + ')
    this.size = end
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    for (const { device, start, end } of this.#parts) {
      if (offset < start || offset >= end) continue
      const piece = Math.min(length, end - offset)
      return andThen(device.read(offset - start, piece, into, at), () =>
        piece === length ? undefined : this.read(end, length - piece, into, at + piece),
      )
    }
    assert(length === 0, 'the range lies within the devices')
    return undefined
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    let isStopped = false
    for (const { device, start, end } of this.#parts) {
      if (offset < start || offset >= end) continue
      const piece = Math.min(length, end - offset)
      const wait = device.extents(offset - start, piece, (found, extent) => {
        isStopped ||= !visit(found, extent)
        return !isStopped
      })
      return andThen(wait, () => (isStopped || piece === length ? undefined : this.extents(end, length - piece, visit)))
    }
    return undefined
  }

  async close(): Promise<void> {
    for (const { device } of this.#parts) await device.close()
  }
}
