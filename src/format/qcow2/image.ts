// A qcow2 image as a Layer: opening, reading, what is where, and the change between read and write access. Changes are in
// writer.ts, the map in tables.ts, allocation in refcounts.ts. As long as an image has access 'write', its dirty bit is set:
// refcounts in the file may be behind, and whoever opens it after a crash rebuilds them.

import { utf8 } from '../../base/bytes.ts'
import {
  type Access,
  andThen,
  type BackingReference,
  type BlockDevice,
  type Capabilities,
  type ExtentVisitor,
  HOLE,
  type Layer,
  MAY_UNMAP,
  OWNED_DATA,
  OWNED_ZERO,
  type Ownership,
  type OwnershipVisitor,
  type Pending,
  UNALLOCATED,
  ZERO,
} from '../../block/device.ts'
import { BlockError, isBlockError } from '../../block/error.ts'
import { pool } from '../../block/pool.ts'
import type { Host, HostFile } from '../../host/host.ts'
import { Allocator } from './allocator.ts'
import { type CheckOptions, type CheckResult, checkImage } from './check.ts'
import { decompress } from './compression.ts'
import { withBacking } from './create.ts'
import { emptyImage } from './empty.ts'
import { growImage } from './grow.ts'
import { encodeHeader, type Header, isDirty, isMarkedCorrupt, readHeader, writeFeatures } from './header.ts'
import { COMPRESSED, DATA, type Mapping, UNMAPPED, ZEROS } from './mapping.ts'
import { recoverRefcounts } from './recover.ts'
import { Refcounts } from './refcounts.ts'
import { HEADER, INCOMPAT_DIRTY } from './spec.ts'
import { Tables } from './tables.ts'
import { Writer } from './writer.ts'

/**
 * Opens the image at `path` with access 'read', whether or not it could be written. Kinds: 'not-found', 'permission',
 * 'busy' when another program writes to it, 'invalid-format' and 'unsupported' as `readHeader` says.
 */
export async function openQcow2(host: Host, path: string, options: { readonly name: string }): Promise<Qcow2Image> {
  const file = await openWritableOrNot(host, path)
  try {
    const header = await readHeader(file)
    refuseDataFile(header, path)
    const status = await host.status(path)
    const tables = new Tables(file, header)
    await tables.open()
    return new Qcow2Image(file, header, tables, options.name, status?.kind === 'block')
  } catch (error) {
    await file.close()
    throw error
  }
}

function refuseDataFile(header: Header, path: string): void {
  if (header.dataFile === undefined) return
  const message = `${path} uses an external data file; convert it with qemu-img convert -O qcow2`
  throw new BlockError('unsupported', message, { path })
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

async function openWritableOrNot(host: Host, path: string): Promise<HostFile> {
  try {
    return await host.open(path, { write: true, lock: 'read' })
  } catch (error) {
    if (!isBlockError(error, 'permission') && !isBlockError(error, 'read-only')) throw error
    return host.open(path, { lock: 'read' })
  }
}

const OWNERSHIP: Readonly<Record<Mapping, Ownership>> = {
  [UNMAPPED]: UNALLOCATED,
  [DATA]: OWNED_DATA,
  [ZEROS]: OWNED_ZERO,
  [COMPRESSED]: OWNED_DATA,
}

/**
 * Sees one piece of a range, in order; returns false to stop. `host` is the offset of its data, or of the place kept for it, in
 * the file that holds the data; NO_PLACE when it has none.
 */
export type MappingVisitor = (length: number, kind: Mapping, host: number) => boolean

/** What access 'write' adds to an image. */
interface Writing {
  readonly allocator: Allocator
  readonly writer: Writer
}

export class Qcow2Image implements Layer {
  readonly name: string
  readonly format = 'qcow2'
  backing: BlockDevice | undefined
  readonly #file: HostFile
  readonly #tables: Tables
  readonly #isBlockDevice: boolean
  readonly #capabilities: Readonly<Record<Access, Capabilities>>
  #header: Header
  #writing: Writing | undefined
  /** The compressed cluster that was read last: readers take it in pieces. */
  #inflated: { readonly host: number; readonly bytes: Uint8Array } | undefined

  /** Use `openQcow2`. */
  constructor(file: HostFile, header: Header, tables: Tables, name: string, isBlockDevice: boolean) {
    this.name = name
    this.#file = file
    this.#header = header
    this.#tables = tables
    this.#isBlockDevice = isBlockDevice
    const can: Capabilities = {
      write: false,
      fua: 'emulated',
      zero: 'native',
      trim: 'native',
      extents: 'native',
      minimumBlock: 1,
      bestBlock: header.clusterSize,
    }
    this.#capabilities = { read: can, write: { ...can, write: true } }
  }

  get path(): string {
    return this.#file.path
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
    const end = offset + length
    while (offset < end) {
      const tables = this.#tables
      const isFound = tables.find(offset, end - offset)
      const piece = isFound ? tables.length : 0
      const wait = isFound ? this.#readPiece(offset, piece, into, at) : tables.load(offset)
      offset += piece
      at += piece
      if (wait !== undefined) return wait.then(() => this.read(offset, end - offset, into, at))
    }
    return undefined
  }

  write(offset: number, length: number, from: Uint8Array, at: number, _flags: number): Pending {
    return this.#mustWrite().writer.write(offset, length, from, at)
  }

  zero(offset: number, length: number, flags: number): Pending {
    return this.#mustWrite().writer.zero(offset, length, (flags & MAY_UNMAP) !== 0)
  }

  trim(offset: number, length: number, _flags: number): Pending {
    return this.#mustWrite().writer.trim(offset, length)
  }

  flush(): Pending {
    return this.#writing?.writer.flush()
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    const end = offset + length
    let isStopped = false
    const visitOnce: ExtentVisitor = (piece, extent) => {
      if (!visit(piece, extent)) isStopped = true
      return !isStopped
    }
    const next = (): Pending => {
      while (offset < end && !isStopped) {
        const isFound = this.#tables.find(offset, end - offset)
        const start = offset
        if (isFound) offset += this.#tables.length
        const wait = isFound ? this.#extentsOf(start, this.#tables.length, visitOnce) : this.#tables.load(offset)
        if (wait !== undefined) return wait.then(next)
      }
      return undefined
    }
    return next()
  }

  allocation(offset: number, length: number, visit: OwnershipVisitor): Pending {
    const end = offset + length
    while (offset < end) {
      if (this.#tables.find(offset, end - offset)) {
        const piece = this.#tables.length
        if (!visit(piece, OWNERSHIP[this.#tables.kind])) return undefined
        offset += piece
      } else {
        const wait = this.#tables.load(offset)
        if (wait !== undefined) return wait.then(() => this.allocation(offset, end - offset, visit))
      }
    }
    return undefined
  }

  /** Visits the whole range in pieces, in order: how each is mapped, and where in the file that is. */
  mappings(offset: number, length: number, visit: MappingVisitor): Pending {
    const end = offset + length
    while (offset < end) {
      if (this.#tables.find(offset, end - offset)) {
        const { kind, host, length: piece } = this.#tables
        if (!visit(piece, kind, host)) return undefined
        offset += piece
      } else {
        const wait = this.#tables.load(offset)
        if (wait !== undefined) return wait.then(() => this.mappings(offset, end - offset, visit))
      }
    }
    return undefined
  }

  /**
   * See Layer. To 'write' also repairs an image that was not closed cleanly. Kinds: 'busy', 'permission', 'corrupt', and
   * 'unsupported' for version 2, which has no dirty bit.
   */
  async setAccess(access: Access): Promise<void> {
    if (access === this.access) return
    if (access === 'write') await this.#beginWriting()
    else await this.#endWriting()
  }

  async grow(size: number): Promise<void> {
    const { writer, allocator } = this.#mustWrite()
    const surroundings = { header: this.#header, backing: this.backing }
    await growImage(size, { file: this.#file, tables: this.#tables, allocator, writer, ...surroundings })
  }

  /** Names another backing file in the header; durable on return. Needs access 'write'. */
  async setBackingReference(name: string, format: string): Promise<void> {
    this.#mustWrite()
    const changed = withBacking(this.#header, name, format, this.path)
    // First the name, beside the old one, then the fields that lead to it: a crash leaves one or the other.
    const nameBytes = utf8.encode(name)
    await this.#file.write(changed.backingNameOffset, nameBytes.length, nameBytes, 0)
    await this.#file.sync()
    const bytes = encodeHeader(changed)
    await this.#file.write(0, bytes.length, bytes, 0)
    await this.#file.sync()
    this.#header.backing = changed.backing
    this.#header.backingNameOffset = changed.backingNameOffset
  }

  /** Makes the header name no backing file; durable on return. What showed through then reads as zeros. Needs access 'write'. */
  async removeBackingReference(): Promise<void> {
    this.#mustWrite()
    // The two fields are neighbours in one sector. The format may stay behind: without a file it means nothing.
    const fields = new Uint8Array(HEADER.cluster_bits - HEADER.backing_file_offset)
    await this.#file.write(HEADER.backing_file_offset, fields.length, fields, 0)
    await this.#file.sync()
    this.#header.backing = undefined
    this.#header.backingNameOffset = 0
  }

  /** Gives up everything that the image holds, so that its backing file shows everywhere. Needs access 'write'; nothing is in flight. */
  async empty(): Promise<void> {
    const { writer, allocator } = this.#mustWrite()
    await writer.flushAll()
    const isBlockDevice = this.#isBlockDevice
    await emptyImage({ file: this.#file, header: this.#header, tables: this.#tables, allocator, isBlockDevice })
    this.#inflated = undefined
  }

  /** Checks the image; see `checkImage`. No request may be in flight. */
  async check(options: CheckOptions = {}): Promise<CheckResult> {
    await this.#writing?.allocator.refcounts.writeBack()
    return checkImage({ file: this.#file, header: this.#header, l1: this.#tables.l1 }, options)
  }

  /** Leaves the image clean, unless writes failed; a failed flush fails here again. */
  async close(): Promise<void> {
    try {
      if (this.#writing !== undefined) await this.#endWriting()
    } finally {
      this.#tables.forget()
      await this.#file.close()
    }
  }

  #readPiece(offset: number, length: number, into: Uint8Array, at: number): Pending {
    const { kind, host } = this.#tables
    if (kind === DATA) {
      const wait = this.#file.read(host, length, into, at)
      return wait === undefined ? undefined : (this.#writing?.writer.track(wait) ?? wait)
    }
    if (kind === UNMAPPED) return this.#readBacking(offset, length, into, at)
    if (kind === COMPRESSED) return this.#readCompressed(offset, length, into, at)
    into.fill(0, at, at + length)
    return undefined
  }

  #readBacking(offset: number, length: number, into: Uint8Array, at: number): Pending {
    const { backing } = this
    const shown = backing === undefined ? 0 : Math.min(length, Math.max(0, backing.size - offset))
    into.fill(0, at + shown, at + length)
    return shown === 0 ? undefined : backing?.read(offset, shown, into, at)
  }

  #readCompressed(offset: number, length: number, into: Uint8Array, at: number): Pending {
    const { host, compressedLength } = this.#tables
    const within = offset % this.#header.clusterSize
    const copy = (cluster: Uint8Array): void => into.set(cluster.subarray(within, within + length), at)
    if (this.#inflated?.host === host) {
      copy(this.#inflated.bytes)
      return undefined
    }
    const input = pool.take(compressedLength)
    const reading = this.#file.read(host, compressedLength, input, 0)
    const wait = reading === undefined ? undefined : (this.#writing?.writer.track(reading) ?? reading)
    return andThen(wait, () => {
      try {
        const place = { path: this.path, offset: host }
        const packed = input.subarray(0, compressedLength)
        const bytes = decompress(this.#header.compression, packed, this.#header.clusterSize, place)
        this.#inflated = { host, bytes }
        copy(bytes)
      } finally {
        pool.give(input)
      }
      return undefined
    })
  }

  #extentsOf(offset: number, length: number, visit: ExtentVisitor): Pending {
    const { kind, host } = this.#tables
    if (kind === DATA || kind === COMPRESSED) return void visit(length, 0)
    if (kind === ZEROS) return void visit(length, host < 0 ? HOLE | ZERO : ZERO)
    const { backing } = this
    const shown = backing === undefined ? 0 : Math.min(length, Math.max(0, backing.size - offset))
    const below = shown === 0 ? undefined : backing?.extents(offset, shown, visit)
    return andThen(below, () => {
      if (shown < length) visit(length - shown, HOLE | ZERO)
      return undefined
    })
  }

  #mustWrite(): Writing {
    if (this.#writing === undefined)
      throw new BlockError('read-only', `${this.name} is open for reading only`, { device: this.name, path: this.path })
    return this.#writing
  }

  async #beginWriting(): Promise<void> {
    this.#refuseToWrite()
    this.#file.lock('write')
    try {
      const deviceSize = this.#isBlockDevice ? this.#file.size() : undefined
      const allocator = new Allocator(this.#file, this.#header, new Refcounts(this.#file, this.#header), deviceSize)
      if (isDirty(this.#header)) await recoverRefcounts(this.#file, this.#header, this.#tables, allocator)
      await allocator.refcounts.open()
      await allocator.open()
      this.#header.incompatible |= INCOMPAT_DIRTY
      // Bitmaps and whatever else only holds as long as every writer knows it end with this writer.
      this.#header.autoclear = new Uint8Array(8)
      await writeFeatures(this.#file, this.#header)
      this.#tables.mayPassEnd = false
      this.#writing = { allocator, writer: new Writer(this.#file, this.#file, this, this.#tables, allocator) }
    } catch (error) {
      this.#file.lock('read')
      throw error
    }
  }

  async #endWriting(): Promise<void> {
    const { allocator, writer } = this.#mustWrite()
    await writer.flushAll()
    await allocator.refcounts.writeBack()
    const end = allocator.end * this.#header.clusterSize
    if (!this.#isBlockDevice && this.#file.size() < end) await this.#file.truncate(end)
    await this.#file.sync()
    if (!allocator.isDamaged) {
      this.#header.incompatible &= ~INCOMPAT_DIRTY
      await writeFeatures(this.#file, this.#header)
    }
    this.#writing = undefined
    this.#file.lock('read')
  }

  #refuseToWrite(): void {
    const { path } = this
    if (this.#header.version === 2) {
      const command = `qemu-img amend -f qcow2 -o compat=1.1 ${path}`
      const message = `${path} has qcow2 version 2, which Varve only reads; upgrade it with: ${command}`
      throw new BlockError('unsupported', message, { path })
    }
    if (isMarkedCorrupt(this.#header)) {
      const message = `${path} is marked corrupt and can only be read; repair it with: qemu-img check -r all ${path}`
      throw new BlockError('corrupt', message, { path })
    }
    if (this.#file.writable) return
    const message = `${path} may not be written by this user; change its owner, mode or mount`
    throw new BlockError('permission', message, { path })
  }
}
