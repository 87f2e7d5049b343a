// Walks everything that a qcow2 image refers to: header, refcount structure, L1 and L2 tables, guest data, internal snapshots,
// bitmaps. A visitor sees each reference, and each table or entry that cannot be right; what to make of them is the work of
// check.ts, repair.ts and recover.ts.
//
// An L2 table is read once in a walk, however many L1 tables lead to it: the L1 entries are gathered first, sorted by
// where they lead, and a table that n of them share counts n times. So a walk is linear in the size of the tables, goes
// through the file in order, and does not grow with the number of snapshots that share them.

import { Breather } from '../../base/breather.ts'
import { getUint16, getUint32, getUint64 } from '../../base/bytes.ts'
import { QCOW2_CHECK_TABLES, QCOW2_DIRECTORY_MAX, QCOW2_L1_MAX } from '../../base/limits.ts'
import { roundUp } from '../../base/round.ts'
import type { Pending } from '../../block/device.ts'
import type { HostFile } from '../../host/host.ts'
import type { Header } from './header.ts'
import { L2Walk } from './l2-references.ts'
import * as spec from './spec.ts'
import type { AreaKind } from './tally.ts'

/** What can be wrong with an entry of an L1 or L2 table. */
export type EntryFlaw =
  | 'L1 reserved'
  | 'L1 nowhere'
  | 'L1 unaligned'
  | 'L1 past end'
  | 'reserved'
  | 'nowhere'
  | 'unaligned'
  | 'unaligned past end'
  | 'unaligned zeros'
  | 'past end'
  | 'compressed copied'
  | 'compressed past end'
  | 'compressed subclusters'
  | 'compressed in data file'
  | 'subclusters both'
  | 'subclusters nowhere'
  | 'zeros in version 2'
  | 'other place in data file'

/** What can be wrong with snapshots and bitmaps. All but 'snapshot extra data' leave unknown what they refer to. */
export type PartFlaw = 'snapshot' | 'snapshot table end' | 'snapshot extra data' | 'bitmap'

/** `times` is how many L1 entries lead to what is visited. Offsets, places and lengths in bytes of the file. */
export interface Visitor {
  /** An area of the file that something refers to. */
  area(offset: number, length: number, kind: AreaKind, times: number): void
  /** The L1 or L2 entry at `place` cannot be right. One with two flaws comes twice. `isActive`: it is the disk's own. */
  flaw(flaw: EntryFlaw, place: number, times: number, isActive: boolean): Pending
  /**
   * Snapshots or bitmaps cannot be right; `what` is a sentence without its end, `index` counts snapshots or bitmaps, `end` is that
   * of the place which they name, where they name one.
   */
  invalid(flaw: PartFlaw, index: number, what: string, end?: number): void
  /** The entry at `place` of the disk's own tables leads to the whole cluster at `target`; -1 in a data file. */
  flag?(place: number, target: number, isCopied: boolean, times: number): Pending
  /** How many clusters one of the disk's own L2 tables holds. */
  guest?(allocated: number, fragmented: number, compressed: number, times: number): void
  /** How much of the L2 tables is done, between 0 and 1. */
  progress?(part: number): void
}

/** The image, and what of it is in memory. */
export interface Roots {
  readonly file: HostFile
  readonly header: Header
  /** Bytes of the active L1 table. */
  readonly l1: Uint8Array
  /** Offsets of the refcount blocks; 0 for none. */
  readonly refcountBlocks: Iterable<number>
}

/** Visits every reference in the image. */
export async function walkReferences(roots: Roots, visitor: Visitor): Promise<void> {
  const { header, l1, refcountBlocks } = roots
  const { clusterSize } = header
  visitor.area(0, clusterSize, 'unique', 1)
  visitor.area(header.refcountTableOffset, header.refcountTableClusters * clusterSize, 'unique', 1)
  for (const block of refcountBlocks) if (block !== 0) visitor.area(block, clusterSize, 'unique', 1)
  visitor.area(header.l1Offset, header.l1Size * spec.ENTRY_SIZE, 'unique', 1)
  const walk = new MapWalk(roots, visitor)
  await walk.gather(l1, header.l1Offset, true)
  await walkSnapshots(roots, visitor, walk)
  await walk.finish()
  await walkBitmaps(roots, visitor)
}

/** Bytes of an inactive L1 table that are read at once. */
const L1_PIECE = 64 * 1024

/** Added to the place of a table that an inactive L1 entry leads to; places are multiples of 512. */
const INACTIVE = 1

/** L1 tables, and the L2 tables that they lead to. */
class MapWalk {
  readonly #file: HostFile
  readonly #clusterSize: number
  readonly #visitor: Visitor
  readonly #breather = new Breather()
  readonly #walk: L2Walk
  readonly #fileSize: number
  /** The places of the tables to be walked. */
  #tables: Float64Array = new Float64Array(1024)
  #count = 0

  constructor({ file, header, l1 }: Roots, visitor: Visitor) {
    this.#file = file
    this.#clusterSize = header.clusterSize
    this.#visitor = visitor
    this.#fileSize = file.size()
    this.#walk = new L2Walk(header, visitor, l1, this.#fileSize)
  }

  /** Visits the entries of an L1 table, or of a piece of one, which is at `place`. */
  async gather(l1: Uint8Array, place: number, isActive: boolean): Promise<void> {
    for (let at = 0; at < l1.length; at += spec.ENTRY_SIZE) {
      const high = getUint32(l1, at)
      const low = getUint32(l1, at + 4)
      if (high === 0 && low === 0) continue
      const table = spec.entryOffset(high, low)
      const wait = this.#visitEntry(place + at, high, low, isActive)
      if (wait !== undefined) await wait
      if (table === 0 || table % this.#clusterSize !== 0 || table >= this.#fileSize) continue
      if (this.#count === QCOW2_CHECK_TABLES) await this.finish()
      this.#push(isActive ? table : table + INACTIVE)
    }
    await this.#breather.pause()
  }

  /** The same for the inactive L1 table at `offset`. */
  async gatherFromFile(offset: number, length: number): Promise<void> {
    for (let at = offset; at < offset + length; at += L1_PIECE) {
      const piece = new Uint8Array(Math.min(L1_PIECE, offset + length - at))
      await this.#file.read(at, piece.length, piece, 0)
      await this.gather(piece, at, false)
    }
  }

  /** Visits the tables gathered, in the order of the file. */
  async finish(): Promise<void> {
    const bytes = new Uint8Array(this.#clusterSize)
    const tables = this.#tables.subarray(0, this.#count).sort()
    for (let next = 0; next < tables.length; ) {
      const place = Math.floor((tables[next] as number) / 2) * 2
      let active = 0
      let all = 0
      for (; next < tables.length && (tables[next] as number) <= place + INACTIVE; next++, all++)
        if (tables[next] === place) active++
      const wait = this.#file.read(place, bytes.length, bytes, 0)
      if (wait !== undefined) await wait
      await this.#walk.walk(bytes, place, { active, all })
      this.#visitor.progress?.(next / tables.length)
      await this.#breather.pause()
    }
    this.#count = 0
  }

  #visitEntry(place: number, high: number, low: number, isActive: boolean): Pending {
    const table = spec.entryOffset(high, low)
    const isReserved = (high & spec.L1_RESERVED_HIGH) !== 0 || (low & spec.L1_RESERVED_LOW) !== 0
    if (isReserved) return this.#visitFlawed(place, high, table, isActive)
    if (table === 0) return this.#visitor.flaw('L1 nowhere', place, 1, isActive)
    if (table >= this.#fileSize) return this.#visitPastEnd(place, high, table, isActive)
    if (table % this.#clusterSize !== 0) return this.#visitor.flaw('L1 unaligned', place, 1, isActive)
    this.#visitor.area(table, this.#clusterSize, 'L2 table', 1)
    return isActive ? this.#visitor.flag?.(place, table, high >= spec.OFLAG_COPIED_HIGH, 1) : undefined
  }

  async #visitFlawed(place: number, high: number, table: number, isActive: boolean): Promise<void> {
    await this.#visitor.flaw('L1 reserved', place, 1, isActive)
    await this.#visitEntry(place, (high & ~spec.L1_RESERVED_HIGH) >>> 0, table % 2 ** 32, isActive)
  }

  async #visitPastEnd(place: number, high: number, table: number, isActive: boolean): Promise<void> {
    await this.#visitor.flaw('L1 past end', place, 1, isActive)
    if (isActive) await this.#visitor.flag?.(place, table, high >= spec.OFLAG_COPIED_HIGH, 1)
  }

  #push(table: number): void {
    if (this.#count === this.#tables.length) {
      const more = new Float64Array(Math.min(QCOW2_CHECK_TABLES, this.#count * 4))
      more.set(this.#tables)
      this.#tables = more
    }
    this.#tables[this.#count++] = table
  }
}

/** Bytes of an entry of the snapshot table before its extra data; of extra data that version 3 demands; and QEMU's limit. */
export const SNAPSHOT_FIXED = 40
export const SNAPSHOT_EXTRA = 16
export const SNAPSHOT_EXTRA_MAX = 1024

async function walkSnapshots({ file, header }: Roots, visitor: Visitor, walk: MapWalk): Promise<void> {
  if (header.snapshotCount === 0) return
  const fixed = new Uint8Array(SNAPSHOT_FIXED)
  let at = header.snapshotsOffset
  let end = at
  for (let i = 0; i < header.snapshotCount; i++) {
    at = roundUp(end, 8)
    await file.read(at, fixed.length, fixed, 0)
    const extra = getUint32(fixed, 36)
    end = at + SNAPSHOT_FIXED + extra + getUint16(fixed, 12) + getUint16(fixed, 14)
    if (end - header.snapshotsOffset > QCOW2_DIRECTORY_MAX || end > file.size() + 8) {
      visitor.invalid('snapshot table end', i, `entry ${i} of the snapshot table leaves the table, or the file`)
      return
    }
    if (extra > SNAPSHOT_EXTRA_MAX || (header.version === 3 && extra < SNAPSHOT_EXTRA))
      visitor.invalid('snapshot extra data', i, `entry ${i} of the snapshot table has ${extra} bytes of extra data`)
    const l1Offset = getUint64(fixed, 0)
    const l1Length = getUint32(fixed, 8) * spec.ENTRY_SIZE
    const isPlaced = l1Offset > 0 && l1Offset % header.clusterSize === 0 && l1Offset + l1Length <= file.size()
    if (l1Length > QCOW2_L1_MAX || (l1Length > 0 && !isPlaced)) {
      visitor.invalid(
        'snapshot',
        i,
        `snapshot ${i} has an L1 table of ${l1Length} bytes at ${l1Offset}, which cannot be`,
      )
      continue
    }
    if (l1Length === 0) continue
    visitor.area(l1Offset, l1Length, 'unique', 1)
    await walk.gatherFromFile(l1Offset, l1Length)
  }
  visitor.area(header.snapshotsOffset, end - header.snapshotsOffset, 'unique', 1)
}

const BITMAP_FIXED = 24

async function walkBitmaps({ file, header }: Roots, visitor: Visitor): Promise<void> {
  if (header.bitmaps === undefined) return
  const { offset, size, count } = header.bitmaps
  visitor.area(offset, size, 'unique', 1)
  const directory = new Uint8Array(size)
  await file.read(offset, size, directory, 0)
  let at = 0
  for (let i = 0; i < count; i++) {
    const isInside = at + BITMAP_FIXED <= size
    const table = isInside ? getUint64(directory, at) : -1
    const length = isInside ? getUint32(directory, at + 8) * spec.ENTRY_SIZE : 0
    if (table <= 0 || table % header.clusterSize !== 0 || table + length > file.size()) {
      visitor.invalid('bitmap', i, `bitmap ${i} has a table of ${length} bytes at ${table}, which cannot be`)
      return
    }
    at += roundUp(BITMAP_FIXED + getUint32(directory, at + 20) + getUint16(directory, at + 18), 8)
    visitor.area(table, length, 'unique', 1)
    await walkBitmapTable({ file, header }, visitor, i, { place: table, length })
  }
}

async function walkBitmapTable(
  { file, header }: Pick<Roots, 'file' | 'header'>,
  visitor: Visitor,
  index: number,
  { place, length }: { readonly place: number; readonly length: number },
): Promise<void> {
  const table = new Uint8Array(Math.min(L1_PIECE, length))
  for (let done = 0; done < length; done += L1_PIECE) {
    const piece = Math.min(L1_PIECE, length - done)
    await file.read(place + done, piece, table, 0)
    for (let at = 0; at < piece; at += spec.ENTRY_SIZE) {
      const high = getUint32(table, at)
      const low = getUint32(table, at + 4)
      const host = spec.entryOffset(high, low)
      const isReserved = (high & spec.BITMAP_TABLE_RESERVED_HIGH) !== 0 || (low & spec.BITMAP_TABLE_RESERVED_LOW) !== 0
      const isAllOnes = (low & spec.BITMAP_TABLE_ONES_LOW) !== 0
      if (isReserved || host % header.clusterSize !== 0 || (host !== 0 && (isAllOnes || host >= file.size())))
        visitor.invalid('bitmap', index, `the bitmap table entry at ${place + done + at} cannot be`)
      else if (host !== 0) visitor.area(host, header.clusterSize, 'unique', 1)
    }
  }
}
