// Where two disks of backups in one repository may differ, by their maps alone: no data is read. What is said to be equal is; what is said to
// differ may be equal, where the same bytes lie in different chunks.

import type { BlobIndex } from './blob-index.ts'
import type { DiskMap, MapPiece } from './disk-map.ts'
import { segmentsBetween } from './segments.ts'
import { GRANULE_BYTES } from './spec.ts'

/** Visits the ranges, in bytes, in order; neighbours may come apart. Past its end a disk has zeros. Kind 'corrupt' when a map is damaged. */
export async function visitDifferences(
  one: DiskMap,
  two: DiskMap,
  index: BlobIndex,
  visit: (offset: number, length: number) => void,
): Promise<void> {
  const size = Math.max(one.size, two.size)
  for (let position = 0; position < size; ) {
    const [first, second] = [await pieceAt(one, position, size), await pieceAt(two, position, size)]
    const end = Math.min(first.end, second.end)
    if (first.leaf !== undefined || second.leaf !== undefined) compare(first, second, index, position, end, visit)
    position = end
  }
}

async function pieceAt(map: DiskMap, position: number, size: number): Promise<MapPiece> {
  return position < map.size ? map.at(position) : { start: position, end: size, leaf: undefined }
}

function compare(
  first: MapPiece,
  second: MapPiece,
  index: BlobIndex,
  from: number,
  to: number,
  visit: (offset: number, length: number) => void,
): void {
  const [a, b] = [granulesOf(first, index, from, to), granulesOf(second, index, from, to)]
  for (let i = 0; i < a.length; i++) {
    const offset = from + i * GRANULE_BYTES
    if (a[i] !== b[i]) visit(offset, Math.min(GRANULE_BYTES, to - offset))
  }
}

/** What each granule of a range shows, as a name. */
function granulesOf(piece: MapPiece, index: BlobIndex, from: number, to: number): string[] {
  const found: string[] = []
  for (const { length, entry, inChunk } of segmentsBetween(piece, index, from, to)) {
    for (let at = 0; at < length; at += GRANULE_BYTES) found.push(entry < 0 ? `${entry}` : `${entry}:${inChunk + at}`)
  }
  return found
}
