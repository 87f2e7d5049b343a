// Pieces of L2 tables in memory, of all images of this thread under one budget: the ones used longest ago go first. A
// slice holds the bytes as they are in the file. Entries are written through, so a slice is never newer than the page cache
// and can be dropped at any time, except while an entry of it is on its way (`pins`).

import { QCOW2_SLICES_BYTES } from '../../base/limits.ts'

/** Who owns a slice: told when it is dropped. */
export interface SliceOwner {
  dropped(number: number): void
}

export interface Slice {
  readonly owner: SliceOwner
  readonly number: number
  readonly bytes: Uint8Array
  pins: number
  newer: Slice | undefined
  older: Slice | undefined
}

export class SliceCache {
  readonly #budget: number
  #bytes = 0
  #newest: Slice | undefined
  #oldest: Slice | undefined

  constructor(budget: number = QCOW2_SLICES_BYTES) {
    this.#budget = budget
  }

  get bytes(): number {
    return this.#bytes
  }

  add(owner: SliceOwner, number: number, bytes: Uint8Array): Slice {
    const slice: Slice = { owner, number, bytes, pins: 0, newer: undefined, older: undefined }
    this.#bytes += bytes.length
    this.#link(slice)
    let candidate = this.#oldest
    while (this.#bytes > this.#budget && candidate !== undefined && candidate !== slice) {
      const next: Slice | undefined = candidate.newer
      if (candidate.pins === 0) {
        this.remove(candidate)
        candidate.owner.dropped(candidate.number)
      }
      candidate = next
    }
    return slice
  }

  touch(slice: Slice): void {
    if (slice === this.#newest) return
    this.#unlink(slice)
    this.#link(slice)
  }

  remove(slice: Slice): void {
    this.#unlink(slice)
    this.#bytes -= slice.bytes.length
  }

  #link(slice: Slice): void {
    slice.older = this.#newest
    slice.newer = undefined
    if (this.#newest === undefined) this.#oldest = slice
    else this.#newest.newer = slice
    this.#newest = slice
  }

  #unlink(slice: Slice): void {
    if (slice.newer === undefined) this.#newest = slice.older
    else slice.newer.older = slice.older
    if (slice.older === undefined) this.#oldest = slice.newer
    else slice.older.newer = slice.newer
  }
}

/** The cache of this thread. */
export const slices = new SliceCache()
