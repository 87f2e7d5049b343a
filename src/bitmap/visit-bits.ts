// A bitmap as the answer to NBD's block status: a range in pieces, each clean or dirty. Knows no protocol.

import type { Bitmap } from './bitmap.ts'

/** Visits the range of bytes, in order, as clean (0) and dirty (1) pieces; the visitor returns false to stop. */
export function visitBits(
  bitmap: Bitmap,
  offset: number,
  length: number,
  visit: (length: number, status: number) => boolean,
): void {
  const end = offset + length
  let at = offset
  bitmap.runs(offset, end, length, (start, dirty) => {
    if (start > at && !visit(start - at, 0)) {
      at = end
      return false
    }
    at = start + dirty
    if (visit(dirty, 1)) return true
    at = end
    return false
  })
  if (at < end) visit(end - at, 0)
}
