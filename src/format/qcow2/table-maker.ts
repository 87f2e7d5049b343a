// Gives a part of the disk an L2 table that belongs to it alone: a new one where there is none, a copy of one that a
// snapshot shares. One at a time. The order: new cluster (reads as zeros) -> copy, sync -> L1 entry -> the old table is free.

import { Mutex } from '../../base/mutex.ts'
import type { HostFile } from '../../host/host.ts'
import type { Header } from './header.ts'
import type { Places } from './places.ts'
import type { SharedSync } from './shared-sync.ts'
import type { Tables } from './tables.ts'

export class TableMaker {
  readonly #file: HostFile
  readonly #header: Readonly<Header>
  readonly #tables: Tables
  readonly #places: Places
  readonly #sync: SharedSync
  readonly #mutex = new Mutex()

  constructor(file: HostFile, header: Readonly<Header>, tables: Tables, places: Places, sync: SharedSync) {
    this.#file = file
    this.#header = header
    this.#tables = tables
    this.#places = places
    this.#sync = sync
  }

  /** Runs `work` while no L2 table is made: for who replaces the L1 table. */
  pause(work: () => Promise<void>): Promise<void> {
    return this.#mutex.run(work)
  }

  /** Makes entries for the offset writable. */
  make(offset: number): Promise<void> {
    return this.#mutex.run(async () => {
      if (this.#tables.isWritable(offset)) return
      const l1Index = Math.floor(offset / this.#tables.tableReach)
      const old = this.#tables.tableAt(l1Index)
      const fresh = await this.#places.take(offset, 1)
      const { clusterSize } = this.#header
      const place = fresh.cluster * clusterSize
      await this.#places.orGiveBack([fresh], async () => {
        await this.#places.extendOver(fresh)
        // A new cluster reads as zeros even after a crash, which is what an empty table is; a copy must be durable first.
        if (old !== 0) await this.#copy(old, place)
      })
      try {
        await this.#tables.setTable(l1Index, place)
      } catch (error) {
        this.#places.damaged(error)
      }
      if (old !== 0) await this.#places.freeOld(old / clusterSize, 1)
    })
  }

  async #copy(old: number, place: number): Promise<void> {
    const bytes = new Uint8Array(this.#header.clusterSize)
    await this.#file.read(old, bytes.length, bytes, 0)
    // The old table keeps its references, so that none of the clusters is exclusive.
    for (let at = 0; at < bytes.length; at += this.#header.l2EntrySize) bytes[at] = (bytes[at] as number) & 0x7f
    await this.#file.write(place, bytes.length, bytes, 0)
    await this.#sync.run()
  }
}
