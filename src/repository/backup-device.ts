// One disk of a backup as a read-only block device. What was read lately, or read ahead, is answered in the call; the rest comes from
// the packs, checked. All holes are known from the map.
//
//   offset --map--> segment (granules of a chunk | zeros) --index--> pack --> chunk

import { copyBytes } from '../base/bytes.ts'
import { READ_AHEAD_BYTES, READ_AHEAD_FETCH, READ_AHEAD_MAX } from '../base/limits.ts'
import { roundUp } from '../base/round.ts'
import { type ExtentVisitor, HOLE, type Pending, ZERO } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { ExtentJoiner } from '../block/extents.ts'
import { ReadOnlyDevice } from '../block/read-only-device.ts'
import type { BlobIndex } from './blob-index.ts'
import type { ChunkReader } from './chunk-reader.ts'
import type { DiskMap, MapPiece } from './disk-map.ts'
import type { WholeChunk } from './local-first.ts'
import { MISSING, type Segment, segmentsBetween, ZEROS } from './segments.ts'

export class BackupDevice extends ReadOnlyDevice {
  readonly name: string
  readonly size: number
  readonly #map: DiskMap
  readonly #index: BlobIndex
  readonly #chunks: ChunkReader
  #sequentialEnd = 0
  /** Bytes of the reads so far that followed one another. */
  #run = 0
  #aheadEnd = 0
  /** How far is read ahead, in bytes: further where what belongs together is in many packs. */
  #ahead = READ_AHEAD_BYTES

  /** `name` is that of backup and disk, for messages. */
  constructor(name: string, map: DiskMap, index: BlobIndex, chunks: ChunkReader) {
    super()
    this.name = name
    this.size = map.size
    this.#map = map
    this.#index = index
    this.#chunks = chunks
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    const isSequential = offset === this.#sequentialEnd
    this.#run = isSequential ? this.#run + length : length
    this.#sequentialEnd = offset + length
    const done = this.#readCached(offset, length, into, at)
    const rest = done === length ? undefined : this.#readRest(offset + done, length - done, into, at + done)
    if (isSequential) this.#readAhead(offset + length)
    return rest
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.#extents(offset, length, visit)
  }

  async close(): Promise<void> {}

  /** The chunks that a range shows from beginning to end, in order. Kind 'corrupt' where the map is damaged. */
  async wholeChunks(offset: number, length: number): Promise<WholeChunk[]> {
    const index = this.#index
    return (await this.#segmentsOf(offset, offset + length)).flatMap((segment) => {
      const { entry, inChunk } = segment
      if (entry < 0 || inChunk !== 0 || segment.length < index.plain(entry)) return []
      return [{ offset: segment.offset, length: index.plain(entry), id: index.id(entry) }]
    })
  }

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
    await this.#chunks.load(entriesOf(segments), (chunkOf) => {
      for (const segment of segments) {
        const { entry, offset, length } = segment
        if (entry === MISSING) throw this.#failure(MISSING_CHUNK, offset, length)
        const chunk = entry === ZEROS ? EMPTY : chunkOf(entry)
        if (chunk instanceof BlockError) throw this.#failure(chunk, offset, length)
        copySegment(segment, chunk, into, at + offset - from)
      }
      return undefined
    })
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

  /**
   * Fetches what a sequential reader will want next, half of it at a time, and at first no more than it has read so far: who reads here and there
   * may never come to it. A failure is left to the read that meets it again.
   */
  #readAhead(from: number): void {
    const ahead = Math.min(this.#ahead, this.#run)
    const end = Math.min(this.size, from + ahead)
    if (from >= this.#aheadEnd || from + this.#ahead * 2 < this.#aheadEnd) this.#aheadEnd = from
    while (this.#aheadEnd < end) {
      const start = this.#aheadEnd
      const next = Math.min(end, start + ahead / 2)
      // A little at a time would be many small reads.
      if (next - start < ahead / 2 && next < this.size) return
      this.#aheadEnd = next
      this.#fetch(start, next).catch(() => undefined)
    }
  }

  async #fetch(start: number, end: number): Promise<void> {
    const segments = await this.#segmentsOf(start, end)
    const before = this.#chunks.fetches
    const loading = this.#chunks.load(entriesOf(segments), () => undefined)
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
