// A qcow2 image as a Layer: opening it, and its parts under one roof. What it shows is in reader.ts, changes are in writer.ts,
// the change between read and write access in writing.ts, the map in tables.ts, allocation in allocator.ts.

import type { Bitmap } from '../../bitmap/bitmap.ts'
import {
  type Access,
  type BackingReference,
  type BlockDevice,
  type Capabilities,
  type ExtentVisitor,
  type Layer,
  MAY_UNMAP,
  type NamedBacking,
  type OwnershipVisitor,
  type Pending,
} from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'
import type { Host, HostFile } from '../../host/host.ts'
import type { BitmapInfo } from './bitmap-info.ts'
import { type BitmapEdits, Bitmaps } from './bitmaps.ts'
import { BorrowedFile } from './borrowed-file.ts'
import { type CheckOptions, type CheckResult, checkImage } from './check.ts'
import { removeBacking, rewriteBacking } from './backing.ts'
import { type Admit, type DataFile, openDataFile, unopenedDataFile, openWritableOrNot } from './data-file.ts'
import { emptyImage } from './empty.ts'
import { type Header, readHeader } from './header.ts'
import { type MappingVisitor, Reader } from './reader.ts'
import { type Preallocation, preallocate } from './preallocate.ts'
import { resizeImage, type ResizeOptions } from './resize.ts'
import type { Progress } from './shared-clusters.ts'
import type { Snapshot } from './snapshot-table.ts'
import { type SnapshotHome, Snapshots } from './snapshots.ts'
import { Tables } from './tables.ts'
import { beginWriting, claim, markClean, markedCorrupt, type Parts, storeAll, type Writing } from './writing.ts'

export interface OpenQcow2Options {
  /** For messages. */
  readonly name: string
  /** Hears, as sentences, of persistent bitmaps that are given up while the image is written. */
  readonly report?: ((message: string) => void) | undefined
  /** Asked of an external data file, by its real path, before it is opened; throws to refuse it. Without it any is opened. */
  readonly admit?: Admit
  /** Leaves an external data file alone: what the image says can be read and checked, the disk's data cannot. */
  readonly withoutData?: boolean
}

/**
 * Opens the image at `path`, with its external data file, with access 'read', whether or not it could be written. Kinds:
 * 'not-found', 'permission', 'busy' when another program writes to it, 'invalid-format' and 'unsupported' as `readHeader`
 * says, and those of `openDataFile`.
 */
export async function openQcow2(host: Host, path: string, options: OpenQcow2Options): Promise<Qcow2Image> {
  const file = await openWritableOrNot(host, path)
  let dataFile: DataFile | undefined
  try {
    const header = await readHeader(file)
    const isBlockDevice = (await host.status(path))?.kind === 'block'
    if (header.dataFile !== undefined) {
      const isLeft = options.withoutData === true
      dataFile = isLeft ? unopenedDataFile(path, header) : await openDataFile(host, path, header, options.admit)
    }
    const tables = new Tables(file, header)
    await tables.open()
    const bitmaps = new Bitmaps(file, header, options.report ?? ignore)
    const image = new Qcow2Image({ file, isBlockDevice, dataFile, header, tables, bitmaps }, options.name)
    await image.readDirectories()
    return image
  } catch (error) {
    await dataFile?.file.close()
    await file.close()
    throw error
  }
}

/** What the header of the image at `path` says, and nothing else of it is read. Kinds as for `openQcow2`, without 'busy'. */
export async function readQcow2Info(host: Host, path: string): Promise<Readonly<Header>> {
  const file = await host.open(path)
  try {
    return await readHeader(file)
  } finally {
    await file.close()
  }
}

function ignore(): void {}

export class Qcow2Image implements Layer {
  readonly name: string
  readonly format = 'qcow2'
  backing: BlockDevice | undefined
  readonly #parts: Parts
  readonly #file: HostFile
  readonly #tables: Tables
  readonly #reader: Reader
  readonly #bitmaps: Bitmaps
  readonly #capabilities: Readonly<Record<Access, Capabilities>>
  #header: Header
  #writing: Writing | undefined
  readonly #snapshots: Snapshots

  /** Use `openQcow2`. */
  constructor(parts: Parts, name: string) {
    const { file, dataFile, header, tables, bitmaps } = parts
    this.name = name
    this.#parts = parts
    this.#file = file
    this.#header = header
    this.#tables = tables
    this.#reader = new Reader(file, dataFile?.file ?? file, this, tables)
    this.#bitmaps = bitmaps
    this.#snapshots = new Snapshots(file, header)
    const can: Capabilities = {
      write: false,
      fua: 'emulated',
      zero: 'native',
      trim: 'native',
      // All of a raw data file is mapped: what of it is a hole only the file system can tell.
      extents: header.dataFile?.isRaw === true ? 'emulated' : 'native',
      minimumBlock: 1,
      bestBlock: header.clusterSize,
    }
    this.#capabilities = { read: can, write: { ...can, write: true } }
  }

  get path(): string {
    return this.#file.path
  }

  /** The path of the external data file; undefined without one. */
  get dataFile(): string | undefined {
    return this.#parts.dataFile?.file.path
  }

  get size(): number {
    return this.#header.size
  }

  get clusterSize(): number {
    return this.#header.unitSize
  }

  get access(): Access {
    return this.#writing === undefined ? 'read' : 'write'
  }

  get can(): Capabilities {
    return this.#capabilities[this.access]
  }

  get backingReference(): BackingReference | undefined {
    return this.#header.backing
  }

  /** What the header says. */
  get header(): Readonly<Header> {
    return this.#header
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.#reader.read(offset, length, into, at)
  }

  write(offset: number, length: number, from: Uint8Array, at: number, _flags: number): Pending {
    const { writer } = this.#mustWrite()
    this.#bitmaps.record(offset, length)
    return writer.write(offset, length, from, at)
  }

  /**
   * Stores the cluster at `offset`, of which the disk has the `length` bytes at `plain[at]`: as `packed`, what they were compressed
   * to together with the zeros that make a short last one whole, or plain without it. Kind 'unsupported' with an external
   * data file.
   */
  writeCompressed(
    offset: number,
    packed: Uint8Array | undefined,
    plain: Uint8Array,
    at: number,
    length: number,
  ): Pending {
    const { writer } = this.#mustWrite()
    if (this.#header.dataFile !== undefined) {
      const message = `${this.path} has an external data file, which holds no compressed clusters`
      throw new BlockError('unsupported', message, { path: this.path })
    }
    this.#bitmaps.record(offset, length)
    if (packed === undefined) return writer.write(offset, length, plain, at)
    // The place may be one that was freed and is used again.
    this.#reader.forget()
    return writer.writeCompressed(offset, packed)
  }

  zero(offset: number, length: number, flags: number): Pending {
    const { writer } = this.#mustWrite()
    this.#bitmaps.record(offset, length)
    return writer.zero(offset, length, (flags & MAY_UNMAP) !== 0)
  }

  trim(offset: number, length: number, _flags: number): Pending {
    const { writer } = this.#mustWrite()
    this.#bitmaps.record(offset, length)
    return writer.trim(offset, length)
  }

  flush(): Pending {
    return this.#writing?.writer.flush()
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.#reader.extents(offset, length, visit)
  }

  allocation(offset: number, length: number, visit: OwnershipVisitor): Pending {
    return this.#reader.allocation(offset, length, visit)
  }

  /** Visits the whole range in pieces, in order: how each is mapped, and where in the file that is. */
  mappings(offset: number, length: number, visit: MappingVisitor): Pending {
    return this.#reader.mappings(offset, length, visit)
  }

  /**
   * See Layer. To 'write' also repairs an image that was not closed cleanly; of version 2, which has no dirty bit to say so,
   * clusters that a crash leaked stay leaked until a repair. Kinds: 'busy', 'permission', 'corrupt'.
   */
  async setAccess(access: Access): Promise<void> {
    if (access === this.access) return
    if (access === 'write') this.#writing = await beginWriting(this.#parts, this)
    else if (this.#writing !== undefined) await this.#endWriting(this.#writing)
  }

  /** See Layer. Kinds: those of `resize`. */
  grow(size: number): Promise<void> {
    return this.resize(size)
  }

  /**
   * Makes the disk larger, or with `shrink` smaller: what is past its end is lost then, and no request may be in flight. Durable
   * on return. Kinds: 'invalid-argument' for a size that cannot be, 'unsupported' for an image whose size is fixed.
   */
  async resize(size: number, options: ResizeOptions = {}): Promise<void> {
    const parts = { file: this.#file, header: this.#header, dataFile: this.#parts.dataFile, ...this.#home }
    const from = this.size
    await this.#bitmaps.beforeResize(size)
    await resizeImage(size, { ...parts, backing: this.backing }, options)
    await this.#bitmaps.afterResize()
    await this.preallocate(from, options.preallocation ?? 'off')
  }

  /**
   * Gives the disk its places from `offset` on ahead of use; see `CreateOptions`. Durable on return. Needs access 'write'. A raw data
   * file is mapped whatever is asked: its data then show at once, and never without their mapping after a crash.
   */
  preallocate(offset: number, how: Preallocation): Promise<void> {
    const least = how === 'off' && this.#header.dataFile?.isRaw === true ? 'metadata' : how
    return preallocate(this, this.#mustWrite().writer, this.#parts.dataFile?.file ?? this.#file, offset, least)
  }

  /** See Layer. Kind 'invalid-argument' for a name that does not fit. */
  async setBackingReference(backing: NamedBacking | undefined): Promise<void> {
    this.#mustWrite()
    if (backing === undefined) await removeBacking(this.#file, this.#header)
    else await rewriteBacking(this.#file, this.#header, backing.name, backing.format)
  }

  /** The internal snapshots, oldest first. Kind 'invalid-format' when their table cannot be right. */
  get snapshots(): readonly Snapshot[] {
    return this.#snapshots.list
  }

  /**
   * The disk as an internal snapshot holds it, for reading only, and open until it is closed or the image is; its backing is
   * the image's. `wanted` is an id or, where no id is equal to it, a name. Kinds: 'not-found', and as for `snapshots`.
   */
  async openSnapshot(wanted: string): Promise<Layer> {
    const snapshot = this.#snapshots.find(wanted)
    const { name, diskSize: size, l1Offset, l1Size } = snapshot
    const file = new BorrowedFile(this.#file, this.#snapshots.hold(snapshot))
    const header: Header = { ...this.#header, size, l1Offset, l1Size, snapshotCount: 0 }
    const tables = new Tables(file, header)
    tables.mayPassEnd = this.#tables.mayPassEnd
    await tables.open()
    const bitmaps = new Bitmaps(file, header, ignore)
    const parts: Parts = {
      file,
      isBlockDevice: this.#parts.isBlockDevice,
      dataFile: undefined,
      header,
      tables,
      bitmaps,
    }
    const view = new Qcow2Image(parts, `${this.name}@${name}`)
    view.backing = this.backing
    return view
  }

  /**
   * Keeps the disk as it is now as an internal snapshot; durable on return. Names need not be unique. Needs access 'write', and
   * no request in flight. Kinds: 'invalid-argument' for a name that cannot be; 'unsupported' with an external data file, too
   * many snapshots, or refcounts too narrow for one more, before anything is changed; 'corrupt'.
   */
  createSnapshot(name: string, progress: Progress = ignore): Promise<Snapshot> {
    return this.#snapshots.create(this.#home, name, progress)
  }

  /**
   * Makes the disk what an internal snapshot holds, with its size; what it held since is lost. The snapshot stays. Bitmaps that
   * record have all of the disk set. Kinds and needs: as for `createSnapshot`, and 'not-found'.
   */
  async applySnapshot(wanted: string, progress: Progress = ignore): Promise<void> {
    const home = this.#home
    await this.#bitmaps.beforeResize(this.#snapshots.find(wanted).diskSize)
    this.#bitmaps.record(0, this.size)
    await this.#snapshots.apply(home, wanted, progress)
    this.#reader.forget()
    await this.#bitmaps.afterResize()
    this.#bitmaps.record(0, this.size)
  }

  /** Deletes an internal snapshot; durable on return. Kinds: 'not-found', 'busy' while it is open, 'unsupported', 'corrupt'. */
  deleteSnapshot(wanted: string, progress: Progress = ignore): Promise<void> {
    return this.#snapshots.delete(this.#home, wanted, progress)
  }

  /** The persistent bitmaps. Kind 'invalid-format' when their directory cannot be right. */
  get bitmaps(): readonly BitmapInfo[] {
    return this.#bitmaps.list
  }

  /** See `Bitmaps.read`. */
  readBitmap(name: string): Promise<Bitmap> {
    return this.#bitmaps.read(name)
  }

  /** See `Bitmaps.watch`. */
  watchBitmap(name: string): Promise<() => Bitmap> {
    return this.#bitmaps.watch(name)
  }

  /**
   * To add, remove, change and save persistent bitmaps: needs access 'write', and no request in flight. What records is saved
   * when the access changes to 'read'.
   */
  get bitmapEdits(): BitmapEdits {
    this.#mustWrite()
    return this.#bitmaps
  }

  /**
   * From the next change to access 'write' on these bitmaps are not recorded in the image but by whoever writes it: they are only marked
   * in_use, and consistent again when `bitmapEdits.save` has them at the end of writing.
   */
  entrustBitmaps(names: readonly string[]): void {
    this.#bitmaps.entrusted = new Set(names)
  }

  /** Those, and what was deposited since. */
  get entrustedBitmaps(): readonly string[] {
    return [...this.#bitmaps.entrusted]
  }

  /** For `openQcow2`: reads what else than the disk the image holds. */
  async readDirectories(): Promise<void> {
    await this.#snapshots.open()
    await this.#bitmaps.open()
  }

  /** Gives up everything that the image holds, so that its backing file shows everywhere. Needs access 'write'; nothing is in flight. */
  async empty(): Promise<void> {
    const { writer, allocator } = this.#mustWrite()
    await writer.finish()
    const parts = { file: this.#file, header: this.#header, tables: this.#tables, allocator }
    await emptyImage({ ...parts, isBlockDevice: this.#parts.isBlockDevice })
    await this.#parts.dataFile?.file.punch(0, this.size)
    this.#reader.forget()
  }

  /** Checks the image; see `checkImage`. No request may be in flight. */
  async check(options: CheckOptions = {}): Promise<CheckResult> {
    if (this.#writing !== undefined) {
      const { writer, allocator } = this.#writing
      await writer.finish()
      if (!writer.isCorrupt) await allocator.finish()
    }
    return checkImage({ file: this.#file, header: this.#header, l1: this.#tables.l1 }, options)
  }

  /** Leaves the image clean, unless writes failed; a failed flush fails here again. */
  async close(): Promise<void> {
    try {
      if (this.#writing !== undefined) await this.#endWriting(this.#writing)
    } finally {
      this.#tables.forget()
      this.#writing?.allocator.refcounts.forget()
      await this.#parts.dataFile?.file.close()
      await this.#file.close()
    }
  }

  /** For the reader: see `Writer.track`. */
  track(wait: Promise<void>): Pending {
    return this.#writing === undefined ? wait : this.#writing.writer.track(wait)
  }

  get #home(): SnapshotHome {
    return { tables: this.#tables, ...this.#mustWrite() }
  }

  #mustWrite(): Writing {
    if (this.#writing === undefined)
      throw new BlockError('read-only', `${this.name} is open for reading only`, { device: this.name, path: this.path })
    if (this.#writing.writer.isCorrupt) throw markedCorrupt(this.path)
    return this.#writing
  }

  /** An image found corrupt is left as it is, marked so. */
  async #endWriting({ allocator, writer }: Writing): Promise<void> {
    await writer.finish()
    if (!writer.isCorrupt) await storeAll(this.#parts, allocator)
    allocator.refcounts.forget()
    this.#writing = undefined
    if (!writer.isCorrupt) await markClean(this.#parts, allocator)
    claim(this.#parts, 'read')
  }
}
