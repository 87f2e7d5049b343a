// A disk of a backup that stays readable while prunings move its blobs to other packs: when a read meets a pack that is gone, it
// looks anew where things are and reads again. Damage that stays is told as it is.

import { systemClock } from '../base/clock.ts'
import { RENEW_EVERY_MS } from '../base/limits.ts'
import type { BlockDevice, ExtentVisitor, Pending } from '../block/device.ts'
import { isBlockError } from '../block/error.ts'
import { Filter } from '../block/filter.ts'

/** A newer device over the same disk, or undefined when nothing has moved. */
export type Renew = () => Promise<BlockDevice | undefined>

export class RenewingDevice extends Filter {
  readonly #renew: Renew
  #current: BlockDevice
  #triedMs = Number.NEGATIVE_INFINITY

  constructor(device: BlockDevice, renew: Renew) {
    super(device)
    this.#current = device
    this.#renew = renew
  }

  override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    const device = this.#current
    const pending = device.read(offset, length, into, at)
    return pending?.catch((error: unknown) =>
      this.#again(error, device, (newer) => newer.read(offset, length, into, at)),
    )
  }

  override extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    const device = this.#current
    let said = 0
    const counted: ExtentVisitor = (piece, extent) => {
      said += piece
      return visit(piece, extent)
    }
    const pending = device.extents(offset, length, counted)
    return pending?.catch((error: unknown) =>
      this.#again(error, device, (newer) => newer.extents(offset + said, length - said, visit)),
    )
  }

  async #again(error: unknown, tried: BlockDevice, work: (device: BlockDevice) => Pending): Promise<void> {
    if (!isBlockError(error, 'corrupt')) throw error
    if (this.#current === tried) {
      if (systemClock.now() - this.#triedMs < RENEW_EVERY_MS) throw error
      const newer = await this.#renew()
      if (newer === undefined) {
        this.#triedMs = systemClock.now()
        throw error
      }
      this.#current = newer
    }
    await work(this.#current)
  }
}
