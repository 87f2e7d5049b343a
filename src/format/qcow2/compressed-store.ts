// Compressed clusters, written: packed one after the other into host clusters, each of which counts a reference for every
// compressed cluster that has bytes in it. Compressing is the caller's work (cluster-compressor.ts).
//
//   host cluster   |AAAABBBBBBBBBCC|CCCCCDDDD......|      counts 3 and 2, and one more while there is room at the end:
//                                           ^ next        so long it is not free, whatever becomes of C and D
//
// A strict allocator (allocator.ts) has to count durably what is about to be used: then it is some at a time that are counted
// ahead of use.
//
// What lies in place of compressed bytes after a power loss would not decompress, so the order is that of a replacement:
// data -> sync -> L2 entry -> the old cluster is free. Those in flight together share the sync.

import { assert } from '../../base/assert.ts'
import { QCOW2_COUNTED_AHEAD } from '../../base/limits.ts'
import { Mutex } from '../../base/mutex.ts'
import type { Changes } from './changes.ts'
import { COMPRESSED, NO_PLACE } from './mapping.ts'

export class CompressedStore {
  readonly #changes: Changes
  readonly #clusterSize: number
  readonly #mutex = new Mutex()
  /** Where the next one begins, and the end of the host cluster that this is in; equal when there is none. */
  #next = 0
  #end = 0
  /** References that this host cluster counts and that nothing uses yet; at least one while there is room. */
  #ahead = 0

  constructor(changes: Changes) {
    this.#changes = changes
    this.#clusterSize = changes.image.header.clusterSize
  }

  /** Makes the cluster at `offset` hold what `packed`, shorter than a cluster, decompresses to. */
  async write(offset: number, packed: Uint8Array): Promise<void> {
    const changes = this.#changes
    assert(offset % this.#clusterSize === 0 && packed.length < this.#clusterSize, 'a whole cluster that did shrink')
    const host = await this.#mutex.run(() => this.#take(offset, packed.length))
    try {
      changes.protect(host, packed.length, offset)
      await changes.track(changes.data.write(host, packed.length, packed, 0))
      await changes.sync.run()
      await this.#link(offset, host, packed.length)
    } catch (error) {
      await changes.places.freeCompressed(host, packed.length)
      throw error
    }
    changes.isUnsynced = true
  }

  /** Gives up the room at the end of the last host cluster. Nothing may be in flight. */
  async release(): Promise<void> {
    this.#next = this.#end
    await this.#dropAhead()
  }

  async #link(offset: number, host: number, length: number): Promise<void> {
    const changes = this.#changes
    const { tables, places } = changes
    for (;;) {
      // A load may be done within the call: what was loaded still has to be asked for obstacles.
      const isFound = tables.find(offset, 1)
      const wait = isFound ? changes.obstacle(offset, 1) : tables.load(offset)
      if (isFound && wait === undefined) break
      await wait
    }
    const old = { kind: tables.kind, host: tables.host, compressedLength: tables.compressedLength }
    const token = changes.lock(offset, this.#clusterSize)
    try {
      try {
        await tables.linkCompressed(offset, host, length)
      } catch (error) {
        places.damaged(error)
      }
      if (old.kind === COMPRESSED) await places.freeCompressed(old.host, old.compressedLength)
      else if (old.host !== NO_PLACE) await places.freeOld(Math.floor(old.host / this.#clusterSize), 1)
    } finally {
      changes.release(token)
    }
  }

  /** A place for `length` bytes, with a reference to each host cluster that they touch. */
  async #take(offset: number, length: number): Promise<number> {
    const size = this.#clusterSize
    const room = this.#end - this.#next
    if (length <= room) {
      const host = this.#next
      this.#next += length
      this.#ahead--
      await this.#keepRoom()
      return host
    }
    const { cluster } = await this.#changes.places.take(offset, 1)
    const start = cluster * size
    const isNeighbour = room > 0 && start === this.#end
    if (isNeighbour) this.#ahead--
    await this.#dropAhead()
    const host = isNeighbour ? this.#next : start
    this.#next = host + length
    this.#end = start + size
    await this.#keepRoom()
    return host
  }

  /** Counts references for the room at the end; without one, when the count can grow no more, the room is given up. */
  async #keepRoom(): Promise<void> {
    if (this.#next === this.#end) return this.#dropAhead()
    if (this.#ahead > 0) return
    const { allocator } = this.#changes
    const { refcounts } = allocator
    const cluster = this.#end / this.#clusterSize - 1
    await refcounts.withPage(cluster, () => {
      const count = refcounts.get(cluster)
      this.#ahead = Math.min(allocator.isStrict ? QCOW2_COUNTED_AHEAD : 1, refcounts.largest - count)
      refcounts.set(cluster, count + this.#ahead)
    })
    if (this.#ahead === 0) this.#next = this.#end
    else await allocator.makeCountsDurable()
  }

  /** Drops the references that were counted ahead and that nothing ever used. */
  async #dropAhead(): Promise<void> {
    const ahead = this.#ahead
    this.#ahead = 0
    if (ahead > 0) await this.#changes.places.dropUnused(this.#end / this.#clusterSize - 1, ahead)
  }
}
