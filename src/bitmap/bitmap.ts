// Which granules of a disk changed (or are still to do, or are needed). A plain in-memory set with its algebra; keeping
// it durable is dirtylog's work, and when to mark is the disk's.
//
//   granule   0 1 2 3 4 5 6 7 | 8 ...       bit g of the set is bit g % 8 of byte g / 8, low bit first:
//   byte      b0............b7| b0 ...      the same order as a qcow2 bitmap's data.

import { assert } from '../base/assert.ts'
import { GRANULE, GRANULE_MAX, GRANULE_MIN } from '../base/limits.ts'
import { divideUp, isPowerOfTwo } from '../base/round.ts'

export class Bitmap {
  /** Bytes of the disk. */
  readonly size: number
  /** Bytes per granule, a power of two. */
  readonly granule: number
  /** Number of granules; the last one may be short. */
  readonly length: number
  readonly #words: Uint32Array
  #count = 0

  constructor(size: number, granule: number = GRANULE) {
    assert(isPowerOfTwo(granule) && granule >= GRANULE_MIN && granule <= GRANULE_MAX, 'a granule is a power of two')
    this.size = size
    this.granule = granule
    this.length = divideUp(size, granule)
    this.#words = new Uint32Array(divideUp(this.length, 32))
  }

  /** How many granules are set. */
  get count(): number {
    return this.#count
  }

  /** How many bytes of the disk the set granules cover. */
  get bytes(): number {
    const tail = this.length * this.granule - this.size
    return this.#count * this.granule - (tail > 0 && this.has(this.length - 1) ? tail : 0)
  }

  has(index: number): boolean {
    return (((this.#words[index >>> 5] as number) >>> (index & 31)) & 1) === 1
  }

  /** True when any granule that the byte range touches is set. */
  hasAny(offset: number, length: number): boolean {
    const end = this.#endOf(offset + length)
    return this.nextSet(Math.floor(offset / this.granule), end) < end
  }

  /** True when every granule that the byte range touches is set. */
  hasAll(offset: number, length: number): boolean {
    const end = this.#endOf(offset + length)
    return this.nextClear(Math.floor(offset / this.granule), end) >= end
  }

  /** Sets every granule that the byte range touches (outward); returns how many were clear before. */
  set(offset: number, length: number): number {
    if (length === 0) return 0
    return this.setGranules(Math.floor(offset / this.granule), this.#endOf(offset + length))
  }

  /** Clears the granules that lie whole in the byte range (inward; the disk's short tail counts as whole). */
  clear(offset: number, length: number): number {
    const first = divideUp(offset, this.granule)
    const end = offset + length >= this.size ? this.length : Math.floor((offset + length) / this.granule)
    return first < end ? this.clearGranules(first, end) : 0
  }

  /** Sets granules `first` to `end` - 1; returns how many were clear before. */
  setGranules(first: number, end: number): number {
    assert(first >= 0 && end <= this.length)
    const before = this.#count
    for (let word = first >>> 5; word << 5 < end; word++) {
      const old = this.#words[word] as number
      const now = (old | maskOf(word, first, end)) >>> 0
      if (now === old) continue
      this.#words[word] = now
      this.#count += popcount(now ^ old)
    }
    return this.#count - before
  }

  /** Clears granules `first` to `end` - 1; returns how many were set before. */
  clearGranules(first: number, end: number): number {
    assert(first >= 0 && end <= this.length)
    const before = this.#count
    for (let word = first >>> 5; word << 5 < end; word++) {
      const old = this.#words[word] as number
      const now = (old & ~maskOf(word, first, end)) >>> 0
      if (now === old) continue
      this.#words[word] = now
      this.#count -= popcount(now ^ old)
    }
    return before - this.#count
  }

  setAll(): void {
    this.setGranules(0, this.length)
  }

  clearAll(): void {
    this.#words.fill(0)
    this.#count = 0
  }

  /**
   * The first set granule from `from` on that is below `end`, or `end`. Nothing past that is looked at: a guest's write that asks
   * about its few granules does not pay for the length of the disk.
   */
  nextSet(from: number, end: number = this.length): number {
    return this.#next(from, end, 0)
  }

  /** The first clear granule from `from` on that is below `end`, or `end`. */
  nextClear(from: number, end: number = this.length): number {
    return this.#next(from, end, 0xffff_ffff)
  }

  /**
   * Visits the runs of set granules as byte ranges, in order, from byte `offset` to `end`; a run is cut at the ends and
   * at `most` bytes. The visitor returns false to stop.
   */
  runs(offset: number, end: number, most: number, visit: (offset: number, length: number) => boolean): void {
    const last = this.#endOf(end)
    let index = this.nextSet(Math.floor(offset / this.granule), last)
    while (index < last) {
      const stop = this.nextClear(index, last)
      let start = Math.max(offset, index * this.granule)
      const runEnd = Math.min(end, this.size, stop * this.granule)
      while (start < runEnd) {
        const length = Math.min(most, runEnd - start)
        if (!visit(start, length)) return
        start += length
      }
      index = this.nextSet(stop, last)
    }
  }

  /** Adds all of `other`, which has the same size and granule. */
  or(other: Bitmap): void {
    this.#sameShape(other)
    for (let word = 0; word < this.#words.length; word++) {
      const old = this.#words[word] as number
      const now = (old | (other.#words[word] as number)) >>> 0
      if (now === old) continue
      this.#words[word] = now
      this.#count += popcount(now ^ old)
    }
  }

  /** Takes away all of `other`, which has the same size and granule. */
  andNot(other: Bitmap): void {
    this.#sameShape(other)
    for (let word = 0; word < this.#words.length; word++) {
      const old = this.#words[word] as number
      const now = (old & ~(other.#words[word] as number)) >>> 0
      if (now === old) continue
      this.#words[word] = now
      this.#count -= popcount(now ^ old)
    }
  }

  copy(): Bitmap {
    const other = new Bitmap(this.size, this.granule)
    other.#words.set(this.#words)
    other.#count = this.#count
    return other
  }

  /** The set for a disk of another size: kept where both have it; what grew is set, since nothing is known of it. */
  resized(size: number): Bitmap {
    const other = new Bitmap(size, this.granule)
    other.#words.set(this.#words.subarray(0, other.#words.length))
    other.#recount()
    if (size > this.size) other.set(this.size, size - this.size)
    return other
  }

  /** The set in granules of another size: each that a set granule touches. A copy, where the size is the same. */
  inGranules(granule: number): Bitmap {
    if (granule === this.granule) return this.copy()
    const other = new Bitmap(this.size, granule)
    this.runs(0, this.size, this.size, (offset, length) => other.set(offset, length) >= 0)
    return other
  }

  equals(other: Bitmap): boolean {
    if (this.size !== other.size || this.granule !== other.granule || this.#count !== other.#count) return false
    return this.#words.every((word, index) => word === other.#words[index])
  }

  /** The bits as bytes, low bit first; the bits past the last granule are zero. */
  toBytes(): Uint8Array {
    const bytes = new Uint8Array(divideUp(this.length, 8))
    this.copyBytes(0, bytes.length, bytes, 0)
    return bytes
  }

  /** Copies `length` of the bytes that `toBytes` gives, from byte `first` on, to `into[at]`: a large set piece by piece. */
  copyBytes(first: number, length: number, into: Uint8Array, at: number): void {
    for (let i = first; i < first + length; i++) {
      into[at + i - first] = (this.#words[i >>> 2] as number) >>> ((i & 3) * 8)
    }
  }

  /** Sets what `length` of the bytes that `copyBytes` gives, at `from[at]` and for byte `first` on, have set. */
  addBytes(first: number, length: number, from: Uint8Array, at: number): void {
    for (let i = first; i < first + length; i++) {
      const byte = from[at + i - first] as number
      if (byte === 0) continue
      const old = this.#words[i >>> 2] as number
      const now = (old | (byte << ((i & 3) * 8))) >>> 0
      this.#words[i >>> 2] = now
      this.#count += popcount(now ^ old)
    }
  }

  /** The set that `toBytes` wrote. Bits past the last granule are ignored. */
  static fromBytes(size: number, granule: number, bytes: Uint8Array): Bitmap {
    const bitmap = new Bitmap(size, granule)
    assert(bytes.length === divideUp(bitmap.length, 8), 'the bytes have the bitmap’s length')
    const words = bitmap.#words
    for (let i = 0; i < bytes.length; i++)
      words[i >>> 2] = ((words[i >>> 2] as number) | ((bytes[i] as number) << ((i & 3) * 8))) >>> 0
    bitmap.#recount()
    return bitmap
  }

  #recount(): void {
    const last = this.#words.length - 1
    if (last >= 0) this.#words[last] = ((this.#words[last] as number) & maskOf(last, 0, this.length)) >>> 0
    this.#count = 0
    for (let word = 0; word <= last; word++) this.#count += popcount(this.#words[word] as number)
  }

  #endOf(byteEnd: number): number {
    return Math.min(this.length, divideUp(byteEnd, this.granule))
  }

  /** The first granule from `from` to `end` - 1 whose bit differs from `skip`'s, or `end`. */
  #next(from: number, end: number, skip: number): number {
    if (from >= end) return end
    const lastWord = (end - 1) >>> 5
    let word = from >>> 5
    let bits = (((this.#words[word] as number) ^ skip) & (0xffff_ffff << (from & 31))) >>> 0
    while (bits === 0) {
      if (++word > lastWord) return end
      bits = ((this.#words[word] as number) ^ skip) >>> 0
    }
    return Math.min(end, word * 32 + 31 - Math.clz32(bits & -bits))
  }

  #sameShape(other: Bitmap): void {
    assert(other.size === this.size && other.granule === this.granule, 'bitmaps of one shape')
  }
}

/** The bits of word `word` that granules `first` to `end` - 1 have in it. */
function maskOf(word: number, first: number, end: number): number {
  const low = first - word * 32
  const high = end - word * 32
  const from = low <= 0 ? 0xffff_ffff : low >= 32 ? 0 : 0xffff_ffff << low
  const to = high >= 32 ? 0xffff_ffff : high <= 0 ? 0 : ~(0xffff_ffff << high)
  return (from & to) >>> 0
}

function popcount(value: number): number {
  let v = value - ((value >>> 1) & 0x5555_5555)
  v = (v & 0x3333_3333) + ((v >>> 2) & 0x3333_3333)
  return Math.imul((v + (v >>> 4)) & 0x0f0f_0f0f, 0x0101_0101) >>> 24
}
