// A device in memory, for tests and small things. Keeps which 4 KiB pages were ever written, so that its extents tell
// holes from data. It completes every request within the call.

import { copyBytes } from '../base/bytes.ts'
import { type BlockDevice, type Capabilities, type ExtentVisitor, HOLE, type Pending, ZERO } from './device.ts'

const PAGE = 4096

export class MemoryDevice implements BlockDevice {
  readonly name: string
  readonly size: number
  readonly can: Capabilities = {
    write: true,
    fua: 'native',
    zero: 'native',
    trim: 'native',
    extents: 'native',
    minimumBlock: 1,
    bestBlock: PAGE,
  }
  readonly bytes: Uint8Array
  readonly #allocated: Uint8Array

  constructor(size: number, name = 'memory') {
    this.name = name
    this.size = size
    this.bytes = new Uint8Array(size)
    this.#allocated = new Uint8Array(Math.ceil(size / PAGE))
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    copyBytes(this.bytes, offset, into, at, length)
    return undefined
  }

  write(offset: number, length: number, from: Uint8Array, at: number, _flags: number): Pending {
    copyBytes(from, at, this.bytes, offset, length)
    this.#allocated.fill(1, Math.floor(offset / PAGE), Math.ceil((offset + length) / PAGE))
    return undefined
  }

  zero(offset: number, length: number, _flags: number): Pending {
    this.bytes.fill(0, offset, offset + length)
    // Only whole pages become holes; the ends keep whatever else their page holds.
    const first = Math.ceil(offset / PAGE)
    const end = offset + length === this.size ? this.#allocated.length : Math.floor((offset + length) / PAGE)
    if (first < end) this.#allocated.fill(0, first, end)
    return undefined
  }

  trim(offset: number, length: number, flags: number): Pending {
    return this.zero(offset, length, flags)
  }

  flush(): Pending {
    return undefined
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    const end = offset + length
    while (offset < end) {
      const page = Math.floor(offset / PAGE)
      let next = page + 1
      while (next * PAGE < end && this.#allocated[next] === this.#allocated[page]) next++
      const piece = Math.min(end, next * PAGE) - offset
      if (!visit(piece, this.#allocated[page] === 1 ? 0 : HOLE | ZERO)) return undefined
      offset += piece
    }
    return undefined
  }

  async close(): Promise<void> {}
}
