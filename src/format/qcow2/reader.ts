// What a qcow2 image shows: its own data, zeros, and through what it does not map the backing device; and what is where. Changes
// are in writer.ts. Data that are at hand are given within the call.

import {
  andThen,
  type BlockDevice,
  type ExtentVisitor,
  HOLE,
  OWNED_DATA,
  OWNED_ZERO,
  type Ownership,
  type OwnershipVisitor,
  type Pending,
  UNALLOCATED,
  ZERO,
} from '../../block/device.ts'
import { pool } from '../../block/pool.ts'
import type { HostFile } from '../../host/host.ts'
import { decompress } from './compression.ts'
import type { Header } from './header.ts'
import { COMPRESSED, DATA, type Mapping, UNMAPPED, ZEROS } from './mapping.ts'
import type { Tables } from './tables.ts'

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

/** What the reader needs of the image around it. */
export interface ReaderSurroundings {
  readonly backing: BlockDevice | undefined
  readonly header: Readonly<Header>
  /** Counts a request to the file that has not completed. */
  track(wait: Promise<void>): Pending
}

export class Reader {
  readonly #file: HostFile
  readonly #data: HostFile
  readonly #image: ReaderSurroundings
  readonly #tables: Tables
  /** The compressed cluster that was read last: readers take it in pieces. */
  #inflated: { readonly host: number; readonly bytes: Uint8Array } | undefined

  /** `data` is the file that holds the guest's data: `file` itself, or an external data file. */
  constructor(file: HostFile, data: HostFile, image: ReaderSurroundings, tables: Tables) {
    this.#file = file
    this.#data = data
    this.#image = image
    this.#tables = tables
  }

  /** Forgets what was read: the file's clusters have changed hands. */
  forget(): void {
    this.#inflated = undefined
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

  #readPiece(offset: number, length: number, into: Uint8Array, at: number): Pending {
    const { kind, host } = this.#tables
    if (kind === DATA) {
      const wait = this.#data.read(host, length, into, at)
      return wait === undefined ? undefined : this.#image.track(wait)
    }
    if (kind === UNMAPPED) return this.#readBacking(offset, length, into, at)
    if (kind === COMPRESSED) return this.#readCompressed(offset, length, into, at)
    into.fill(0, at, at + length)
    return undefined
  }

  #readBacking(offset: number, length: number, into: Uint8Array, at: number): Pending {
    const { backing } = this.#image
    const shown = backing === undefined ? 0 : Math.min(length, Math.max(0, backing.size - offset))
    into.fill(0, at + shown, at + length)
    return shown === 0 ? undefined : backing?.read(offset, shown, into, at)
  }

  #readCompressed(offset: number, length: number, into: Uint8Array, at: number): Pending {
    const { host, compressedLength } = this.#tables
    const { header } = this.#image
    const within = offset % header.clusterSize
    const copy = (cluster: Uint8Array): void => into.set(cluster.subarray(within, within + length), at)
    if (this.#inflated?.host === host) {
      copy(this.#inflated.bytes)
      return undefined
    }
    const input = pool.take(compressedLength)
    const reading = this.#file.read(host, compressedLength, input, 0)
    const wait = reading === undefined ? undefined : this.#image.track(reading)
    return andThen(wait, () => {
      try {
        const place = { path: this.#file.path, offset: host }
        const packed = input.subarray(0, compressedLength)
        const bytes = decompress(header.compression, packed, header.clusterSize, place)
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
    if (kind === DATA && this.#data !== this.#file) return this.#extentsOfDataFile(offset, length, visit)
    if (kind === DATA || kind === COMPRESSED) return void visit(length, 0)
    if (kind === ZEROS) return void visit(length, host < 0 ? HOLE | ZERO : ZERO)
    const { backing } = this.#image
    const shown = backing === undefined ? 0 : Math.min(length, Math.max(0, backing.size - offset))
    const below = shown === 0 ? undefined : backing?.extents(offset, shown, visit)
    return andThen(below, () => {
      if (shown < length) visit(length - shown, HOLE | ZERO)
      return undefined
    })
  }

  /** A data file may be mapped whole and be full of holes, so it is asked itself. */
  #extentsOfDataFile(offset: number, length: number, visit: ExtentVisitor): Pending {
    const present = Math.min(length, Math.max(0, this.#data.size() - offset))
    const wait = present === 0 ? undefined : this.#data.extents(offset, present, visit)
    return andThen(wait, () => {
      if (present < length) visit(length - present, HOLE | ZERO)
      return undefined
    })
  }
}
