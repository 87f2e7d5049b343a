// Walks everything that a qcow2 image refers to: header, L1 and L2 tables, guest data, internal snapshots, bitmaps, and the
// refcount structure itself. Who counts what comes (check.ts) sees each reference once per table that holds it.

import { Breather } from '../../base/breather.ts'
import { getUint16, getUint32, getUint64 } from '../../base/bytes.ts'
import { QCOW2_DIRECTORY_MAX, QCOW2_L1_MAX } from '../../base/limits.ts'
import { roundUp } from '../../base/round.ts'
import type { Pending } from '../../block/device.ts'
import type { HostFile } from '../../host/host.ts'
import type { Header } from './header.ts'
import * as spec from './spec.ts'

/** What an area of the file is: 'unique' structures have one reference, L2 tables and data can be shared by snapshots. */
export type AreaKind = 'unique' | 'L2 table' | 'data' | 'compressed'

/** An entry of the active L1 table or of an L2 table under it. */
export interface ActiveEntry {
  /** Where the entry is in the file. */
  readonly place: number
  readonly isCopied: boolean
  readonly isL1: boolean
  /** The cluster that it leads to, as an offset in the file. */
  readonly target: number
}

export interface Visitor {
  /** An area of the file that something refers to, in bytes. */
  area(offset: number, length: number, kind: AreaKind): void
  /** A table or entry that cannot be right; `what` is a sentence without its end. */
  invalid(what: string): void
  /** Every entry of the disk's own tables that leads to a whole cluster. */
  active?(entry: ActiveEntry): Pending
}

/** The image, and what of it is in memory. */
export interface Roots {
  readonly file: HostFile
  readonly header: Header
  /** Bytes of the active L1 table. */
  readonly l1: Uint8Array
  /** Offsets of the refcount blocks; 0 for none. */
  readonly refcountTable: Float64Array
}

/** Visits every reference in the image. What lies past the end of the file is visited too; the visitor judges. */
export async function walkReferences(roots: Roots, visitor: Visitor): Promise<void> {
  const { header, l1, refcountTable } = roots
  const { clusterSize } = header
  visitor.area(0, clusterSize, 'unique')
  visitor.area(header.refcountTableOffset, header.refcountTableClusters * clusterSize, 'unique')
  for (const block of refcountTable) if (block !== 0) visitor.area(block, clusterSize, 'unique')
  if (header.l1Size > 0) visitor.area(header.l1Offset, header.l1Size * spec.ENTRY_SIZE, 'unique')
  await new MapWalk(roots, visitor, visitor.active?.bind(visitor)).walk(l1, header.l1Offset)
  await walkSnapshots(roots, visitor)
  await walkBitmaps(roots, visitor)
}

/** One L1 table, the L2 tables that it leads to, and their clusters. */
class MapWalk {
  readonly #file: HostFile
  readonly #header: Header
  readonly #visitor: Visitor
  readonly #active: ((entry: ActiveEntry) => Pending) | undefined
  readonly #breather = new Breather()
  readonly #l2: Uint8Array

  constructor({ file, header }: Roots, visitor: Visitor, active?: (entry: ActiveEntry) => Pending) {
    this.#file = file
    this.#header = header
    this.#visitor = visitor
    this.#active = active
    this.#l2 = new Uint8Array(header.clusterSize)
  }

  async walk(l1: Uint8Array, l1Offset: number): Promise<void> {
    const seen = new Set<number>()
    const { clusterSize } = this.#header
    const fileSize = this.#file.size()
    for (let at = 0; at < l1.length; at += spec.ENTRY_SIZE) {
      const high = getUint32(l1, at)
      const low = getUint32(l1, at + 4)
      const table = spec.entryOffset(high, low)
      if ((high & spec.L1_RESERVED_HIGH) !== 0 || (low & spec.L1_RESERVED_LOW) !== 0)
        this.#visitor.invalid(`L1 entry ${at / spec.ENTRY_SIZE} has reserved bits set`)
      if (table === 0) continue
      if (table % clusterSize !== 0) {
        this.#visitor.invalid(`L1 entry ${at / spec.ENTRY_SIZE} leads to ${table}, no cluster's start`)
        continue
      }
      this.#visitor.area(table, clusterSize, 'L2 table')
      const isCopied = high >= spec.OFLAG_COPIED_HIGH
      await this.#active?.({ place: l1Offset + at, isCopied, isL1: true, target: table })
      if (seen.has(table)) {
        this.#visitor.invalid(`L1 entry ${at / spec.ENTRY_SIZE} leads to the L2 table of another entry`)
        continue
      }
      seen.add(table)
      if (table >= fileSize) continue
      await this.#file.read(table, clusterSize, this.#l2, 0)
      await this.#walkTable(table)
      await this.#breather.pause()
    }
  }

  async #walkTable(table: number): Promise<void> {
    const bytes = this.#l2
    for (let at = 0; at < bytes.length; at += this.#header.l2EntrySize) {
      const high = getUint32(bytes, at)
      const low = getUint32(bytes, at + 4)
      if (this.#header.extendedL2) this.#checkSubclusters(table + at, high, low, at)
      if (high === 0 && low <= spec.OFLAG_ZERO_LOW) continue
      if ((high & spec.OFLAG_COMPRESSED_HIGH) !== 0) {
        this.#visitCompressed(table + at, high, low)
        continue
      }
      const wait = this.#visitStandard(table + at, high, low)
      if (wait !== undefined) await wait
    }
  }

  /** Reports the bitmaps of an extended entry when they cannot be. */
  #checkSubclusters(place: number, high: number, low: number, at: number): void {
    if ((high & spec.OFLAG_COMPRESSED_HIGH) !== 0) return
    const zeros = getUint32(this.#l2, at + spec.SUBCLUSTERS_ZERO)
    const allocated = getUint32(this.#l2, at + spec.SUBCLUSTERS_ALLOCATED)
    const hasPlace = spec.entryOffset(high, low) !== 0
    if ((zeros & allocated) !== 0 || (allocated !== 0 && !hasPlace))
      this.#visitor.invalid(`the L2 entry at ${place} has subclusters that cannot be`)
  }

  #visitStandard(place: number, high: number, low: number): Pending {
    const { clusterSize } = this.#header
    const host = spec.entryOffset(high, low)
    const reservedLow = this.#header.extendedL2 ? spec.EXTENDED_L2_RESERVED_LOW : spec.L2_RESERVED_LOW
    const isReserved = (high & spec.L2_RESERVED_HIGH) !== 0 || (low & reservedLow) !== 0
    if (isReserved || host === 0 || host % clusterSize !== 0) {
      this.#visitor.invalid(`the L2 entry at ${place} is no entry: ${host === 0 ? 'no place' : `place ${host}`}`)
      return undefined
    }
    this.#visitor.area(host, clusterSize, 'data')
    return this.#active?.({ place, isCopied: high >= spec.OFLAG_COPIED_HIGH, isL1: false, target: host })
  }

  #visitCompressed(place: number, high: number, low: number): void {
    if (high >= spec.OFLAG_COPIED_HIGH)
      this.#visitor.invalid(`the L2 entry at ${place} is compressed and marked copied`)
    const host = spec.compressedOffset(high, low, this.#header.clusterBits)
    const length = spec.compressedLength(high, low, this.#header.clusterBits)
    this.#visitor.area(host, length, 'compressed')
  }
}

const SNAPSHOT_FIXED = 40

async function walkSnapshots(roots: Roots, visitor: Visitor): Promise<void> {
  const { file, header } = roots
  if (header.snapshotCount === 0) return
  const fixed = new Uint8Array(SNAPSHOT_FIXED)
  let at = header.snapshotsOffset
  for (let i = 0; i < header.snapshotCount; i++) {
    await file.read(at, fixed.length, fixed, 0)
    const l1Offset = getUint64(fixed, 0)
    const l1Size = getUint32(fixed, 8) * spec.ENTRY_SIZE
    at += roundUp(SNAPSHOT_FIXED + getUint32(fixed, 36) + getUint16(fixed, 12) + getUint16(fixed, 14), 8)
    const isTooLong = at - header.snapshotsOffset > QCOW2_DIRECTORY_MAX || at > file.size() + 8
    const isPlaced = l1Offset > 0 && l1Offset % header.clusterSize === 0 && l1Offset + l1Size <= file.size()
    if (isTooLong || l1Size > QCOW2_L1_MAX || (l1Size > 0 && !isPlaced)) {
      visitor.invalid(`snapshot ${i} has an L1 table or name that cannot be`)
      return
    }
    visitor.area(l1Offset, l1Size, 'unique')
    const l1 = new Uint8Array(l1Size)
    await file.read(l1Offset, l1Size, l1, 0)
    await new MapWalk(roots, visitor).walk(l1, l1Offset)
  }
  visitor.area(header.snapshotsOffset, at - header.snapshotsOffset, 'unique')
}

const BITMAP_FIXED = 24

async function walkBitmaps({ file, header }: Roots, visitor: Visitor): Promise<void> {
  if (header.bitmaps === undefined) return
  const { offset, size, count } = header.bitmaps
  const { clusterSize } = header
  visitor.area(offset, size, 'unique')
  const directory = new Uint8Array(size)
  await file.read(offset, size, directory, 0)
  let at = 0
  for (let i = 0; i < count; i++) {
    const isInside = at + BITMAP_FIXED <= size
    const tableOffset = isInside ? getUint64(directory, at) : -1
    const tableLength = isInside ? getUint32(directory, at + 8) * spec.ENTRY_SIZE : 0
    if (tableOffset < 0 || tableOffset % clusterSize !== 0 || tableOffset + tableLength > file.size()) {
      visitor.invalid(`bitmap ${i} has a table that cannot be`)
      return
    }
    const extra = getUint32(directory, at + 20)
    at += roundUp(BITMAP_FIXED + extra + getUint16(directory, at + 18), 8)
    visitor.area(tableOffset, tableLength, 'unique')
    const table = new Uint8Array(tableLength)
    await file.read(tableOffset, tableLength, table, 0)
    for (let entry = 0; entry < tableLength; entry += spec.ENTRY_SIZE) {
      const place = spec.entryOffset(getUint32(table, entry), getUint32(table, entry + 4))
      if (place !== 0) visitor.area(place, clusterSize, 'unique')
    }
  }
}
