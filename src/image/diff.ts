// Which blocks of a disk differ: from another disk, from what is below its overlay, or from the moment since which a bitmap
// records. All three give the same: byte ranges in order, in whole granules.

import type { Bitmap } from '../bitmap/bitmap.ts'
import { roundDown, roundUp } from '../base/round.ts'
import { type Layer, UNALLOCATED } from '../block/device.ts'
import type { Chain } from '../chain/chain.ts'
import { type AskExtents, ExtentWalk } from './extent-walk.ts'
import { comparePair, type PairPiece } from './pair.ts'

/** Sees one differing range, in bytes, in order. */
export type RangeVisitor = (start: number, length: number) => void

/** Joins ranges to whole granules and with each other. */
class Ranges {
  readonly #granule: number
  readonly #size: number
  readonly #visit: RangeVisitor
  #start = 0
  #end = 0

  constructor(granule: number, size: number, visit: RangeVisitor) {
    this.#granule = granule
    this.#size = size
    this.#visit = visit
  }

  /** Ranges come in order, and may overlap once they are rounded. */
  add(offset: number, length: number): void {
    const start = roundDown(offset, this.#granule)
    if (start > this.#end) {
      this.close()
      this.#start = start
    }
    this.#end = Math.max(this.#end, Math.min(this.#size, roundUp(offset + length, this.#granule)))
  }

  close(): void {
    if (this.#end > this.#start) this.#visit(this.#start, this.#end - this.#start)
    this.#start = this.#end
  }
}

export interface DiffOptions {
  /** Bytes, a power of two. */
  readonly granule: number
  readonly visit: RangeVisitor
  readonly progress?: ((done: number, total: number) => void) | undefined
}

/** Where two disks differ. Past the end of the shorter one, where the longer one does not read as zeros. */
export async function diffImages(a: Chain, b: Chain, { granule, visit, progress }: DiffOptions): Promise<void> {
  const ranges = new Ranges(granule, Math.max(a.size, b.size), visit)
  await comparePair({ a, b, compare: (piece) => addDifferent(piece, granule, ranges), progress })
  ranges.close()
}

function addDifferent({ offset, length, bytes, aAt, bAt }: PairPiece, granule: number, ranges: Ranges): true {
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length)
  for (let done = 0; done < length; ) {
    const piece = Math.min(granule - ((offset + done) % granule), length - done)
    const at = aAt + done
    if (buffer.compare(buffer, bAt + done, bAt + done + piece, at, at + piece) !== 0) ranges.add(offset + done, piece)
    done += piece
  }
  return true
}

/** What an image holds itself, data or zeros, whether or not it differs from what is below. */
export async function diffOverlay(active: Layer, { granule, visit, progress }: DiffOptions): Promise<void> {
  const ranges = new Ranges(granule, active.size, visit)
  const ask: AskExtents = (offset, length, owned) => active.allocation(offset, length, owned)
  const walk = new ExtentWalk({ ask, end: active.size })
  for (await walk.advance(); walk.length > 0; await walk.advance()) {
    if (walk.extent !== UNALLOCATED) ranges.add(walk.offset, walk.length)
    progress?.(walk.offset, active.size)
  }
  ranges.close()
}

/** What a bitmap has recorded. */
export function diffBitmap(bitmap: Bitmap, { granule, visit }: DiffOptions): void {
  const ranges = new Ranges(Math.max(granule, bitmap.granule), bitmap.size, visit)
  bitmap.runs(0, bitmap.size, bitmap.size, (start, length) => {
    ranges.add(start, length)
    return true
  })
  ranges.close()
}
