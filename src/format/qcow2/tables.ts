// The map of a qcow2 image: which host cluster holds a guest cluster. The L1 table is in memory whole; of the L2 tables,
// slices, loaded when needed. Both are kept as the bytes of the file and written through: an entry is in the page cache
// before memory shows it. Allocating clusters, refcounts and ordering are others' work (refcounts.ts, writer.ts).
//
//   guest offset   | index in L1 | index in L2 | offset in cluster |
//                       slices:  | slice | index in slice |
//
// The unit of the map is a cluster, or with extended L2 entries one of its 32 subclusters. They share one place in the file, and
// some of them can have data there while the others are zeros or show what is below.

import { assert } from '../../base/assert.ts'
import { copyBytes, getUint32, MAX_SAFE, setUint32 } from '../../base/bytes.ts'
import { QCOW2_SLICE } from '../../base/limits.ts'
import { roundDown, roundUp } from '../../base/round.ts'
import { andThen, type Pending } from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import { type Header, isDirty } from './header.ts'
import {
  COMPRESSED,
  DATA,
  type Mapping,
  NO_PLACE,
  subclusterBits,
  subclusterKind,
  subclustersAlike,
  UNMAPPED,
  ZEROS,
} from './mapping.ts'
import { metadataCache, type Piece, type PieceOwner } from './metadata-cache.ts'
import { structureAt } from './overlap.ts'
import * as spec from './spec.ts'

const TWO_32 = 0x1_0000_0000

export class Tables implements PieceOwner {
  readonly #file: HostFile
  readonly #header: Header
  readonly #clusterSize: number
  readonly #entrySize: number
  /** Bits of the low half of an L2 entry that must be clear. */
  readonly #reservedLow: number
  readonly #hasDataFile: boolean
  readonly #perSlice: number
  readonly #perTable: number
  readonly #tableReach: number
  readonly #slices = new Map<number, Piece>()
  readonly #loading = new Map<number, Promise<void>>()
  #last: Piece | undefined
  #l1: Uint8Array = new Uint8Array(0)
  #scratch: Uint8Array
  #hostEnd = 0
  readonly #found = new WeakSet<BlockError>()

  // What the last successful `find` found; in fields, so that a request allocates nothing.
  /** How the range is mapped. */
  kind: Mapping = UNMAPPED
  /** Bytes from the offset asked for that are mapped alike, and contiguous in the file where they have data. */
  length = 0
  /** The place in the file of the offset asked for, whether or not it holds data now; NO_PLACE without. Of COMPRESSED the data's. */
  host = NO_PLACE
  /** True when no other table refers to the place, so that it may be written to. */
  exclusive = false
  /** Of COMPRESSED: how many bytes in the file the data may take. */
  compressedLength = 0
  /** How far the places of neighbouring clusters are apart: a cluster, or 0 without places. */
  #step = 0

  /**
   * After a crash, entries may lead past the end of the file: what they stand for was not flushed, and reads as zeros.
   * Otherwise such an entry is corruption.
   */
  mayPassEnd: boolean

  constructor(file: HostFile, header: Header) {
    this.#file = file
    this.#header = header
    this.#clusterSize = header.clusterSize
    const sliceBytes = Math.min(header.clusterSize, QCOW2_SLICE)
    this.#entrySize = header.l2EntrySize
    this.#perSlice = sliceBytes / this.#entrySize
    this.#perTable = header.clusterSize / this.#entrySize
    const hasZeroFlag = header.version === 3 && !header.extendedL2
    this.#reservedLow = hasZeroFlag ? spec.L2_RESERVED_LOW : spec.L2_RESERVED_LOW | spec.OFLAG_ZERO_LOW
    this.#tableReach = this.#perTable * header.clusterSize
    this.#scratch = new Uint8Array(sliceBytes)
    this.#hasDataFile = header.dataFile !== undefined
    this.mayPassEnd = isDirty(header)
  }

  /** Reads the L1 table; again after the header changed. */
  async open(): Promise<void> {
    const l1 = new Uint8Array(this.#header.l1Size * spec.ENTRY_SIZE)
    await this.#file.read(this.#header.l1Offset, l1.length, l1, 0)
    this.#l1 = l1
  }

  /** The L1 table's bytes as they are in the file. */
  get l1(): Uint8Array {
    return this.#l1
  }

  /** Bytes of the disk that one L2 table maps. */
  get tableReach(): number {
    return this.#tableReach
  }

  /** Finds how the range begins to be mapped, into the fields above. False when `load(offset)` must come first. */
  find(offset: number, length: number): boolean {
    const l1Index = Math.floor(offset / this.#tableReach)
    if (this.tableAt(l1Index) === 0) {
      this.#foundNoTable(offset, length, l1Index)
      return true
    }
    const cluster = Math.floor(offset / this.#clusterSize)
    const slice = this.#slice(Math.floor(cluster / this.#perSlice))
    if (slice === undefined) return false
    const index = cluster % this.#perSlice
    const within = offset - cluster * this.#clusterSize
    this.#decode(slice.bytes, index, offset)
    if (!this.#isTableExclusive(l1Index)) this.exclusive = false
    if (this.kind === COMPRESSED) {
      this.length = Math.min(length, this.#clusterSize - within)
      return true
    }
    if (this.#header.extendedL2) this.#findSubclusters(slice.bytes, index, within, length, offset)
    else {
      const count = within + length <= this.#clusterSize ? 1 : this.#countAlike(slice.bytes, index, within + length)
      this.length = Math.min(length, count * this.#clusterSize - within)
    }
    if (this.host >= 0) this.host += within
    return true
  }

  /** Brings what `find` needs for the offset into memory. */
  load(offset: number): Pending {
    const number = Math.floor(offset / this.#clusterSize / this.#perSlice)
    const already = this.#loading.get(number)
    if (already !== undefined) return already
    const l1Index = Math.floor(offset / this.#tableReach)
    const table = this.tableAt(l1Index)
    if (table === 0 || this.#slices.has(number)) return undefined
    this.#checkHost(table, offset, 'L2 table')
    const structure = structureAt(this.#header, table, this.#clusterSize)
    if (structure !== undefined) throw this.corrupt(`its ${structure} where its L2 table goes`, offset)
    const bytes = new Uint8Array(this.#perSlice * this.#entrySize)
    const wait = this.#file.read(this.#entryPlace(table, number * this.#perSlice), bytes.length, bytes, 0)
    if (wait === undefined) {
      this.#slices.set(number, metadataCache.add(this, number, bytes))
      return undefined
    }
    const done = wait
      .then(() => void this.#slices.set(number, metadataCache.add(this, number, bytes)))
      .finally(() => this.#loading.delete(number))
    this.#loading.set(number, done)
    return done
  }

  /** Runs `use` as soon as `find` has found the range, and waits for what it gives. */
  async withEntry(offset: number, length: number, use: () => Pending): Promise<void> {
    while (!this.find(offset, length)) {
      const wait = this.load(offset)
      if (wait !== undefined) await wait
    }
    await use()
  }

  dropped(number: number): void {
    this.#slices.delete(number)
    if (this.#last?.number === number) this.#last = undefined
  }

  /** Slices are written through. */
  clean(): boolean {
    return true
  }

  /** Forgets every slice; they are read again when needed. */
  forget(): void {
    for (const slice of this.#slices.values()) metadataCache.remove(slice)
    this.#slices.clear()
    this.#last = undefined
  }

  #forgetTable(l1Index: number): void {
    const perTable = this.#perTable / this.#perSlice
    for (let number = l1Index * perTable; number < (l1Index + 1) * perTable; number++) {
      const slice = this.#slices.get(number)
      if (slice === undefined) continue
      metadataCache.remove(slice)
      this.dropped(number)
    }
  }

  /** Where the L2 table of an L1 entry is; 0 when there is none. */
  tableAt(l1Index: number): number {
    const at = l1Index * spec.ENTRY_SIZE
    assert(at < this.#l1.length, 'the disk lies within the L1 table')
    return spec.entryOffset(getUint32(this.#l1, at), getUint32(this.#l1, at + 4))
  }

  /** True when entries for the offset can be changed in place: its L2 table exists and belongs to this disk alone. */
  isWritable(offset: number): boolean {
    const l1Index = Math.floor(offset / this.#tableReach)
    return this.tableAt(l1Index) !== 0 && this.#isTableExclusive(l1Index)
  }

  /** Makes the L1 entry lead to the L2 table at `host`, which belongs to this disk alone. */
  setTable(l1Index: number, host: number): Pending {
    const entry = new Uint8Array(spec.ENTRY_SIZE)
    setUint32(entry, 0, (Math.floor(host / TWO_32) | spec.OFLAG_COPIED_HIGH) >>> 0)
    setUint32(entry, 4, host % TWO_32)
    const at = l1Index * spec.ENTRY_SIZE
    return andThen(this.#file.write(this.#header.l1Offset + at, entry.length, entry, 0), () => {
      this.#l1.set(entry, at)
      this.#forgetTable(l1Index)
      return undefined
    })
  }

  /**
   * Maps the units that the range touches to data: their clusters lie one after the other in the file, the first at `host`.
   * Other subclusters of these stay what they are. See `#change`.
   */
  link(offset: number, length: number, host: number): Pending {
    const count = this.#clustersOf(offset, length)
    let place = host
    for (let i = 0; i < count; i++, place += this.#clusterSize) {
      setUint32(this.#scratch, i * this.#entrySize, (Math.floor(place / TWO_32) | spec.OFLAG_COPIED_HIGH) >>> 0)
      setUint32(this.#scratch, i * this.#entrySize + 4, place % TWO_32)
    }
    if (this.#header.extendedL2) this.#setBits(offset, length, DATA)
    return this.#change(offset, count)
  }

  /**
   * Gives the clusters of the range, which have none, places one after the other in the file. They read as before: subclusters
   * stay what they are, and whole clusters, which showed zeros, are data that is zeros; so are all of a raw data file. See `#change`.
   */
  reserve(offset: number, length: number, host: number): Pending {
    if (!this.#header.extendedL2 || this.#header.dataFile?.isRaw === true) return this.link(offset, length, host)
    const count = this.#clustersOf(offset, length)
    const scratch = this.#scratch
    const cluster = Math.floor(offset / this.#clusterSize)
    const slice = this.#slice(Math.floor(cluster / this.#perSlice)) as Piece
    copyBytes(slice.bytes, (cluster % this.#perSlice) * this.#entrySize, scratch, 0, count * this.#entrySize)
    for (let i = 0, place = host; i < count; i++, place += this.#clusterSize) {
      setUint32(scratch, i * this.#entrySize, (Math.floor(place / TWO_32) | spec.OFLAG_COPIED_HIGH) >>> 0)
      setUint32(scratch, i * this.#entrySize + 4, place % TWO_32)
    }
    return this.#change(offset, count)
  }

  /** Maps the cluster at `offset` to `length` compressed bytes at `host`. See `#change`. */
  linkCompressed(offset: number, host: number, length: number): Pending {
    const scratch = this.#scratch
    scratch.fill(0, 0, this.#entrySize)
    setUint32(scratch, 0, spec.compressedEntryHigh(host, length, this.#header.clusterBits))
    setUint32(scratch, 4, host % TWO_32)
    return this.#change(offset, 1)
  }

  /** Makes the clusters that the range touches unmapped, or read as zeros without a place. See `#change`. */
  unlink(offset: number, length: number, readsAsZeros: boolean): Pending {
    const count = this.#clustersOf(offset, length)
    const scratch = this.#scratch
    scratch.fill(0, 0, count * this.#entrySize)
    for (let i = 0; readsAsZeros && i < count; i++) {
      if (this.#header.extendedL2) setUint32(scratch, i * this.#entrySize + spec.SUBCLUSTERS_ZERO, 0xffff_ffff)
      else scratch[i * this.#entrySize + 7] = spec.OFLAG_ZERO_LOW
    }
    return this.#change(offset, count)
  }

  /** Makes the units that the range touches read as zeros; their clusters keep their places. Not for COMPRESSED. See `#change`. */
  hide(offset: number, length: number): Pending {
    const count = this.#clustersOf(offset, length)
    const cluster = Math.floor(offset / this.#clusterSize)
    const slice = this.#slice(Math.floor(cluster / this.#perSlice)) as Piece
    const at = (cluster % this.#perSlice) * this.#entrySize
    const scratch = this.#scratch
    copyBytes(slice.bytes, at, scratch, 0, count * this.#entrySize)
    if (this.#header.extendedL2) this.#setBits(offset, length, ZEROS)
    else for (let i = 0; i < count; i++) scratch[i * 8 + 7] = (scratch[i * 8 + 7] as number) | spec.OFLAG_ZERO_LOW
    return this.#change(offset, count)
  }

  /** Into `#scratch`: the bitmaps of the clusters that the range touches, with its subclusters now of the kind. */
  #setBits(offset: number, length: number, kind: typeof DATA | typeof ZEROS): void {
    const { unitSize } = this.#header
    const firstCluster = Math.floor(offset / this.#clusterSize)
    const { bytes } = this.#slice(Math.floor(firstCluster / this.#perSlice)) as Piece
    const start = Math.floor(offset / unitSize)
    const end = Math.ceil((offset + length) / unitSize)
    for (let i = 0; i < this.#clustersOf(offset, length); i++) {
      const clusterStart = (firstCluster + i) * spec.SUBCLUSTERS
      const bits = subclusterBits(Math.max(0, start - clusterStart), Math.min(spec.SUBCLUSTERS, end - clusterStart))
      const old = ((firstCluster + i) % this.#perSlice) * this.#entrySize
      // The bitmaps of a compressed cluster mean nothing; it is replaced whole.
      const isCompressed = (getUint32(bytes, old) & spec.OFLAG_COMPRESSED_HIGH) !== 0
      const zeros = isCompressed ? 0 : getUint32(bytes, old + spec.SUBCLUSTERS_ZERO)
      const allocated = isCompressed ? 0 : getUint32(bytes, old + spec.SUBCLUSTERS_ALLOCATED)
      const at = i * this.#entrySize
      const isData = kind === DATA
      setUint32(this.#scratch, at + spec.SUBCLUSTERS_ZERO, (isData ? zeros & ~bits : zeros | bits) >>> 0)
      setUint32(this.#scratch, at + spec.SUBCLUSTERS_ALLOCATED, (isData ? allocated | bits : allocated & ~bits) >>> 0)
    }
  }

  /** How many clusters the range touches. */
  #clustersOf(offset: number, length: number): number {
    return Math.ceil((offset + length) / this.#clusterSize) - Math.floor(offset / this.#clusterSize)
  }

  /** How many clusters from the one at `offset` lie in its slice: what one change can cover. */
  roomInSlice(offset: number): number {
    return this.#perSlice - (Math.floor(offset / this.#clusterSize) % this.#perSlice)
  }

  /** Writes the entries in `#scratch` to the file, then shows them. They lie in one slice, which is loaded. */
  #change(offset: number, count: number): Pending {
    const cluster = Math.floor(offset / this.#clusterSize)
    const slice = this.#slices.get(Math.floor(cluster / this.#perSlice))
    assert(slice !== undefined && count <= this.roomInSlice(offset), 'a change lies in one loaded slice')
    const place = this.#entryPlace(this.tableAt(Math.floor(offset / this.#tableReach)), cluster)
    const at = (cluster % this.#perSlice) * this.#entrySize
    const length = count * this.#entrySize
    const entries = this.#scratch
    const wait = this.#file.write(place, length, entries, 0)
    if (wait === undefined) {
      copyBytes(entries, 0, slice.bytes, at, length)
      return undefined
    }
    this.#scratch = new Uint8Array(entries.length)
    slice.pins++
    return wait
      .then(() => copyBytes(entries, 0, slice.bytes, at, length))
      .finally(() => {
        slice.pins--
      })
  }

  #slice(number: number): Piece | undefined {
    if (this.#last?.number === number) return this.#last
    const slice = this.#slices.get(number)
    if (slice === undefined) return undefined
    metadataCache.touch(slice)
    this.#last = slice
    return slice
  }

  #isTableExclusive(l1Index: number): boolean {
    return ((this.#l1[l1Index * spec.ENTRY_SIZE] as number) & 0x80) !== 0
  }

  /** Where the entry of a guest cluster is in the file. */
  #entryPlace(table: number, cluster: number): number {
    return table + (cluster % this.#perTable) * this.#entrySize
  }

  #foundNoTable(offset: number, length: number, l1Index: number): void {
    let reach = (l1Index + 1) * this.#tableReach - offset
    const count = this.#l1.length / spec.ENTRY_SIZE
    while (reach < length && ++l1Index < count && this.tableAt(l1Index) === 0) reach += this.#tableReach
    this.kind = UNMAPPED
    this.length = Math.min(length, reach)
    this.host = NO_PLACE
    this.exclusive = false
  }

  /** What entry `index` says, but for its subclusters; `host` is its cluster's place. */
  #decode(bytes: Uint8Array, index: number, offset: number): void {
    const high = getUint32(bytes, index * this.#entrySize)
    const low = getUint32(bytes, index * this.#entrySize + 4)
    this.exclusive = high >= spec.OFLAG_COPIED_HIGH
    if ((high & spec.OFLAG_COMPRESSED_HIGH) !== 0) {
      this.#decodeCompressed(high, low, offset)
      return
    }
    if ((high & spec.L2_RESERVED_HIGH) !== 0 || (low & this.#reservedLow) !== 0)
      throw this.corrupt('reserved bits set in its L2 entry', offset)
    const place = spec.entryOffset(high, low)
    const isZero = (low & spec.OFLAG_ZERO_LOW) !== 0
    const isNowhere = place === 0 && !(this.#hasDataFile && this.exclusive)
    if (isNowhere) {
      if (this.exclusive) throw this.corrupt('a cluster at the header’s place', offset)
      this.kind = isZero ? ZEROS : UNMAPPED
      this.host = NO_PLACE
      this.#step = 0
      return
    }
    this.kind = isZero ? ZEROS : DATA
    this.host = place
    this.#step = this.#clusterSize
    if (this.#hasDataFile) this.#checkDataPlace(place, offset)
    else this.#checkHost(place, offset, 'cluster')
  }

  #decodeCompressed(high: number, low: number, offset: number): void {
    if (this.#hasDataFile) throw this.corrupt('a compressed cluster, which has no place in a data file,', offset)
    this.kind = COMPRESSED
    this.exclusive = false
    this.host = spec.compressedOffset(high, low, this.#header.clusterBits)
    this.compressedLength = spec.compressedLength(high, low, this.#header.clusterBits)
    if (this.host < this.#clusterSize || this.host >= this.#endOfHost(this.host))
      throw this.corrupt(`compressed data at ${this.host}, outside the file`, offset)
  }

  /** After `#decode`: of which kind the subcluster at `within` is, and how far others like it follow. */
  #findSubclusters(bytes: Uint8Array, index: number, within: number, length: number, offset: number): void {
    const { unitSize } = this.#header
    const zeros = getUint32(bytes, index * this.#entrySize + spec.SUBCLUSTERS_ZERO)
    const allocated = getUint32(bytes, index * this.#entrySize + spec.SUBCLUSTERS_ALLOCATED)
    if ((zeros & allocated) !== 0) throw this.corrupt('a subcluster that is both data and zeros', offset)
    if (allocated !== 0 && this.kind === UNMAPPED) throw this.corrupt('subclusters with data and no place', offset)
    const high = getUint32(bytes, index * this.#entrySize)
    const low = getUint32(bytes, index * this.#entrySize + 4)
    const first = Math.floor(within / unitSize)
    this.kind = subclusterKind(zeros, allocated, first)
    const needed = Math.ceil((within + length) / unitSize) - first
    let count = subclustersAlike(zeros, allocated, first, this.kind)
    for (let next = 1; count < needed && first + count === next * spec.SUBCLUSTERS; next++) {
      if (index + next === this.#perSlice || !this.#isEntry(bytes, index + next, high, low + next * this.#step)) break
      count += this.#alikeFromStart(bytes, index + next)
    }
    this.length = Math.min(length, (first + count) * unitSize - within)
    const clusters = Math.ceil((first + count) / spec.SUBCLUSTERS)
    if (this.#step !== 0 && this.host + clusters * this.#step > this.#hostEnd && !this.#hasDataFile)
      this.#checkHost(this.host + (clusters - 1) * this.#step, offset, 'cluster')
  }

  /** How many of the first subclusters of entry `index` are of the kind found; none when its bitmaps cannot be. */
  #alikeFromStart(bytes: Uint8Array, index: number): number {
    const zeros = getUint32(bytes, index * this.#entrySize + spec.SUBCLUSTERS_ZERO)
    const allocated = getUint32(bytes, index * this.#entrySize + spec.SUBCLUSTERS_ALLOCATED)
    return (zeros & allocated) === 0 ? subclustersAlike(zeros, allocated, 0, this.kind) : 0
  }

  /** How many entries from `index` on are mapped like it, as far as `length` bytes from its cluster's start go. */
  #countAlike(bytes: Uint8Array, index: number, length: number): number {
    const most = Math.min(this.#perSlice - index, Math.ceil(length / this.#clusterSize))
    const high = getUint32(bytes, index * this.#entrySize)
    const low = getUint32(bytes, index * this.#entrySize + 4)
    let count = 1
    // Preallocated zero clusters follow each other as data does; entries without a place are simply equal.
    while (count < most && this.#isEntry(bytes, index + count, high, low + count * this.#step)) count++
    if (this.#step !== 0 && this.host + count * this.#step > this.#hostEnd && !this.#hasDataFile)
      this.#checkHost(this.host + (count - 1) * this.#step, 0, 'cluster')
    return count
  }

  #isEntry(bytes: Uint8Array, index: number, high: number, low: number): boolean {
    return getUint32(bytes, index * this.#entrySize) === high && getUint32(bytes, index * this.#entrySize + 4) === low
  }

  /** In a data file, each cluster has the place that it has on the disk, and nothing else refers to it. */
  #checkDataPlace(place: number, offset: number): void {
    if (place !== roundDown(offset, this.#clusterSize))
      throw this.corrupt(`its cluster at ${place} of the data file, another’s place,`, offset)
    this.exclusive = true
  }

  #checkHost(host: number, offset: number, what: string): void {
    if (host % this.#clusterSize !== 0) throw this.corrupt(`its ${what} at ${host}, no cluster’s start,`, offset)
    if (host < this.#clusterSize) throw this.corrupt(`its ${what} in the header`, offset)
    if (host >= this.#endOfHost(host)) throw this.corrupt(`its ${what} at ${host}, after the end of the file,`, offset)
  }

  /** The end of the places that entries may name; looked up again only when `host` seems to lie past it. */
  #endOfHost(host: number): number {
    if (this.mayPassEnd) return MAX_SAFE - this.#clusterSize
    if (host + this.#clusterSize > this.#hostEnd) this.#hostEnd = roundUp(this.#file.size(), this.#clusterSize)
    return this.#hostEnd
  }

  /** The error, of kind 'corrupt', of a map that cannot be right: `what` is said of the guest offset. */
  corrupt(what: string, offset: number): BlockError {
    const path = this.#file.path
    const message = `${path} is corrupt: ${what} for guest offset ${offset}; repair it with: varve image check -r all ${path}`
    const error = new BlockError('corrupt', message, { path, offset })
    this.#found.add(error)
    return error
  }

  /** True for an error of `corrupt`, of this image and no other. */
  hasFoundCorrupt(error: unknown): error is BlockError {
    return error instanceof BlockError && this.#found.has(error)
  }
}
