// Tells when the device below has stopped answering: requests are in flight, and for so long none has ended. What is done about
// that is the caller's; each request waits for the device, as long as it takes.

import type { BlockDevice, ExtentVisitor, Pending } from '../block/device.ts'
import { Filter } from '../block/filter.ts'

/** A flush may take so many times as long as any other request: all that was written waits for it. */
const FLUSH_PATIENCE = 6

export class StallFilter extends Filter {
  readonly #limitMs: number
  readonly #stalled: () => void
  readonly #timer: NodeJS.Timeout
  #inFlight = 0
  #flushes = 0
  #lastEndedMs = 0

  /** Calls `stalled`, again and again, while nothing has ended for `limitMs` milliseconds or longer. */
  constructor(inner: BlockDevice, limitMs: number, stalled: () => void) {
    super(inner)
    this.#limitMs = limitMs
    this.#stalled = stalled
    this.#timer = setInterval(() => this.#look(), limitMs / 5)
    this.#timer.unref()
  }

  override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.#counted(this.inner.read(offset, length, into, at))
  }

  override write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    return this.#counted(this.inner.write(offset, length, from, at, flags))
  }

  override zero(offset: number, length: number, flags: number): Pending {
    return this.#counted(this.inner.zero(offset, length, flags))
  }

  override trim(offset: number, length: number, flags: number): Pending {
    return this.#counted(this.inner.trim(offset, length, flags))
  }

  override flush(): Pending {
    const pending = this.#counted(this.inner.flush())
    if (pending === undefined) return undefined
    this.#flushes++
    return pending.finally(() => void this.#flushes--)
  }

  override extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.#counted(this.inner.extents(offset, length, visit))
  }

  override async close(): Promise<void> {
    clearInterval(this.#timer)
    await this.inner.close()
  }

  #counted(pending: Pending): Pending {
    if (pending === undefined) return undefined
    if (this.#inFlight++ === 0) this.#lastEndedMs = performance.now()
    return pending.finally(() => {
      this.#inFlight--
      this.#lastEndedMs = performance.now()
    })
  }

  #look(): void {
    if (this.#inFlight === 0) return
    const patience = this.#inFlight === this.#flushes ? FLUSH_PATIENCE : 1
    if (performance.now() - this.#lastEndedMs >= this.#limitMs * patience) this.#stalled()
  }
}
