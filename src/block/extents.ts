// Joins neighbouring extents that are alike, and collects them. Used wherever extents are gathered for a caller.

import type { BlockDevice, ExtentVisitor } from './device.ts'

/** Passes pieces on to `visit`, neighbours with equal bits as one. Call `end` after the last piece. */
export class ExtentJoiner {
  readonly #visit: ExtentVisitor
  #length = 0
  #extent = -1
  #stopped = false

  constructor(visit: ExtentVisitor) {
    this.#visit = visit
  }

  /** Adds a piece; false when the visitor wants no more. */
  add(length: number, extent: number): boolean {
    if (this.#stopped || length === 0) return !this.#stopped
    if (extent === this.#extent) this.#length += length
    else {
      this.end()
      this.#length = length
      this.#extent = extent
    }
    return !this.#stopped
  }

  end(): void {
    if (this.#length > 0 && !this.#stopped) this.#stopped = !this.#visit(this.#length, this.#extent)
    this.#length = 0
    this.#extent = -1
  }
}

export interface Extent {
  readonly offset: number
  readonly length: number
  /** HOLE and ZERO bits. */
  readonly extent: number
}

/** The extents of a range as a list, neighbours joined. For small ranges and tests: the list is as long as it is. */
export async function listExtents(device: BlockDevice, offset: number, length: number): Promise<Extent[]> {
  const found: Extent[] = []
  let position = offset
  const joiner = new ExtentJoiner((piece, extent) => {
    found.push({ offset: position, length: piece, extent })
    position += piece
    return true
  })
  await device.extents(offset, length, (piece, extent) => joiner.add(piece, extent))
  joiner.end()
  return found
}
