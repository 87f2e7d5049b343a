// What devices share that are only ever read. A request that would change one is a mistake of the program's: whoever serves a device
// asks first what it can.

import { assert } from '../base/assert.ts'
import type { BlockDevice, Capabilities, ExtentVisitor, Pending } from './device.ts'

export const READ_ONLY: Capabilities = {
  write: false,
  fua: 'none',
  zero: 'none',
  trim: 'none',
  extents: 'native',
  minimumBlock: 1,
  bestBlock: 65_536,
}

export abstract class ReadOnlyDevice implements BlockDevice {
  abstract readonly name: string
  abstract readonly size: number
  readonly can = READ_ONLY

  abstract read(offset: number, length: number, into: Uint8Array, at: number): Pending
  abstract extents(offset: number, length: number, visit: ExtentVisitor): Pending
  abstract close(): Promise<void>

  write(): Pending {
    return this.#refuse()
  }

  zero(): Pending {
    return this.#refuse()
  }

  trim(): Pending {
    return this.#refuse()
  }

  flush(): Pending {
    return undefined
  }

  #refuse(): never {
    assert(false, `${this.name} is only read`)
  }
}
