// The persistent bitmaps of a qcow2 image, as a writer that knows them must treat them: while the image is written, those
// that record have the in_use flag in the file and their bits here, and every change of the disk is recorded before it is
// made; at the clean end of writing the bits are stored and the flag is cleared. After a crash the flag says to all that
// the bitmap missed something. A bitmap that does not record stays as it is in the file.
//
//   consistent --(begin)--> in_use, bits in memory --(store, sync, release)--> consistent
//   in_use, or autoclear bit 0 clear: inconsistent, and of no use but to be removed
//
// Those that are entrusted to whoever writes the image, since it keeps them itself, are marked in the same way and not recorded here:
// it saves them at the end of writing, and if it does not come to that nobody trusts what the file has.
//
// No request may be in flight while any method but `record` runs.

import { QCOW2_BITMAP_MAX, QCOW2_BITMAPS_BYTES } from '../../base/limits.ts'
import { Bitmap } from '../../bitmap/bitmap.ts'
import { BlockError, type ErrorKind, isBlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import {
  type BitmapEntry,
  checkDirectoryFits,
  readDirectory,
  tableEntriesFor,
  writeDirectory,
  writeFlags,
} from './bitmap-directory.ts'
import { type BitmapInfo, type BitmapToSave, copyRuns } from './bitmap-info.ts'
import { bitmapBytes, checkBitmap, defaultGranularity, tooLarge } from './bitmap-shape.ts'
import {
  allocateTable,
  freeBitmap,
  freeClusters,
  loadBits,
  type StorageHome,
  type Stored,
  storeBits,
  writeTable,
} from './bitmap-storage.ts'
import { findBitmapDirectory, hasAutoclear, type Header } from './header.ts'
import * as spec from './spec.ts'

/** What can be done with the bitmaps of an image that is written. */
export type BitmapEdits = Pick<Bitmaps, 'add' | 'remove' | 'setRecording' | 'clear' | 'merge' | 'save' | 'deposit'>

/** Bits in memory, of a bitmap that is marked in_use in the file. */
interface Live {
  bits: Bitmap
  isRecording: boolean
  /** How many bits are set in the file, where only `record` has changed them since; else -1. */
  storedCount: number
}

interface Held {
  readonly entry: BitmapEntry
  live: Live | undefined
}

export class Bitmaps {
  readonly #file: HostFile
  readonly #header: Header
  readonly #report: (message: string) => void
  #held: Held[] = []
  #problem: BlockError | undefined
  #recording: Bitmap[] = []
  /** There while the image is written. */
  #home: StorageHome | undefined
  /** Names of bitmaps that whoever writes the image keeps itself: from the next `begin` on. */
  entrusted: ReadonlySet<string> = new Set()

  /** `report` hears of bitmaps that are given up. */
  constructor(file: HostFile, header: Header, report: (message: string) => void) {
    this.#file = file
    this.#header = header
    this.#report = report
  }

  /** Reads the directory; what is wrong in it is said by `list` and `begin`. */
  async open(): Promise<void> {
    this.#held = []
    this.#problem = undefined
    const place = this.#isTrusted ? this.#header.bitmaps : findBitmapDirectory(this.#header, this.#file.size())
    if (place === undefined) return
    try {
      const entries = await readDirectory(this.#file, this.#header, place)
      this.#held = entries.map((entry) => ({ entry, live: undefined }))
    } catch (error) {
      if (!isBlockError(error, 'invalid-format')) throw error
      // Where nobody vouches for the directory, anything may be in its place.
      if (this.#isTrusted) this.#problem = error
    }
  }

  /** All bitmaps, in the order of the directory. Kind 'invalid-format' when that cannot be right. */
  get list(): BitmapInfo[] {
    if (this.#problem !== undefined) throw this.#problem
    return this.#held.map((held) => {
      const { entry, live } = held
      const isConsistent = this.#isConsistent(held)
      const isRecording = live?.isRecording ?? (entry.flags & spec.BITMAP_AUTO) !== 0
      return {
        name: entry.name,
        granularity: 2 ** entry.granularityBits,
        isRecording,
        isConsistent,
        flags: [...(isConsistent ? [] : ['in-use' as const]), ...(isRecording ? ['auto' as const] : [])],
        count: live?.bits.count,
      }
    })
  }

  /** True when a program that does not know bitmaps wrote to the image: nothing vouches for theirs any more. */
  get isStale(): boolean {
    return !this.#isTrusted && this.#header.extensions.some(({ type }) => type === spec.EXT_BITMAPS)
  }

  /** A bitmap's bits. Kinds: 'not-found', 'corrupt' when it is inconsistent or cannot be read. */
  async read(name: string): Promise<Bitmap> {
    const held = this.#find(name)
    if (held.live !== undefined) return held.live.bits.copy()
    this.#mustBeConsistent(held)
    return loadBits(this.#file, this.#header, held.entry)
  }

  /** A bitmap's bits as they are at each call, not to be changed; until the access to the image changes. Kinds as for `read`. */
  async watch(name: string): Promise<() => Bitmap> {
    const held = this.#find(name)
    const stored = held.live?.bits ?? (await this.read(name))
    return () => held.live?.bits ?? stored
  }

  /**
   * Begins writing: takes what records into memory and marks it in the file; a sync must follow before the disk changes.
   * What cannot be taken is marked just so, and is inconsistent from then on. Kind 'invalid-format' as for `list`.
   */
  async begin(home: StorageHome): Promise<void> {
    await this.open()
    if (this.#problem !== undefined) throw this.#problem
    this.#home = home
    if (!this.#isTrusted) return
    for (const { entry } of this.#held) if (this.entrusted.has(entry.name)) entry.flags |= spec.BITMAP_IN_USE
    const taken = this.#held.filter(
      ({ entry }) => (entry.flags & (spec.BITMAP_AUTO | spec.BITMAP_IN_USE)) === spec.BITMAP_AUTO,
    )
    for (const held of taken) {
      try {
        await this.#load(held)
      } catch (error) {
        if (!isBlockError(error, 'corrupt') && !isBlockError(error, 'unsupported')) throw error
        this.#report(`${error.message}; what is written from now on is not in it`)
      }
      held.entry.flags |= spec.BITMAP_IN_USE
    }
    // Also those that were marked before: whether that sync succeeded is not known here.
    await this.#writeFlags()
    this.#refresh()
  }

  /**
   * After `begin`, with the dirty bit durable and refcounts that do not count stale bitmaps: they get new, empty places, so
   * that their names stay to be seen and removed.
   */
  async refound(): Promise<void> {
    const home = this.#mustWrite()
    const names = this.#held.map(({ entry }) => entry.name).join(', ')
    const what = names === '' ? 'its bitmaps, which cannot be read, are gone' : `remove its bitmaps ${names}`
    this.#report(`${this.#file.path} was written by a program that does not know bitmaps: ${what}`)
    for (const { entry } of this.#held) {
      entry.tableSize = this.#tableSize(2 ** entry.granularityBits)
      entry.tableOffset = await allocateTable(home, entry.tableSize)
      entry.flags |= spec.BITMAP_IN_USE
    }
    await writeDirectory(home, this.#entries)
  }

  /** Records a change of the disk that is about to be made, in bytes. */
  record(offset: number, length: number): void {
    const recording = this.#recording
    for (let i = 0; i < recording.length; i++) (recording[i] as Bitmap).set(offset, length)
  }

  /** Writes what is in memory to the file, where it stays marked. Durable after the next sync; then comes `release`. */
  async store(): Promise<void> {
    await this.#store(() => true)
  }

  /** After a failure between `store` and `release`: what has become of it is not known, so that the marks stay for good. */
  giveUp(): void {
    this.#giveUp(() => true)
  }

  /** Clears the marks of all that was stored; a sync must follow, and nothing more may be recorded. */
  async release(): Promise<void> {
    await this.#release(() => true)
    this.#home = undefined
  }

  /**
   * Adds an empty bitmap; durable on return, inconsistent until the clean end of writing when it records. `granularity` is in
   * bytes, a power of two from 512 to 2 GiB. Kinds: 'exists', 'invalid-argument', 'unsupported' when it would be too large
   * or the image has no room for one more.
   */
  async add(name: string, granularity: number | undefined, isRecording: boolean): Promise<void> {
    const granule = granularity ?? defaultGranularity(this.#header.clusterSize)
    this.#check(name, granule)
    await this.#add(name, new Bitmap(this.#header.size, granule), isRecording)
    await this.#settle()
  }

  /** Removes a bitmap, whatever its state; durable on return. Kind 'not-found'. */
  async remove(name: string): Promise<void> {
    const home = this.#mustWrite()
    const held = this.#find(name)
    this.#held = this.#held.filter((other) => other !== held)
    this.#refresh()
    await writeDirectory(home, this.#entries)
    await freeBitmap(home, held.entry)
  }

  /** Has a bitmap record from now on, or no more. Kinds: 'not-found', 'corrupt', 'unsupported' when it is too large. */
  async setRecording(name: string, isRecording: boolean): Promise<void> {
    const live = await this.#take(this.#find(name))
    live.isRecording = isRecording
    await this.#settle()
  }

  /** Clears a bitmap. Kinds: 'not-found', 'corrupt', 'unsupported' when it is too large. */
  async clear(name: string): Promise<void> {
    const live = await this.#take(this.#find(name))
    live.bits.clearAll()
    live.storedCount = -1
    await this.#settle()
  }

  /** Adds what `from` has set, of whatever granularity, rounded outward. Kinds: as for `clear`. */
  async merge(name: string, from: Bitmap): Promise<void> {
    const live = await this.#take(this.#find(name))
    copyRuns(from, live.bits)
    live.storedCount = -1
    await this.#settle()
  }

  /**
   * Puts bitmaps of the same names in the image, in place of those that are there. One that records goes on with what is written
   * from now on, and is whole in the file after the clean end of writing; the others are durable on return. Kinds: as for `add`.
   */
  async save(bitmaps: readonly BitmapToSave[]): Promise<void> {
    await this.#put(bitmaps)
    await this.#settle()
  }

  /**
   * The same for bitmaps that are entrusted from now on: durable on return, and marked until `save` has them at the end of writing. Kinds:
   * as for `add`.
   */
  async deposit(bitmaps: readonly BitmapToSave[]): Promise<void> {
    const names = new Set(bitmaps.map(({ name }) => name))
    this.entrusted = new Set([...this.entrusted, ...names])
    try {
      await this.#put(bitmaps)
      const meant = new Set(this.#held.flatMap(({ entry, live }) => (live && names.has(entry.name) ? [live] : [])))
      await this.#store((live) => meant.has(live))
      await this.#file.sync()
    } finally {
      for (const held of this.#held) if (names.has(held.entry.name)) held.live = undefined
      this.#refresh()
    }
  }

  async #put(bitmaps: readonly BitmapToSave[]): Promise<void> {
    for (const { name, bits, isRecording } of bitmaps) {
      this.#check(name, bits.granule)
      if (bits.size !== this.#header.size)
        throw this.#failure('invalid-argument', `the bitmap ${JSON.stringify(name)} is of a disk of ${bits.size} bytes`)
      const before = this.#held.find(({ entry }) => entry.name === name)
      const isAlike = before?.entry.granularityBits === Math.log2(bits.granule) && before.entry.extra.length === 0
      if (before !== undefined && isAlike) await this.#replace(before, bits.copy(), isRecording)
      else {
        if (before !== undefined) await this.remove(name)
        await this.#add(name, bits.copy(), isRecording)
      }
    }
  }

  /** Before the disk gets `size` bytes: takes all that is consistent into memory. Kind 'unsupported' when that is too much. */
  async beforeResize(size: number): Promise<void> {
    const kept = this.#held.filter((held) => this.#isConsistent(held))
    let bytes = 0
    for (const { entry } of kept) {
      const granularity = 2 ** entry.granularityBits
      bytes += bitmapBytes(Math.max(size, this.#header.size), granularity)
      const isTooLarge = bytes > QCOW2_BITMAPS_BYTES || bitmapBytes(size, granularity) > QCOW2_BITMAP_MAX
      if (isTooLarge || size === 0)
        throw this.#failure(
          'unsupported',
          `with ${size} bytes it cannot keep its bitmap ${JSON.stringify(entry.name)}; remove that first`,
        )
    }
    for (const held of kept) await this.#take(held)
  }

  /** After it has changed: cuts what is past the end, and leaves what is new clear, as QEMU does. */
  async afterResize(): Promise<void> {
    for (const { live } of this.#held) {
      if (live === undefined || live.bits.size === this.#header.size) continue
      const resized = new Bitmap(this.#header.size, live.bits.granule)
      copyRuns(live.bits, resized)
      live.bits = resized
      live.storedCount = -1
    }
    await this.#settle()
  }

  get #isTrusted(): boolean {
    return this.#header.bitmaps !== undefined && hasAutoclear(this.#header, spec.AUTOCLEAR_BITMAPS)
  }

  get #entries(): BitmapEntry[] {
    return this.#held.map(({ entry }) => entry)
  }

  #isConsistent({ entry, live }: Held): boolean {
    if (live !== undefined) return true
    const isKnown = entry.extra.length === 0 || (entry.flags & spec.BITMAP_EXTRA_DATA_COMPATIBLE) !== 0
    return this.#isTrusted && isKnown && (entry.flags & spec.BITMAP_IN_USE) === 0
  }

  #find(name: string): Held {
    if (this.#problem !== undefined) throw this.#problem
    const found = this.#held.find(({ entry }) => entry.name === name)
    if (found !== undefined) return found
    throw this.#failure('not-found', `there is no bitmap ${JSON.stringify(name)} in the image`)
  }

  #mustBeConsistent(held: Held): void {
    if (this.#isConsistent(held)) return
    const name = JSON.stringify(held.entry.name)
    throw this.#failure(
      'corrupt',
      `the bitmap ${name} is inconsistent: it was not saved after the last writes; remove it`,
    )
  }

  #mustWrite(): StorageHome {
    if (this.#home !== undefined) return this.#home
    throw this.#failure('read-only', 'the image is open for reading only')
  }

  #check(name: string, granularity: number): void {
    checkBitmap(this.#file.path, this.#header.size, name, granularity)
  }

  async #add(name: string, bits: Bitmap, isRecording: boolean): Promise<void> {
    const home = this.#mustWrite()
    if (this.#held.some(({ entry }) => entry.name === name))
      throw this.#failure('exists', `there is a bitmap ${JSON.stringify(name)} already`)
    this.#needMemory(name, bits.granule)
    const entry: BitmapEntry = {
      name,
      granularityBits: Math.log2(bits.granule),
      extra: new Uint8Array(0),
      tableOffset: 0,
      tableSize: this.#tableSize(bits.granule),
      flags: spec.BITMAP_IN_USE | (isRecording ? spec.BITMAP_AUTO : 0),
    }
    checkDirectoryFits(home, [...this.#entries, entry])
    entry.tableOffset = await allocateTable(home, entry.tableSize)
    await writeDirectory(home, [...this.#entries, entry])
    this.#held = [...this.#held, { entry, live: { bits, isRecording, storedCount: bits.count === 0 ? 0 : -1 } }]
    this.#refresh()
  }

  async #replace(held: Held, bits: Bitmap, isRecording: boolean): Promise<void> {
    const { entry } = held
    this.#mustWrite()
    if (held.live === undefined) {
      this.#needMemory(entry.name, bits.granule)
      entry.flags |= spec.BITMAP_IN_USE
      await this.#writeFlags()
      await this.#file.sync()
    }
    held.live = { bits, isRecording, storedCount: -1 }
    this.#refresh()
  }

  /** The bits of a bitmap in memory, with the mark in the file durable. */
  async #take(held: Held): Promise<Live> {
    this.#mustWrite()
    if (held.live !== undefined) return held.live
    this.#mustBeConsistent(held)
    const live = await this.#load(held)
    held.entry.flags |= spec.BITMAP_IN_USE
    await this.#writeFlags()
    await this.#file.sync()
    return live
  }

  async #load(held: Held): Promise<Live> {
    const { entry } = held
    this.#mustBeConsistent(held)
    this.#needMemory(entry.name, 2 ** entry.granularityBits)
    const bits = await loadBits(this.#file, this.#header, entry)
    held.live = { bits, isRecording: (entry.flags & spec.BITMAP_AUTO) !== 0, storedCount: bits.count }
    return held.live
  }

  #needMemory(name: string, granularity: number): void {
    let bytes = bitmapBytes(this.#header.size, granularity)
    for (const { live } of this.#held) bytes += live === undefined ? 0 : bitmapBytes(live.bits.size, live.bits.granule)
    if (bytes > QCOW2_BITMAPS_BYTES) throw tooLarge(this.#file.path, name)
  }

  #refresh(): void {
    this.#recording = this.#held.flatMap(({ live }) => (live?.isRecording === true ? [live.bits] : []))
  }

  /** Stores and releases what does not record. */
  async #settle(): Promise<void> {
    this.#refresh()
    const isIdle = (live: Live): boolean => !live.isRecording
    if (!this.#held.some(({ live }) => live !== undefined && isIdle(live))) return
    try {
      await this.#store(isIdle)
      await this.#file.sync()
    } catch (error) {
      this.#giveUp(isIdle)
      throw error
    }
    await this.#release(isIdle)
    await this.#file.sync()
  }

  async #store(isMeant: (live: Live) => boolean): Promise<void> {
    const home = this.#mustWrite()
    const stored: Stored[] = []
    for (const held of this.#held) {
      const { entry, live } = held
      if (live === undefined || !isMeant(live) || live.bits.count === live.storedCount) continue
      try {
        stored.push(await storeBits(home, entry, live.bits))
        live.storedCount = live.bits.count
      } catch (error) {
        // The disk's data are whole; that the bitmap is not is what its mark says.
        if (!isBlockError(error, 'no-space')) throw error
        held.live = undefined
        this.#report(`${error.message}; the bitmap ${JSON.stringify(entry.name)} is not saved and inconsistent now`)
      }
    }
    const changed = stored.filter(({ isTableChanged }) => isTableChanged)
    if (changed.length === 0) return
    await this.#file.sync()
    for (const one of changed) await writeTable(home, one)
    let isMoved = false
    for (const { entry, tableOffset, table } of changed) {
      if (entry.tableOffset === tableOffset) continue
      entry.tableOffset = tableOffset
      entry.tableSize = table.length
      isMoved = true
    }
    if (isMoved) await writeDirectory(home, this.#entries)
    else await this.#file.sync()
    for (const { dropped } of changed) await freeClusters(home, dropped)
  }

  #giveUp(isMeant: (live: Live) => boolean): void {
    for (const held of this.#held) {
      if (held.live === undefined || !isMeant(held.live)) continue
      held.live = undefined
      this.#report(
        `${this.#file.path}: the bitmap ${JSON.stringify(held.entry.name)} could not be saved and is inconsistent now`,
      )
    }
    this.#refresh()
  }

  async #release(isMeant: (live: Live) => boolean): Promise<void> {
    let isChanged = false
    for (const held of this.#held) {
      const { entry, live } = held
      if (live === undefined || !isMeant(live)) continue
      entry.flags = (entry.flags & spec.BITMAP_EXTRA_DATA_COMPATIBLE) | (live.isRecording ? spec.BITMAP_AUTO : 0)
      held.live = undefined
      isChanged = true
    }
    this.#refresh()
    if (isChanged) await this.#writeFlags()
  }

  async #writeFlags(): Promise<void> {
    if (this.#header.bitmaps !== undefined) await writeFlags(this.#file, this.#header.bitmaps, this.#entries)
  }

  #tableSize(granularity: number): number {
    return Math.max(1, tableEntriesFor(this.#header.size, granularity, this.#header.clusterSize))
  }

  #failure(kind: ErrorKind, what: string): BlockError {
    const { path } = this.#file
    return new BlockError(kind, `${path}: ${what}`, { path })
  }
}
