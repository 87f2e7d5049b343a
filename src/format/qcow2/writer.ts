// What changes a qcow2 image: write, zero, trim and flush, when a sync is due, and the mark on an image that a change finds
// corrupt. A write over data in place is done here; where other data goes is in changes.ts, zeros are in zeros.ts.

import type { Pending } from '../../block/device.ts'
import type { BlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Allocator } from './allocator.ts'
import { Changes, type Surroundings } from './changes.ts'
import { CompressedStore } from './compressed-store.ts'
import { writeFeatures } from './header.ts'
import { DATA, NO_PLACE } from './mapping.ts'
import { INCOMPAT_CORRUPT } from './spec.ts'
import { Preallocator } from './preallocate.ts'
import type { Tables } from './tables.ts'
import { Zeros } from './zeros.ts'

export class Writer {
  readonly #file: HostFile
  readonly #changes: Changes
  readonly #zeros: Zeros
  readonly #compressed: CompressedStore
  /** Flushes under way: until they are over, what they cover is not durable. */
  #flushes = 0
  #isCorrupt = false

  /** `data` is the file that holds the guest's data: `file` itself, or an external data file. */
  constructor(file: HostFile, data: HostFile, image: Surroundings, tables: Tables, allocator: Allocator) {
    this.#file = file
    this.#changes = new Changes(file, data, image, tables, allocator)
    this.#zeros = new Zeros(this.#changes)
    this.#compressed = new CompressedStore(this.#changes)
  }

  /** True after a change found the image corrupt: it is marked so, and nothing more may be changed. */
  get isCorrupt(): boolean {
    return this.#isCorrupt
  }

  write(offset: number, length: number, from: Uint8Array, at: number): Pending {
    try {
      return this.#watched(this.#writePieces(offset, length, from, at))
    } catch (error) {
      return this.#failed(error)
    }
  }

  /** Makes the cluster at `offset` hold what `packed` decompresses to. */
  writeCompressed(offset: number, packed: Uint8Array): Pending {
    return this.#watched(this.#compressed.write(offset, packed))
  }

  /** Makes the range read as zeros; whole clusters give up their place when they may. */
  zero(offset: number, length: number, mayUnmap: boolean): Pending {
    try {
      return this.#watched(this.#zeros.zero(offset, length, mayUnmap, true))
    } catch (error) {
      return this.#failed(error)
    }
  }

  /** Gives up the whole units of the range, which then read as zeros; leaves parts, and most of what it never held. */
  trim(offset: number, length: number): Pending {
    try {
      return this.#watched(this.#zeros.zero(offset, length, true, false))
    } catch (error) {
      return this.#failed(error)
    }
  }

  /** Counts a request of a reader. See `Changes.track`. */
  track(wait: Pending): Pending {
    return this.#changes.track(wait)
  }

  flush(): Pending {
    const changes = this.#changes
    if (changes.sync.failure !== undefined) throw changes.sync.failure
    if (!changes.isUnsynced && changes.inFlight === 0 && this.#flushes === 0) return undefined
    return this.flushAll()
  }

  /**
   * Syncs data and L2 entries. Refcounts stay in memory: the dirty bit says so, and writing them at each flush would cost
   * more than the rare rebuild. A failed sync may have lost writes for good, so every later flush fails too.
   */
  async flushAll(): Promise<void> {
    const changes = this.#changes
    changes.isUnsynced = false
    // What a corrupt image has freed may be in use.
    if (this.#isCorrupt) return changes.sync.run()
    this.#flushes++
    try {
      const settlement = await changes.allocator.collect()
      await changes.syncAll()
      await changes.allocator.settle(settlement, changes.inFlight === 0)
    } finally {
      this.#flushes--
    }
  }

  /** Gives each cluster of the range a place in the map. */
  preallocate(offset: number, end: number): Promise<void> {
    return new Preallocator(this.#changes).run(offset, end)
  }

  /** Makes the whole clusters from `offset` to `end` unmapped, whatever then shows there. */
  async drop(offset: number, end: number): Promise<void> {
    await this.#zeros.drop(offset, end)
  }

  /** The last flush before the refcounts are written or compared. No request may be in flight. */
  async finish(): Promise<void> {
    if (!this.#isCorrupt) await this.#compressed.release()
    await this.flushAll()
  }

  /** Runs `work` while no L2 table is made: for who replaces the L1 table. */
  withTables(work: () => Promise<void>): Promise<void> {
    return this.#changes.tableMaker.pause(work)
  }

  #watched(wait: Pending): Pending {
    return wait === undefined ? undefined : wait.catch((error) => this.#failed(error))
  }

  /** Fails as the change did; first durably marks the image when it is corrupt. */
  #failed(error: unknown): Promise<never> {
    if (!this.#changes.tables.hasFoundCorrupt(error)) throw error
    return this.#markCorrupt(error)
  }

  async #markCorrupt(error: BlockError): Promise<never> {
    this.#isCorrupt = true
    const { header } = this.#changes.image
    header.incompatible |= INCOMPAT_CORRUPT
    await writeFeatures(this.#file, header)
    throw error
  }

  #writePieces(offset: number, length: number, from: Uint8Array, at: number): Pending {
    const end = offset + length
    while (offset < end) {
      const wait = this.#writePiece(offset, end - offset, from, at)
      const { done } = this.#changes
      if (wait !== undefined)
        return wait.then(() => {
          this.#changes.isUnsynced = true
          return this.#writePieces(offset + done, end - offset - done, from, at + done)
        })
      offset += done
      at += done
    }
    return undefined
  }

  #writePiece(offset: number, length: number, from: Uint8Array, at: number): Pending {
    const changes = this.#changes
    const { tables } = changes
    changes.done = 0
    if (!tables.find(offset, length)) return tables.load(offset)
    changes.isUnsynced = true
    if (tables.kind === DATA && tables.exclusive) {
      changes.protect(tables.host, tables.length, offset)
      changes.done = tables.length
      return changes.track(changes.data.write(tables.host, tables.length, from, at))
    }
    const wait = changes.obstacle(offset, tables.length)
    if (wait !== undefined) return wait
    const place = changes.ownPlace(offset)
    if (place !== NO_PLACE) return changes.settle(offset, tables.length, place, from, at)
    return changes.needsCopy(offset, tables.length)
      ? changes.replace(offset, tables.length, from, at)
      : changes.writeFresh(offset, tables.length, from, at)
  }
}
