// A device over a device that passes everything on. A filter extends it and defines only what it changes. Every method
// is here by name: a method added to BlockDevice does not compile until this file decides what passing it on means.

import type { BlockDevice, Capabilities, ExtentVisitor, Pending } from './device.ts'

export class Filter implements BlockDevice {
  protected readonly inner: BlockDevice

  constructor(inner: BlockDevice) {
    this.inner = inner
  }

  get name(): string {
    return this.inner.name
  }

  get size(): number {
    return this.inner.size
  }

  get can(): Capabilities {
    return this.inner.can
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.inner.read(offset, length, into, at)
  }

  write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    return this.inner.write(offset, length, from, at, flags)
  }

  zero(offset: number, length: number, flags: number): Pending {
    return this.inner.zero(offset, length, flags)
  }

  trim(offset: number, length: number, flags: number): Pending {
    return this.inner.trim(offset, length, flags)
  }

  flush(): Pending {
    return this.inner.flush()
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.inner.extents(offset, length, visit)
  }

  close(): Promise<void> {
    return this.inner.close()
  }
}
