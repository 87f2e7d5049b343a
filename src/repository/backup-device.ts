// One disk of a backup as a read-only block device. What was read lately, or read ahead, is answered in the call; the rest comes from
// the packs, checked. All holes are known from the map.
//
//   offset --map--> segment (granules of a chunk | zeros) --index--> pack --> chunk

import { assert } from '../base/assert.ts'
import { copyBytes } from '../base/bytes.ts'
import { READ_AHEAD_BYTES, READ_AHEAD_FETCH, READ_AHEAD_MAX } from '../base/limits.ts'
import { roundUp } from '../base/round.ts'
import { type BlockDevice, type Capabilities, type ExtentVisitor, HOLE, type Pending, ZERO } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { ExtentJoiner } from '../block/extents.ts'
import type { BlobIndex } from './blob-index.ts'
import type { ChunkReader } from './chunk-reader.ts'
import type { DiskMap, MapPiece } from './disk-map.ts'
import { MISSING, type Segment, segmentsBetween, ZEROS } from './segments.ts'
import { CHUNK_BYTES } from './spec.ts'

export class BackupDevice implements BlockDevice {
  readonly name: string
  readonly size: number
  readonly can: Capabilities = {
    write: false,
    fua: 'none',
    zero: 'none',
    trim: 'none',
    extents: 'native',
    minimumBlock: 1,
    bestBlock: CHUNK_BYTES,
  }
  readonly #map: DiskMap
  readonly #index: BlobIndex
  readonly #chunks: ChunkReader
  #sequentialEnd = 0
  #aheadEnd = 0
  #isReadingAhead = false
  /** How far is read ahead, in bytes: further where what belongs together is in many packs. */
  #ahead = READ_AHEAD_BYTES

  /** `name` is that of backup and disk, for messages. */
  constructor(name: string, map: DiskMap, index: BlobIndex, chunks: ChunkReader) {
    this.name = name
    this.size = map.size
    this.#map = map
    this.#index = index
    this.#chunks = chunks
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    const isSequential = offset === this.#sequentialEnd
    this.#sequentialEnd = offset + length
    const done = this.#readCached(offset, length, into, at)
    const rest = done === length ? undefined : this.#readRest(offset + done, length - done, into, at + done)
    if (isSequential) this.#readAhead(offset + length)
    return rest
  }

  write(): Pending {
    assert(false, 'a backup is read-only')
  }

  zero(): Pending {
    assert(false, 'a backup is read-only')
  }

  trim(): Pending {
    assert(false, 'a backup is read-only')
  }

  flush(): Pending {
    return undefined
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.#extents(offset, length, visit)
  }

  async close(): Promise<void> {}

  async #extents(offset: number, length: number, visit: ExtentVisitor): Promise<void> {
    const joiner = new ExtentJoiner(visit)
    const end = offset + length
    for (let position = offset; position < end; ) {
      const piece = await this.#pieceAt(position, end)
      const to = Math.min(end, piece.end)
      for (const segment of segmentsBetween(piece, this.#index, position, to)) {
        if (!joiner.add(segment.length, segment.entry === ZEROS ? HOLE | ZERO : 0)) return
      }
      position = to
    }
    joiner.end()
  }

  /** Reads from the beginning what is in memory; returns how many bytes. */
  #readCached(offset: number, length: number, into: Uint8Array, at: number): number {
    let done = 0
    while (done < length) {
      const piece = this.#map.at(offset + done)
      if (piece instanceof Promise) {
        // The slow way asks again, and hears of the failure then.
        piece.catch(() => undefined)
        return done
      }
      const to = Math.min(offset + length, piece.end)
      for (const segment of segmentsBetween(piece, this.#index, offset + done, to)) {
        const chunk = segment.entry === ZEROS ? EMPTY : this.#chunks.cached(segment.entry)
        if (chunk === undefined) return done
        copySegment(segment, chunk, into, at + done)
        done += segment.length
      }
    }
    return done
  }

  /** In windows, so that memory is bounded however long the read; the next window comes while one is copied. */
  async #readRest(offset: number, length: number, into: Uint8Array, at: number): Promise<void> {
    const end = offset + length
    let next: Promise<void> | undefined
    for (let position = offset; position < end; ) {
      const to = Math.min(end, roundUp(position + 1, READ_AHEAD_BYTES))
      const before = next
      next = this.#readWindow(position, to, into, at + position - offset)
      next.catch(() => undefined)
      await before
      position = to
    }
    await next
  }

  async #readWindow(from: number, to: number, into: Uint8Array, at: number): Promise<void> {
    const segments = await this.#segmentsOf(from, to)
    const chunks = await this.#chunks.load(entriesOf(segments))
    for (const segment of segments) {
      const chunk = segment.entry === ZEROS ? EMPTY : chunks.get(segment.entry)
      if (segment.entry === MISSING) throw this.#failure(MISSING_CHUNK, segment.offset, segment.length)
      assert(chunk !== undefined, 'every chunk that was asked for has come')
      if (chunk instanceof BlockError) throw this.#failure(chunk, segment.offset, segment.length)
      copySegment(segment, chunk, into, at + segment.offset - from)
    }
  }

  async #segmentsOf(from: number, to: number): Promise<Segment[]> {
    const segments: Segment[] = []
    for (let position = from; position < to; ) {
      const piece = await this.#pieceAt(position, to)
      const end = Math.min(to, piece.end)
      segments.push(...segmentsBetween(piece, this.#index, position, end))
      position = end
    }
    return segments
  }

  async #pieceAt(from: number, to: number): Promise<MapPiece> {
    try {
      return await this.#map.at(from)
    } catch (error) {
      throw error instanceof BlockError ? this.#failure(error, from, to - from) : error
    }
  }

  #failure(error: BlockError, offset: number, length: number): BlockError {
    const message = `${this.name}: ${length} bytes at ${offset} cannot be read: ${error.message}`
    return new BlockError(error.kind, message, { ...error.place, device: this.name, offset, length }, error)
  }

  /** Fetches what a sequential reader will want next. A failure is left to the read that meets it again. */
  #readAhead(from: number): void {
    const end = Math.min(this.size, from + this.#ahead)
    if (from >= this.#aheadEnd || from + this.#ahead * 2 < this.#aheadEnd) this.#aheadEnd = from
    if (this.#isReadingAhead || end - this.#aheadEnd < Math.min(this.#ahead / 2, this.size - from)) return
    const start = this.#aheadEnd
    if (start >= end) return
    this.#aheadEnd = end
    this.#isReadingAhead = true
    this.#fetch(start, end)
      .catch(() => undefined)
      .finally(() => (this.#isReadingAhead = false))
  }

  async #fetch(start: number, end: number): Promise<void> {
    const segments = await this.#segmentsOf(start, end)
    const before = this.#chunks.fetches
    const loading = this.#chunks.load(entriesOf(segments))
    // After many small changes each pack has a little of every part of the disk, in the disk's order: the further one looks, the more is
    // read of each at a time.
    const each = (end - start) / Math.max(1, this.#chunks.fetches - before)
    if (each < READ_AHEAD_FETCH) this.#ahead = Math.min(READ_AHEAD_MAX, this.#ahead * 2)
    else if (each > READ_AHEAD_FETCH * 8) this.#ahead = Math.max(READ_AHEAD_BYTES, this.#ahead / 2)
    this.#chunks.keep(this.#ahead * 3)
    await loading
  }
}

const EMPTY = new Uint8Array(0)
const MISSING_CHUNK = new BlockError('corrupt', 'its chunk is in no pack: packs are missing')

function entriesOf(segments: readonly Segment[]): number[] {
  return segments.filter((segment) => segment.entry >= 0).map((segment) => segment.entry)
}

/** What the segment has past the end of its chunk reads as zeros. */
function copySegment({ length, inChunk }: Segment, chunk: Uint8Array, into: Uint8Array, at: number): void {
  const present = Math.max(0, Math.min(length, chunk.length - inChunk))
  if (present > 0) copyBytes(chunk, inChunk, into, at, present)
  into.fill(0, at + present, at + length)
}
