// Clusters of the image file, as the writer takes, gives back and frees them: the allocator (allocator.ts) with its waits, and
// with what follows when a change fails half way.

import type { Allocator } from './allocator.ts'

/** Neighbouring new clusters for neighbouring clusters of the disk. */
export interface Replacement {
  /** Guest offset of the first. */
  readonly offset: number
  readonly cluster: number
  readonly count: number
}

export class Places {
  readonly #allocator: Allocator
  readonly #clusterSize: number

  constructor(allocator: Allocator, clusterSize: number) {
    this.#allocator = allocator
    this.#clusterSize = clusterSize
  }

  /** Takes up to `most` neighbouring clusters for the guest clusters from `offset` on. */
  async take(offset: number, most: number): Promise<Replacement> {
    for (;;) {
      const cluster = this.#allocator.allocate(most)
      if (cluster >= 0) return { offset, cluster, count: this.#allocator.granted }
      await this.#allocator.prepare()
    }
  }

  /** Makes the file reach to the end of new clusters: zeros are not written, so that it might end before they do. */
  extendOver({ cluster, count }: Replacement): Promise<void> {
    return this.#allocator.extendTo(cluster + count)
  }

  /** Runs `work`; when it fails, nothing refers to the new clusters yet, and they are taken back. */
  async orGiveBack(fresh: readonly Replacement[], work: () => Promise<void>): Promise<void> {
    try {
      await work()
    } catch (error) {
      for (const { cluster, count } of fresh) await this.freeOld(cluster, count)
      throw error
    }
  }

  async freeCompressed(host: number, length: number): Promise<void> {
    const first = Math.floor(host / this.#clusterSize)
    await this.freeOld(first, Math.floor((host + length - 1) / this.#clusterSize) - first + 1)
  }

  /** Drops references. That they cannot be dropped costs space, which the next opening finds; the request stands. */
  async freeOld(first: number, count: number): Promise<void> {
    try {
      await this.#allocator.freeLater(first, count)
    } catch {
      this.#allocator.isDamaged = true
    }
  }

  /** Drops `times` references to a cluster that were counted and never used. As for `freeOld`, it does not fail. */
  async dropUnused(cluster: number, times: number): Promise<void> {
    try {
      await this.#allocator.refcounts.withPage(cluster, () => {
        for (let i = 0; i < times; i++) this.#allocator.release(cluster, 1)
      })
    } catch {
      this.#allocator.isDamaged = true
    }
  }

  /** Throws the error of a change of a table: it may have reached the file or not, so that what is allocated is uncertain. */
  damaged(error: unknown): never {
    this.#allocator.isDamaged = true
    throw error
  }
}
