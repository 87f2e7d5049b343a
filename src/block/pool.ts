// Buffers that are lent and given back, so that the data path allocates nothing. Sizes are powers of two; each size keeps
// a bounded number of free buffers, and what comes back above that is left to the garbage collector.

import { POOL_BUFFER_MIN, POOL_FREE_BYTES, REQUEST_MAX } from '../base/limits.ts'
import { assert } from '../base/assert.ts'

export class BufferPool {
  readonly #free = new Map<number, Uint8Array[]>()
  #freeBytes = 0

  /** A buffer of at least `length` bytes, with old content. Give it back with `give`. */
  take(length: number): Uint8Array {
    assert(length >= 0 && length <= REQUEST_MAX * 2, 'a pooled buffer is at most two requests long')
    let size = POOL_BUFFER_MIN
    while (size < length) size *= 2
    const buffer = this.#free.get(size)?.pop()
    // No Buffer: its `slice` is no copy, but a view of bytes that the next borrower writes over.
    if (buffer === undefined) return new Uint8Array(Buffer.allocUnsafeSlow(size).buffer)
    this.#freeBytes -= size
    return buffer
  }

  /** Gives back a buffer that `take` lent; the caller keeps no reference to it. */
  give(buffer: Uint8Array): void {
    if (this.#freeBytes + buffer.length > POOL_FREE_BYTES) return
    let list = this.#free.get(buffer.length)
    if (list === undefined) this.#free.set(buffer.length, (list = []))
    list.push(buffer)
    this.#freeBytes += buffer.length
  }
}

/** The pool of this thread. */
export const pool = new BufferPool()
