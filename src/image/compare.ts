// Says whether two disks show the same, whatever their formats and backing files, and where they first differ.

import type { Chain } from '../chain/chain.ts'
import { comparePair, type PairPiece } from './pair.ts'

/** What `qemu-img compare` counts offsets in, in bytes. */
const SECTOR = 512

/** Offsets and sizes in bytes. */
export type Comparison =
  | { readonly outcome: 'identical'; readonly sizes: readonly [number, number] }
  /** Of a strict comparison. */
  | { readonly outcome: 'size'; readonly sizes: readonly [number, number] }
  /** 'status': of a strict comparison, one is allocated or known to be zeros where the other is not. */
  | {
      readonly outcome: 'content' | 'status'
      readonly sizes: readonly [number, number]
      /** The first byte that differs, or the start of the range whose status does. */
      readonly offset: number
    }

export interface CompareOptions {
  /** Sizes and allocation must be the same too. Without it, what one disk has more must be zeros. */
  readonly strict?: boolean | undefined
  readonly progress?: ((done: number, total: number) => void) | undefined
}

export async function compareImages(a: Chain, b: Chain, options: CompareOptions = {}): Promise<Comparison> {
  const sizes = [a.size, b.size] as const
  const { strict = false, progress } = options
  if (strict && a.size !== b.size) return { outcome: 'size', sizes }
  let content = -1
  let status = -1
  const compare = (piece: PairPiece): boolean => {
    content = firstDifference(piece)
    return content < 0
  }
  const look = (offset: number, _length: number, bitsA: number, bitsB: number): boolean => {
    if (bitsA !== bitsB) status = offset
    return bitsA === bitsB
  }
  await comparePair({ a, b, compare, look: strict ? look : undefined, progress })
  // What lies before a range with another status may still have been on its way.
  if (content >= 0 && (status < 0 || content < status)) return { outcome: 'content', sizes, offset: content }
  if (status >= 0) return { outcome: 'status', sizes, offset: status }
  return { outcome: 'identical', sizes }
}

/** The offset of the first byte that differs, -1 when none does. */
function firstDifference({ offset, length, bytes, aAt, bAt }: PairPiece): number {
  const a = Buffer.from(bytes.buffer, bytes.byteOffset + aAt, length)
  const b = Buffer.from(bytes.buffer, bytes.byteOffset + bAt, length)
  if (a.equals(b)) return -1
  let at = 0
  while (a[at] === b[at]) at++
  return offset + at
}

/** The line that `qemu-img compare` prints. */
export function describeComparison(comparison: Comparison): string {
  switch (comparison.outcome) {
    case 'identical':
      return 'Images are identical.'
    case 'size':
      return 'Strict mode: Image size mismatch!'
    case 'status':
      return `Strict mode: Offset ${comparison.offset} block status mismatch!`
    case 'content':
      return `Content mismatch at offset ${comparison.offset - (comparison.offset % SECTOR)}!`
  }
}
