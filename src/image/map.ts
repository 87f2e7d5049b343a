// Where the data of a disk is: which file of the chain holds each range, and at which offset; in the fields of
// `qemu-img map --output=json`. The data is not read.
//
//   depth 0   . . D D . .      D data, Z zeros, . not here
//   depth 1   D Z D . .        shorter than the image above it
//             1 1 0 0 1 0      depth of each range: where nothing is found, the layer that has nothing below

import { HOLE, type Layer } from '../block/device.ts'
import type { Chain } from '../chain/chain.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { COMPRESSED, DATA, type Mapping, NO_PLACE, UNMAPPED, ZEROS } from '../format/qcow2/mapping.ts'

/** Offsets and lengths in bytes. */
export interface MapEntry {
  readonly start: number
  readonly length: number
  /** 0 is the active image, 1 its backing file, and so on. */
  readonly depth: number
  /** False where no image of the chain holds the range. */
  readonly present: boolean
  /** It reads as zeros, and the image says so. */
  readonly zero: boolean
  readonly data: boolean
  readonly compressed: boolean
  /** Of the data, or of the place that is kept for it, in the file that holds it; absent where there is none. */
  readonly offset?: number
}

/** One piece of one layer, before it is known where in the disk it is shown. */
type Piece = Omit<MapEntry, 'start' | 'depth'>

/** What is at `from` and the `length` bytes after it, in order, neighbours that continue each other as one. */
export async function* mapImage(
  chain: Chain,
  from = 0,
  length = chain.size,
): AsyncGenerator<MapEntry, void, undefined> {
  const layers = chain.layers.toReversed()
  const end = Math.min(chain.size, from + length)
  let last: MapEntry | undefined
  for (let start = from; start < end; ) {
    const entry = await findEntry(layers, start, end - start)
    start += entry.length
    if (last !== undefined && continues(last, entry)) last = { ...last, length: last.length + entry.length }
    else {
      if (last !== undefined) yield last
      last = entry
    }
  }
  if (last !== undefined) yield last
}

/**
 * The first piece at `start`, in the highest of `layers` that says something of it, and no longer than `length`. The layers are
 * given from the active one down; the range lies in the first.
 */
export async function findEntry(layers: readonly Layer[], start: number, length: number): Promise<MapEntry> {
  for (let depth = 0; ; depth++) {
    const layer = layers[depth] as Layer
    const piece = await pieceAt(layer, start, Math.min(length, layer.size - start))
    const below = layers[depth + 1]
    if (piece.present) return { start, depth, ...piece }
    if (below === undefined || start >= below.size) return { start, depth, ...piece, zero: true }
    length = piece.length
  }
}

async function pieceAt(layer: Layer, start: number, length: number): Promise<Piece> {
  let found: Piece | undefined
  if (layer instanceof Qcow2Image) {
    await layer.mappings(start, length, (piece, kind, host) => {
      // Compressed data has an offset, but none at which the guest's bytes could be read.
      const place = kind !== COMPRESSED && host !== NO_PLACE ? { offset: host } : {}
      found = { length: piece, ...PIECE_OF[kind], ...place }
      return false
    })
  } else {
    await layer.extents(start, length, (piece, extent) => {
      const zero = (extent & HOLE) !== 0
      found = { length: piece, present: true, zero, data: !zero, compressed: false, offset: start }
      return false
    })
  }
  return found as Piece
}

const PIECE_OF: Readonly<Record<Mapping, Omit<Piece, 'length' | 'offset'>>> = {
  [UNMAPPED]: { present: false, zero: false, data: false, compressed: false },
  [DATA]: { present: true, zero: false, data: true, compressed: false },
  [ZEROS]: { present: true, zero: true, data: false, compressed: false },
  [COMPRESSED]: { present: true, zero: false, data: true, compressed: true },
}

function continues(a: MapEntry, b: MapEntry): boolean {
  const isAlike =
    a.depth === b.depth &&
    a.present === b.present &&
    a.zero === b.zero &&
    a.data === b.data &&
    a.compressed === b.compressed
  return isAlike && (a.offset === undefined ? b.offset === undefined : b.offset === a.offset + a.length)
}
