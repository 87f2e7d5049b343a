// What a write puts around its own data when it goes to another place than the guest's old data: the rest of the clusters or
// subclusters that it touches, as the guest sees them.
//
//   disk    | old |   write   | old |        a range of whole units
//   place   | copied | data | copied |

import { isZero } from '../../base/bytes.ts'
import type { Pending } from '../../block/device.ts'
import { pool } from '../../block/pool.ts'
import type { HostFile } from '../../host/host.ts'
import { DATA } from './mapping.ts'
import type { Tables } from './tables.ts'

/** What a request writes: bytes `offset` to `end` - 1 of the disk, taken from `from[at]` on, or zeros without `from`. */
export interface Content {
  readonly offset: number
  readonly end: number
  readonly from: Uint8Array | undefined
  readonly at: number
}

/** What the guest sees. */
export interface Seen {
  read(offset: number, length: number, into: Uint8Array, at: number): Pending
}

export class Filler {
  readonly #data: HostFile
  readonly #image: Seen
  readonly #tables: Tables

  /** `data` is the file that holds the guest's data. */
  constructor(data: HostFile, image: Seen, tables: Tables) {
    this.#data = data
    this.#image = image
    this.#tables = tables
  }

  /**
   * Writes bytes `start` to `stop` - 1 of the disk to `place`: the content, and around it what the guest sees there now. Zeros are left out
   * when the place reads as zeros anyway.
   */
  async fill(content: Content, start: number, stop: number, place: number, isPlaceZero: boolean): Promise<void> {
    const { offset, end, from, at } = content
    const dataStart = Math.max(start, offset)
    const dataEnd = Math.min(stop, end)
    if (dataStart > start) await this.#copy(start, dataStart, place, isPlaceZero)
    const dataPlace = place + dataStart - start
    if (from !== undefined) await this.#data.write(dataPlace, dataEnd - dataStart, from, at + dataStart - offset)
    else if (!isPlaceZero) await this.#data.zero(dataPlace, dataEnd - dataStart)
    if (stop > dataEnd) await this.#copy(dataEnd, stop, place + dataEnd - start, isPlaceZero)
  }

  /** Copies to `place`, which reads as zeros, what the image itself holds as data from `start` to `stop`: other subclusters. */
  async copyOwned(start: number, stop: number, place: number): Promise<void> {
    for (let offset = start; offset < stop; ) {
      const from = offset
      await this.#tables.withEntry(from, stop - from, () => {
        const { kind, length } = this.#tables
        offset += length
        return kind === DATA ? this.#copy(from, from + length, place + from - start, true) : undefined
      })
    }
  }

  async #copy(start: number, stop: number, place: number, isPlaceZero: boolean): Promise<void> {
    const length = stop - start
    const buffer = pool.take(length)
    try {
      await this.#image.read(start, length, buffer, 0)
      if (!isPlaceZero || !isZero(buffer, 0, length)) await this.#data.write(place, length, buffer, 0)
    } finally {
      pool.give(buffer)
    }
  }

  /** True when the place is known to read as zeros; false also when it cannot be said within the call. */
  isZeroAt(place: number, length: number): boolean {
    const buffer = pool.take(length)
    const wait = this.#data.read(place, length, buffer, 0)
    if (wait === undefined) {
      const isClean = isZero(buffer, 0, length)
      pool.give(buffer)
      return isClean
    }
    const giveBack = (): void => pool.give(buffer)
    wait.then(giveBack, giveBack)
    return false
  }
}
