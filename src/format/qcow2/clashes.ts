// The clusters of a damaged qcow2 image that are used for two different things, say as an L2 table and for guest data. A repair
// writes to none of them: what mends the one use may break the other.

import { QCOW2_REPAIR_CLASHES } from '../../base/limits.ts'
import { type Roots, walkReferences } from './references.ts'
import { Tally } from './tally.ts'

export class Clashes {
  readonly #clusterSize: number
  readonly #clusters = new Set<number>()

  constructor(clusterSize: number) {
    this.#clusterSize = clusterSize
  }

  /** Takes note of the clashes in the tally's window. */
  collect(tally: Tally): void {
    for (let cluster = tally.start; cluster <= tally.lastUsed && this.#isListed; cluster++)
      if (tally.isClash(cluster)) this.#clusters.add(cluster)
  }

  /** True when a repair may write to the place, an offset in the file. With too many clashes to be listed, to none. */
  mayWrite(place: number): boolean {
    return this.#isListed && !this.#clusters.has(Math.floor(place / this.#clusterSize))
  }

  get #isListed(): boolean {
    return this.#clusters.size < QCOW2_REPAIR_CLASHES
  }
}

/** Counts the references to the clusters `start` to `stop` - 1. */
export async function countWindow(roots: Roots, start: number, stop: number): Promise<Tally> {
  const tally = new Tally(start, stop, roots.header.clusterSize)
  await walkReferences(roots, {
    area: (offset, length, kind, times) => tally.add(offset, length, kind, times),
    flaw: () => undefined,
    invalid: () => undefined,
  })
  return tally
}
