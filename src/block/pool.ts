// Buffers that are lent and given back, so that the data path allocates nothing. Sizes are powers of two; each size keeps
// a bounded number of free buffers, and what comes back above that is left to the garbage collector.

import { POOL_BUFFER_MIN, POOL_FREE_BYTES, REQUEST_MAX } from '../base/limits.ts'
import { assert } from '../base/assert.ts'

export class BufferPool {
  readonly #free = new Map<number, Uint8Array[]>()
  readonly #made = new WeakSet<Uint8Array>()
  #freeBytes = 0

  /** A buffer of at least `length` bytes, with old content. Give it back with `give`. */
  take(length: number): Uint8Array {
    assert(length >= 0 && length <= REQUEST_MAX * 2, 'a pooled buffer is at most two requests long')
    let size = POOL_BUFFER_MIN
    while (size < length) size *= 2
    const buffer = this.#free.get(size)?.pop()
    if (buffer === undefined) return this.#make(size)
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

  /** True for a buffer that this pool has lent. */
  lent(buffer: Uint8Array): boolean {
    return this.#made.has(buffer)
  }

  #make(size: number): Uint8Array {
    // No Buffer: its `slice` is no copy, but a view of bytes that the next borrower writes over.
    const buffer = new Uint8Array(Buffer.allocUnsafeSlow(size).buffer)
    this.#made.add(buffer)
    return buffer
  }
}

/** The pool of this thread. */
export const pool = new BufferPool()

/**
 * Buffers of work that goes on beside the guests, a job's copies. A file reads into them and writes from them in threads of the pool,
 * on another processor, and the event loop is free for the guests.
 */
export const copyPool = new BufferPool()
