// A filter that asks before every request whether it may go on, now or later. Fault and delay are made of it.

import { andThen, type BlockDevice, type ExtentVisitor, type Pending } from '../block/device.ts'
import { Filter } from '../block/filter.ts'

/** A request on its way; offset and length are 0 for a flush. Bytes. */
export interface Request {
  readonly kind: 'read' | 'write' | 'zero' | 'trim' | 'flush' | 'extents'
  readonly offset: number
  readonly length: number
}

export class InterceptFilter extends Filter {
  readonly #before: (request: Request) => Pending

  /** `before` lets a request go on, later when it returns a promise; what it throws or rejects with, the request fails with. */
  constructor(inner: BlockDevice, before: (request: Request) => Pending) {
    super(inner)
    this.#before = before
  }

  override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return andThen(this.#before({ kind: 'read', offset, length }), () => this.inner.read(offset, length, into, at))
  }

  override write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    const ready = this.#before({ kind: 'write', offset, length })
    return andThen(ready, () => this.inner.write(offset, length, from, at, flags))
  }

  override zero(offset: number, length: number, flags: number): Pending {
    return andThen(this.#before({ kind: 'zero', offset, length }), () => this.inner.zero(offset, length, flags))
  }

  override trim(offset: number, length: number, flags: number): Pending {
    return andThen(this.#before({ kind: 'trim', offset, length }), () => this.inner.trim(offset, length, flags))
  }

  override flush(): Pending {
    return andThen(this.#before({ kind: 'flush', offset: 0, length: 0 }), () => this.inner.flush())
  }

  override extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    const ready = this.#before({ kind: 'extents', offset, length })
    return andThen(ready, () => this.inner.extents(offset, length, visit))
  }
}
