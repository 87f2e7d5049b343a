// A host file, or a host block device, as a BlockDevice: byte for byte, with the size it has when it is opened. Holes are kept:
// trimmed ranges are deallocated, and zeros where they may be. Knows nothing of what the bytes mean, and never grows the file.

import { type BlockDevice, type Capabilities, type ExtentVisitor, MAY_UNMAP, type Pending } from '../block/device.ts'
import type { HostFile } from '../host/host.ts'

export class FileDevice implements BlockDevice {
  readonly name: string
  protected readonly file: HostFile
  /** Bytes; a subclass that grows the file says so here. */
  protected bytes: number

  /** Takes the open file over: closing the device closes it. It can be written when the file can. */
  constructor(file: HostFile, name: string = file.path) {
    this.name = name
    this.file = file
    this.bytes = file.size()
  }

  get size(): number {
    return this.bytes
  }

  get can(): Capabilities {
    return this.file.writable ? WRITABLE_FILE : READ_ONLY_FILE
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.file.read(offset, length, into, at)
  }

  write(offset: number, length: number, from: Uint8Array, at: number, _flags: number): Pending {
    return this.file.write(offset, length, from, at)
  }

  zero(offset: number, length: number, flags: number): Pending {
    if ((flags & MAY_UNMAP) !== 0) return this.file.punch(offset, length)
    return this.file.zero(offset, length)
  }

  trim(offset: number, length: number, _flags: number): Pending {
    return this.file.punch(offset, length)
  }

  flush(): Pending {
    return this.can.write ? this.file.sync() : undefined
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.file.extents(offset, length, visit)
  }

  close(): Promise<void> {
    return this.file.close()
  }
}

/** What a file can that may only be read. */
export const READ_ONLY_FILE: Capabilities = {
  write: false,
  fua: 'emulated',
  zero: 'native',
  trim: 'native',
  // Whether holes can be told from data is the file system's affair; without that, all is data.
  extents: 'emulated',
  minimumBlock: 1,
  bestBlock: 4096,
}
const WRITABLE_FILE: Capabilities = { ...READ_ONLY_FILE, write: true }
