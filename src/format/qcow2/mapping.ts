// What a cluster, or with extended L2 entries one of its 32 subclusters, is mapped to, and how the two bitmaps of an
// extended entry say it. Knows numbers only; tables and their entries are in tables.ts.

import { getUint32, setUint32 } from '../../base/bytes.ts'
import * as spec from './spec.ts'

/** Nothing of its own: what is below shows. */
export const UNMAPPED = 0
export const DATA = 1
export const ZEROS = 2
/** A whole cluster, compressed. */
export const COMPRESSED = 3
export type Mapping = typeof UNMAPPED | typeof DATA | typeof ZEROS | typeof COMPRESSED

/** `host` of what has no place in the file. */
export const NO_PLACE = -1

/** What subcluster `index` (0 to 31) is, by the two bitmaps of its entry, which exclude each other. */
export function subclusterKind(zeros: number, allocated: number, index: number): Mapping {
  if (((allocated >>> index) & 1) !== 0) return DATA
  return ((zeros >>> index) & 1) === 0 ? UNMAPPED : ZEROS
}

/** How many subclusters from `index` on are of the kind. */
export function subclustersAlike(zeros: number, allocated: number, index: number, kind: Mapping): number {
  const alike = kind === DATA ? allocated : kind === ZEROS ? zeros : ~(zeros | allocated)
  const others = ~alike >>> index
  return others === 0 ? spec.SUBCLUSTERS - index : 31 - Math.clz32(others & -others)
}

/** Bits `first` to `end` - 1, of 32. */
export function subclusterBits(first: number, end: number): number {
  const below = end >= spec.SUBCLUSTERS ? 0xffff_ffff : (1 << end) - 1
  return (below & ~((1 << first) - 1)) >>> 0
}

/**
 * Has an L2 entry, in its bytes, lead to no place any more: what had data there reads as zeros. Subclusters that had none go on to
 * show what is below.
 */
export function loseThePlace(entry: Uint8Array, isExtended: boolean): void {
  const zeros = isExtended ? getUint32(entry, spec.SUBCLUSTERS_ZERO) | getUint32(entry, spec.SUBCLUSTERS_ALLOCATED) : 0
  entry.fill(0)
  if (isExtended) setUint32(entry, spec.SUBCLUSTERS_ZERO, zeros >>> 0)
  else entry[7] = spec.OFLAG_ZERO_LOW
}
