// A view of a disk's moment as a device that can be exported: reads and extents are those of the view, FLUSH flushes the disk itself,
// nothing can be written. Where its reader acknowledges, TRIM says that a range has been read: its scratch is free, and it reads as an error;
// what is left is known here.

import { GRANULE } from '../base/limits.ts'
import { roundDown, roundUp } from '../base/round.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import type { BlockDevice, Capabilities, ExtentVisitor, Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { BackupView } from './backup.ts'

export interface ViewDeviceOptions {
  /** Its reader acknowledges what it has. */
  readonly acknowledges: boolean
  /** What can be read, in granules of GRANULE; all unless given. */
  readonly readable?: Bitmap | undefined
  /** Called for each request. */
  readonly touched?: () => void
}

export class ViewDevice implements BlockDevice {
  readonly name: string
  readonly can: Capabilities
  readonly #view: BackupView
  readonly #touched: () => void
  /** What was not acknowledged. */
  readonly left: Bitmap

  constructor(name: string, view: BackupView, { acknowledges, readable, touched = () => {} }: ViewDeviceOptions) {
    this.name = name
    this.#view = view
    this.#touched = touched
    this.left = readable?.copy() ?? new Bitmap(view.size, GRANULE)
    if (readable === undefined) this.left.setAll()
    this.can = {
      // Without it the protocol allows no TRIM; a write itself is refused.
      write: acknowledges,
      fua: 'emulated',
      zero: 'none',
      trim: acknowledges ? 'native' : 'none',
      extents: 'native',
      minimumBlock: 1,
      bestBlock: GRANULE,
    }
  }

  get size(): number {
    return this.#view.size
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    this.#touched()
    return this.#view.read(offset, length, into, at)
  }

  write(): Pending {
    throw new BlockError('read-only', `${this.name} cannot be written`, { device: this.name })
  }

  zero(): Pending {
    return this.write()
  }

  /** Of a granule that was read in part the rest is still needed. */
  trim(offset: number, length: number): Pending {
    const start = roundUp(offset, GRANULE)
    const end = offset + length === this.size ? this.size : roundDown(offset + length, GRANULE)
    this.#touched()
    if (end <= start) return undefined
    this.left.clear(start, end - start)
    this.#view.release(start, end - start)
    return undefined
  }

  flush(): Pending {
    this.#touched()
    return this.#view.flushDisk()
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    this.#touched()
    return this.#view.extents(offset, length, visit)
  }

  async close(): Promise<void> {}
}
