// How deep in a chain the data of a range lies: what NBD's qemu:allocation-depth tells its clients. Asks the layers from the
// active one down; holds a bounded number of pieces per layer.
//
//   layers   2  . . B .        depth   1 the active layer, 2 the one below it, ..., 0 nobody holds it
//            1  . A . .
//            0  a . c .                3 2 1 0

import { ALLOCATION_PIECES } from '../base/limits.ts'
import { type Layer, UNALLOCATED } from '../block/device.ts'

/** Sees one piece of a range with its depth, in order; returns false to stop. */
export type DepthVisitor = (length: number, depth: number) => boolean

/** Visits the range of bytes in pieces; `layers` from base to active. */
export async function allocationDepth(
  layers: readonly Layer[],
  offset: number,
  length: number,
  visit: DepthVisitor,
): Promise<void> {
  await visitLayer(layers, 1, offset, length, visit)
}

/** The range as the layer at `depth` and those below it hold it; false when the visitor stopped. */
async function visitLayer(
  layers: readonly Layer[],
  depth: number,
  offset: number,
  length: number,
  visit: DepthVisitor,
): Promise<boolean> {
  const layer = layers.at(-depth)
  if (layer === undefined || depth > layers.length) return visit(length, 0)
  const end = offset + length
  // A layer that ends before the range holds nothing there, and hides what is below: it reads as zeros.
  const shownEnd = Math.min(end, layer.size)
  let at = offset
  while (at < shownEnd) {
    const pieces: (readonly [length: number, isHeld: boolean])[] = []
    await layer.allocation(at, shownEnd - at, (piece, ownership) => {
      pieces.push([piece, ownership !== UNALLOCATED])
      return pieces.length < ALLOCATION_PIECES
    })
    for (const [piece, isHeld] of pieces) {
      const goesOn = isHeld ? visit(piece, depth) : await visitLayer(layers, depth + 1, at, piece, visit)
      if (!goesOn) return false
      at += piece
    }
  }
  return at >= end || visit(end - at, 0)
}
