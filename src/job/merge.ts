// What the two directions of live merge, commit and stream, share: who owns what in a chain. Which of it is to do, and what is
// copied where, is theirs.

import type { Bitmap } from '../bitmap/bitmap.ts'
import { type Layer, UNALLOCATED, ZERO } from '../block/device.ts'

/** Sets what a layer owns, as data or as zeros. */
export async function addOwned(layer: Layer, owned: Bitmap): Promise<void> {
  const size = Math.min(layer.size, owned.size)
  let position = 0
  const pending = layer.allocation(0, size, (length, ownership) => {
    if (ownership !== UNALLOCATED) owned.set(position, length)
    position += length
    return true
  })
  if (pending !== undefined) await pending
}

/** What a longer layer below holds past the end of `layer`: it does not show, so whoever takes over has zeros there. */
export async function addHidden(layer: Layer, below: Layer, owned: Bitmap): Promise<void> {
  const end = Math.min(below.size, owned.size)
  let position = layer.size
  if (position >= end) return
  await below.extents(position, end - position, (length, extent) => {
    if ((extent & ZERO) === 0) owned.set(position, length)
    position += length
    return true
  })
}

/** Sets in `into`, which may be of another size, what `from` has set. */
export function copyGranules(from: Bitmap, into: Bitmap): void {
  const size = Math.min(from.size, into.size)
  from.runs(0, size, size, (offset, length) => {
    into.set(offset, Math.min(length, size - offset))
    return true
  })
}
