// Makes ranges of a qcow2 image read as zeros: a zero, or a trim, which leaves what would cost something. Whole clusters give
// up their places, parts of a unit are overwritten, and what lies between is said by the map alone.

import { roundDown, roundUp } from '../../base/round.ts'
import type { Pending } from '../../block/device.ts'
import type { Changes } from './changes.ts'
import { COMPRESSED, DATA, NO_PLACE, UNMAPPED, ZEROS } from './mapping.ts'

export class Zeros {
  readonly #changes: Changes
  readonly #clusterSize: number
  readonly #unitSize: number
  readonly #isRaw: boolean
  readonly #hasZeroFlag: boolean

  constructor(changes: Changes) {
    const { header } = changes.image
    this.#changes = changes
    this.#clusterSize = header.clusterSize
    this.#unitSize = header.unitSize
    this.#isRaw = header.dataFile?.isRaw === true
    this.#hasZeroFlag = header.version !== 2
  }

  /**
   * Makes the range read as zeros; whole clusters give up their place when they may. Without `parts` a trim: only whole
   * units, and only what needs no space.
   */
  zero(offset: number, length: number, mayUnmap: boolean, parts: boolean): Pending {
    const end = offset + length
    while (offset < end) {
      const wait = this.#zeroPiece(offset, end - offset, mayUnmap, parts)
      const done = this.#changes.done
      if (wait !== undefined)
        return wait.then(() => {
          this.#changes.isUnsynced = true
          return this.zero(offset + done, end - offset - done, mayUnmap, parts)
        })
      offset += done
    }
    return undefined
  }

  /** Makes the whole clusters from `offset` to `end`, which are past the end that the disk will have, unmapped. */
  async drop(offset: number, end: number): Promise<void> {
    while (offset < end) {
      const wait = this.#dropPiece(offset, end - offset)
      offset += this.#changes.done
      if (wait !== undefined) await wait
    }
  }

  #dropPiece(offset: number, length: number): Pending {
    const { tables } = this.#changes
    this.#changes.done = 0
    if (!tables.find(offset, length)) return tables.load(offset)
    const span = roundUp(tables.length, this.#clusterSize)
    const wait = tables.kind === UNMAPPED && tables.host === NO_PLACE ? undefined : this.#changes.obstacle(offset, span)
    if (wait !== undefined) return wait
    this.#changes.done = span
    if (tables.kind === UNMAPPED && tables.host === NO_PLACE) return undefined
    this.#changes.isUnsynced = true
    if (!this.#changes.hasDataFile) return this.#unlink(offset, span, false)
    return this.#changes.holding(offset, span, tables.unlink(offset, span, false))
  }

  #zeroPiece(offset: number, length: number, mayUnmap: boolean, parts: boolean): Pending {
    const tables = this.#changes.tables
    this.#changes.done = 0
    if (!tables.find(offset, length)) return tables.load(offset)
    if (this.#isRaw) return this.#zeroRaw(offset, tables.length, mayUnmap)
    const { kind, host } = tables
    const unit = kind === COMPRESSED ? this.#clusterSize : this.#unitSize
    const end = offset + tables.length
    const first = roundDown(offset, unit)
    const isWhole = offset === first && this.#wholeEnd(end, unit) > first
    const span = isWhole ? this.#wholeSpan(offset, end, unit) : Math.min(end, first + unit) - offset
    const isCluster = isWhole && span % this.#clusterSize === 0
    const isZeroNow = kind === ZEROS && (host === NO_PLACE || !mayUnmap || !isCluster)
    // A trim takes no space: where it would need a new table, what shows from below goes on to show.
    const isLeft = !parts && !tables.isWritable(offset)
    const mayShow = this.#changes.mayShowBacking(offset)
    // Without the flag, what lies below can only be hidden by zeros in a place, which a trim does not take.
    const needsPlace = mayShow && !this.#hasZeroFlag
    const isEmpty = kind === UNMAPPED && (isLeft || !mayShow || (needsPlace && this.#isZeroBelow(offset, end - offset)))
    if (isZeroNow || isEmpty || (!parts && (!isWhole || needsPlace))) {
      const isAll = isEmpty || (isZeroNow && (host === NO_PLACE || !mayUnmap))
      this.#changes.done = isAll ? end - offset : Math.min(span, end - offset)
      return undefined
    }
    this.#changes.isUnsynced = true
    const isKept = !isWhole || (!this.#hasZeroFlag && (mayShow || !mayUnmap))
    if (isKept && kind === DATA && tables.exclusive) return this.#overwrite(offset, Math.min(span, end - offset))
    const wait = this.#changes.obstacle(offset, span)
    if (wait !== undefined) return wait
    if (!isWhole || needsPlace) {
      const place = this.#changes.ownPlace(offset)
      if (place !== NO_PLACE) return this.#changes.settle(offset, span, place, undefined, 0)
      return this.#changes.replace(offset, Math.min(span, end - offset), undefined, 0)
    }
    this.#changes.done = Math.min(span, end - offset)
    if (!mayUnmap && kind === DATA && tables.exclusive) return this.#hide(offset, span)
    if (!isCluster) return this.#hideSubclusters(offset, span, mayUnmap)
    return this.#changes.hasDataFile
      ? this.#unlinkPlaces(offset, span)
      : this.#unlink(offset, span, this.#changes.mayShowBacking(offset))
  }

  /** Writes zeros over data in its place. */
  #overwrite(offset: number, length: number): Pending {
    const { host } = this.#changes.tables
    this.#changes.protect(host, length, offset)
    this.#changes.done = length
    return this.#changes.track(this.#changes.data.zero(host, length))
  }

  /** True when what lies below an unmapped range is known, and zeros. */
  #isZeroBelow(offset: number, length: number): boolean {
    return this.#changes.image.backing !== undefined && !this.#changes.needsCopy(offset, length)
  }

  /** The end of the whole units before `end`: the disk's short last cluster counts as whole. */
  #wholeEnd(end: number, unit: number): number {
    return end >= this.#changes.image.header.size ? roundUp(end, this.#clusterSize) : roundDown(end, unit)
  }

  /** Bytes from `offset`, the start of a unit, in whole clusters when it begins one, else the units up to the next cluster. */
  #wholeSpan(offset: number, end: number, unit: number): number {
    const size = this.#clusterSize
    const whole = this.#wholeEnd(end, unit) - offset
    if (offset % size === 0 && whole >= size) return roundDown(whole, size)
    return Math.min(whole, roundDown(offset, size) + size - offset)
  }

  /**
   * A raw data file is what the disk reads as, byte for byte. What is not mapped to it reads as zeros, and should be zeros there; but
   * a crash may have kept the data of a write and not its mapping.
   */
  #zeroRaw(offset: number, length: number, mayUnmap: boolean): Pending {
    const { data } = this.#changes
    this.#changes.done = length
    this.#changes.isUnsynced = true
    return this.#changes.track(mayUnmap ? data.punch(offset, length) : data.zero(offset, length))
  }

  /** Makes whole clusters, as found last, unmapped or read as zeros, and frees their places in the image. */
  #unlink(offset: number, span: number, readsAsZeros: boolean): Pending {
    const { kind, host, compressedLength } = this.#changes.tables
    const size = this.#clusterSize
    const firstOld = Math.floor(host / size)
    const last = kind === COMPRESSED ? Math.floor((host + compressedLength - 1) / size) : firstOld + span / size - 1
    const oldCount = host === NO_PLACE ? 0 : last - firstOld + 1
    const { tables, places, allocator } = this.#changes
    const wait = tables.unlink(offset, span, readsAsZeros)
    if (wait === undefined && (oldCount === 0 || allocator.canFree(firstOld, last))) {
      allocator.free(firstOld, oldCount)
      return undefined
    }
    const freed =
      wait === undefined ? places.freeOld(firstOld, oldCount) : wait.then(() => places.freeOld(firstOld, oldCount))
    return this.#changes.holding(offset, span, freed)
  }

  /** Makes whole clusters of an external data file read as zeros, and deallocates them there. */
  #unlinkPlaces(offset: number, span: number): Pending {
    const changes = this.#changes
    const isHidden = changes.tables.kind !== DATA
    const unlink = (): Pending => {
      if (isHidden) changes.emptiedHidden()
      else changes.hidden()
      return changes.tables.unlink(offset, span, changes.mayShowBacking(offset))
    }
    const wait = changes.data.punch(offset, span)
    return wait === undefined ? changes.holding(offset, span, unlink()) : this.#afterPunch(wait, offset, span, unlink)
  }

  /** Makes subclusters read as zeros, and deallocates their part of the place when they may. */
  #hideSubclusters(offset: number, span: number, mayUnmap: boolean): Pending {
    const { kind, host, exclusive } = this.#changes.tables
    const wait = mayUnmap && kind === DATA && exclusive ? this.#changes.data.punch(host, span) : undefined
    if (wait === undefined) return this.#hide(offset, span)
    return this.#afterPunch(wait, offset, span, () => this.#hideMap(offset, span))
  }

  /** First the place is emptied, then the map says so: at any moment what is read is the old data or zeros. */
  async #afterPunch(wait: Promise<void>, offset: number, span: number, change: () => Pending): Promise<void> {
    const token = this.#changes.lock(offset, span)
    try {
      await wait
      await this.#changes.tables.withEntry(offset, 1, change)
    } finally {
      this.#changes.release(token)
    }
  }

  #hide(offset: number, span: number): Pending {
    return this.#changes.holding(offset, span, this.#hideMap(offset, span))
  }

  #hideMap(offset: number, span: number): Pending {
    this.#changes.hidden()
    return this.#changes.tables.hide(offset, span)
  }
}
