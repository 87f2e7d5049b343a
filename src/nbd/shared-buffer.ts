// A pooled buffer with several users: a connection that fills it, requests whose data lies in it, writes to the socket
// that are not done. It goes back to the pool when the last one lets go.

import { assert } from '../base/assert.ts'
import { pool } from '../block/pool.ts'

let inUse = 0

/** Shared buffers that somebody still holds, in this thread: zero when every connection is closed. */
export function sharedBuffersInUse(): number {
  return inUse
}

export class SharedBuffer {
  readonly bytes: Uint8Array
  #users = 1

  /** At least `length` bytes, with old content; the maker is its first user. */
  constructor(length: number) {
    this.bytes = pool.take(length)
    inUse++
  }

  /** True while somebody other than the one who asks holds it. */
  get isShared(): boolean {
    return this.#users > 1
  }

  retain(): this {
    assert(this.#users > 0, 'a buffer that went back to the pool has no users')
    this.#users++
    return this
  }

  release(): void {
    assert(this.#users > 0, 'a buffer is released once per user')
    if (--this.#users > 0) return
    inUse--
    pool.give(this.bytes)
  }
}
