// The segments of a leaf as a reader wants them: a range of the disk as pieces, each zeros or bytes of one chunk.

import type { BlobIndex } from './blob-index.ts'
import type { MapPiece } from './disk-map.ts'
import { GRANULE_BYTES, LEAF_HEADER_BYTES, SEGMENT_BYTES } from './spec.ts'

/** In place of an entry of the index: reads as zeros, or the chunk is in no pack. */
export const ZEROS = -1
export const MISSING = -2

/** Bytes of a chunk from `inChunk` on, at an offset of the disk. */
export interface Segment {
  readonly offset: number
  readonly length: number
  /** The chunk's entry in the index, or ZEROS, or MISSING. */
  readonly entry: number
  readonly inChunk: number
}

/** The segments of a piece of the map between two offsets, in order and without gaps. */
export function segmentsBetween(piece: MapPiece, index: BlobIndex, from: number, to: number): Segment[] {
  const segments: Segment[] = []
  let position = from
  const zerosUpTo = (offset: number): void => {
    if (offset <= position) return
    segments.push({ offset: position, length: offset - position, entry: ZEROS, inChunk: 0 })
    position = offset
  }
  const bytes = piece.leaf?.length ?? 0
  for (let at = LEAF_HEADER_BYTES; at < bytes; at += SEGMENT_BYTES) {
    const leaf = piece.leaf as Uint8Array
    const start = piece.start + (leaf[at] as number) * GRANULE_BYTES
    const end = Math.min(to, start + (leaf[at + 1] as number) * GRANULE_BYTES)
    if (start >= to) break
    if (end <= position) continue
    zerosUpTo(start)
    const entry = index.find(leaf, at + 3)
    const inChunk = (leaf[at + 2] as number) * GRANULE_BYTES + position - start
    segments.push({ offset: position, length: end - position, entry: entry < 0 ? MISSING : entry, inChunk })
    position = end
  }
  zerosUpTo(to)
  return segments
}
