// A view of a device that refuses every change.

import type { Capabilities, Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { Filter } from '../block/filter.ts'

/** Changes fail with kind 'read-only'; reads and extents pass. A flush does nothing: there is nothing to make durable. */
export class ReadonlyFilter extends Filter {
  override get can(): Capabilities {
    return { ...this.inner.can, write: false, zero: 'none', trim: 'none' }
  }

  override write(): Pending {
    throw this.#refusal('write')
  }

  override zero(): Pending {
    throw this.#refusal('zero')
  }

  override trim(): Pending {
    throw this.#refusal('trim')
  }

  override flush(): Pending {
    return undefined
  }

  #refusal(verb: string): BlockError {
    return new BlockError('read-only', `${this.name} is read-only: ${verb} refused`, { device: this.name })
  }
}
