// The door of a device: range, buffer, capability and open state are checked here once, so that everything below only
// asserts. It also emulates what the device says is 'emulated' by FUA: a flush after the request.

import { REQUEST_MAX } from '../base/limits.ts'
import { andThen, type BlockDevice, type Capabilities, type ExtentVisitor, FUA, type Pending } from './device.ts'
import { BlockError } from './error.ts'

/** Wraps `device` so that a bad request fails with a clear BlockError and never reaches it. */
export function guard(device: BlockDevice): BlockDevice {
  return device instanceof Guard ? device : new Guard(device)
}

class Guard implements BlockDevice {
  readonly #device: BlockDevice
  #closed = false

  constructor(device: BlockDevice) {
    this.#device = device
  }

  get name(): string {
    return this.#device.name
  }

  get size(): number {
    return this.#device.size
  }

  get can(): Capabilities {
    return this.#device.can
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    this.#checkRange('read', offset, length)
    this.#checkBuffer('read', length, into, at)
    return length === 0 ? undefined : this.#device.read(offset, length, into, at)
  }

  write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    this.#checkWrite('write', offset, length)
    this.#checkBuffer('write', length, from, at)
    if (length === 0) return undefined
    if ((flags & FUA) === 0 || this.can.fua === 'native') return this.#device.write(offset, length, from, at, flags)
    return andThen(this.#device.write(offset, length, from, at, flags & ~FUA), () => this.#device.flush())
  }

  zero(offset: number, length: number, flags: number): Pending {
    this.#checkWrite('zero', offset, length)
    if (this.can.zero === 'none') throw this.#unsupported('zero')
    if (length === 0) return undefined
    if ((flags & FUA) === 0 || this.can.fua === 'native') return this.#device.zero(offset, length, flags)
    return andThen(this.#device.zero(offset, length, flags & ~FUA), () => this.#device.flush())
  }

  trim(offset: number, length: number, flags: number): Pending {
    this.#checkWrite('trim', offset, length)
    if (this.can.trim === 'none') throw this.#unsupported('trim')
    if (length === 0) return undefined
    if ((flags & FUA) === 0 || this.can.fua === 'native') return this.#device.trim(offset, length, flags)
    return andThen(this.#device.trim(offset, length, flags & ~FUA), () => this.#device.flush())
  }

  flush(): Pending {
    this.#checkOpen('flush')
    return this.#device.flush()
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    this.#checkRange('extents', offset, length)
    return length === 0 ? undefined : this.#device.extents(offset, length, visit)
  }

  async close(): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    await this.#device.close()
  }

  #checkOpen(verb: string): void {
    if (this.#closed) throw new BlockError('closed', `${this.name}: ${verb} after close`, { device: this.name })
  }

  #checkRange(verb: string, offset: number, length: number): void {
    this.#checkOpen(verb)
    if (
      !Number.isSafeInteger(offset) ||
      !Number.isSafeInteger(length) ||
      offset < 0 ||
      length < 0 ||
      offset + length > this.size
    ) {
      const message = `${this.name}: ${verb} of ${length} bytes at ${offset} is outside the ${this.size} bytes`
      throw new BlockError('out-of-range', message, { device: this.name, offset, length })
    }
    const unit = this.can.minimumBlock
    if (offset % unit !== 0 || length % unit !== 0) {
      const message = `${this.name}: ${verb} of ${length} bytes at ${offset} is not a multiple of ${unit} bytes`
      throw new BlockError('invalid-argument', message, { device: this.name, offset, length })
    }
  }

  #checkBuffer(verb: string, length: number, buffer: Uint8Array, at: number): void {
    if (!Number.isSafeInteger(at) || at < 0 || at + length > buffer.length || length > REQUEST_MAX) {
      const message = `${this.name}: ${verb} of ${length} bytes does not fit its buffer of ${buffer.length} at ${at}`
      throw new BlockError('invalid-argument', message, { device: this.name, length })
    }
  }

  #checkWrite(verb: string, offset: number, length: number): void {
    this.#checkRange(verb, offset, length)
    if (!this.can.write) throw new BlockError('read-only', `${this.name} is read-only`, { device: this.name })
  }

  #unsupported(verb: string): BlockError {
    return new BlockError('unsupported', `${this.name} does not support ${verb}`, { device: this.name })
  }
}
