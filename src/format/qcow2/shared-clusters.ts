// What an L1 table of a qcow2 image leads to, counted once more or once less: for internal snapshots, which share L2 tables and
// clusters with the disk. A cluster's refcount is the number of L1 tables that reach it (of compressed clusters, each that
// has data in it counts), and an entry of the disk's tables is marked as copied where that number is one.
//
// It does not know what a snapshot is (snapshots.ts), nor what else has references (references.ts).

import { Breather } from '../../base/breather.ts'
import { getUint32 } from '../../base/bytes.ts'
import { BlockError, type ErrorKind } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Allocator } from './allocator.ts'
import type { Header } from './header.ts'
import * as spec from './spec.ts'

export interface SharingHome {
  readonly file: HostFile
  readonly header: Header
  readonly allocator: Allocator
}

/** Hears how much of a long work is done: L2 tables, of all that there are to do. */
export type Progress = (done: number, total: number) => void

const COPIED = 0x80

export class SharedClusters {
  readonly #file: HostFile
  readonly #header: Header
  readonly #allocator: Allocator
  readonly #progress: Progress
  readonly #breather = new Breather()
  readonly #l2: Uint8Array
  #done = 0
  #total = 0

  constructor({ file, header, allocator }: SharingHome, progress: Progress) {
    this.#file = file
    this.#header = header
    this.#allocator = allocator
    this.#progress = progress
    this.#l2 = new Uint8Array(header.clusterSize)
  }

  /** Says how many L1 tables will be walked, so that progress has an end. */
  expect(...walks: readonly Uint8Array[]): void {
    for (const l1 of walks)
      for (let at = 0; at < l1.length; at += spec.ENTRY_SIZE) if (tableOf(l1, at) !== 0) this.#total++
  }

  /**
   * Counts one more reference to each L2 table under `l1` and to all that it leads to. Kinds: 'unsupported' when a refcount of
   * the image's width cannot hold one more, 'corrupt' when a table is wrong; nothing is changed then.
   */
  async add(l1: Uint8Array): Promise<void> {
    const { refcounts } = this.#allocator
    let added = 0
    try {
      await this.#walk(l1, (cluster) => {
        const count = refcounts.get(cluster)
        if (count === 0)
          throw this.#failure('corrupt', `cluster ${cluster} is used and not counted; see varve image check -r all`)
        if (count >= refcounts.largest) {
          const what = `its refcounts of ${2 ** this.#header.refcountOrder} bits cannot hold one more snapshot`
          throw this.#failure('unsupported', what)
        }
        refcounts.set(cluster, count + 1)
        added++
        return true
      })
    } catch (error) {
      await this.#takeBack(l1, added)
      throw error
    }
  }

  /** Counts one reference less to all that `l1`, which is durably in use no more, leads to; what has none left is free. */
  async remove(l1: Uint8Array): Promise<void> {
    try {
      await this.#walk(l1, (cluster) => {
        this.#allocator.release(cluster, 1)
        return true
      })
    } catch (error) {
      // Refcounts may be too high now, which the dirty bit lets the next opening find.
      this.#allocator.isDamaged = true
      throw error
    }
  }

  /** Marks the entries of `l1`, whose place in the file is `l1Offset`, and those under it as copied where that is so. */
  async mark(l1: Uint8Array, l1Offset: number): Promise<void> {
    const { clusterSize, l2EntrySize } = this.#header
    const { refcounts } = this.#allocator
    let isL1Changed = false
    for (let at = 0; at < l1.length; at += spec.ENTRY_SIZE) {
      const table = this.#tableAt(l1, at)
      if (table === 0) continue
      await refcounts.withPage(table / clusterSize, () => {
        if (setCopied(l1, at, refcounts.get(table / clusterSize) === 1)) isL1Changed = true
      })
      await this.#file.read(table, clusterSize, this.#l2, 0)
      let isChanged = false
      for (let entry = 0; entry < clusterSize; entry += l2EntrySize) {
        const cluster = this.#standardCluster(entry)
        if (cluster === 0) continue
        for (let wait = refcounts.load(cluster); wait !== undefined; wait = refcounts.load(cluster)) await wait
        if (setCopied(this.#l2, entry, refcounts.get(cluster) === 1)) isChanged = true
      }
      if (isChanged) await this.#file.write(table, clusterSize, this.#l2, 0)
      await this.#step()
    }
    if (isL1Changed) await this.#file.write(l1Offset, l1.length, l1, 0)
  }

  async #takeBack(l1: Uint8Array, added: number): Promise<void> {
    let left = added
    try {
      await this.#walk(l1, (cluster) => {
        if (left-- > 0) this.#allocator.refcounts.set(cluster, this.#allocator.refcounts.get(cluster) - 1)
        return left > 0
      })
    } catch {
      this.#allocator.isDamaged = true
    }
  }

  /** Visits each cluster that `l1` leads to, whose refcount is at hand, in a fixed order; false stops. */
  async #walk(l1: Uint8Array, visit: (cluster: number) => boolean): Promise<void> {
    const { clusterSize, l2EntrySize } = this.#header
    const { refcounts } = this.#allocator
    for (let at = 0; at < l1.length; at += spec.ENTRY_SIZE) {
      const table = this.#tableAt(l1, at)
      if (table === 0) continue
      const own = table / clusterSize
      for (let wait = refcounts.load(own); wait !== undefined; wait = refcounts.load(own)) await wait
      if (!visit(own)) return
      await this.#file.read(table, clusterSize, this.#l2, 0)
      for (let entry = 0; entry < clusterSize; entry += l2EntrySize) {
        const first = this.#firstCluster(entry)
        if (first === 0) continue
        for (let cluster = first; cluster <= this.#lastCluster(entry, first); cluster++) {
          for (let wait = refcounts.load(cluster); wait !== undefined; wait = refcounts.load(cluster)) await wait
          if (!visit(cluster)) return
        }
      }
      await this.#step()
    }
  }

  /** Where the L2 table of an L1 entry is; 0 for none. */
  #tableAt(l1: Uint8Array, at: number): number {
    const table = tableOf(l1, at)
    if (table === 0) return 0
    const { clusterSize } = this.#header
    if (table % clusterSize === 0 && table >= clusterSize && table < this.#file.size()) return table
    throw this.#failure('corrupt', `an L1 entry leads to ${table}, where no L2 table can be; see varve image check`)
  }

  /** The host cluster where the data of an L2 entry begin; 0 for none in this file. */
  #firstCluster(entry: number): number {
    if (this.#header.dataFile !== undefined) return 0
    const high = getUint32(this.#l2, entry)
    if ((high & spec.OFLAG_COMPRESSED_HIGH) === 0) return this.#standardCluster(entry)
    const host = spec.compressedOffset(high, getUint32(this.#l2, entry + 4), this.#header.clusterBits)
    return Math.floor(host / this.#header.clusterSize)
  }

  #lastCluster(entry: number, first: number): number {
    const high = getUint32(this.#l2, entry)
    if ((high & spec.OFLAG_COMPRESSED_HIGH) === 0) return first
    const low = getUint32(this.#l2, entry + 4)
    const { clusterBits, clusterSize } = this.#header
    const end = spec.compressedOffset(high, low, clusterBits) + spec.compressedLength(high, low, clusterBits)
    return Math.floor((end - 1) / clusterSize)
  }

  /** The cluster of an entry that can be marked as copied; 0 for others. */
  #standardCluster(entry: number): number {
    const high = getUint32(this.#l2, entry)
    if ((high & spec.OFLAG_COMPRESSED_HIGH) !== 0) return 0
    const host = spec.entryOffset(high, getUint32(this.#l2, entry + 4))
    const { clusterSize } = this.#header
    if (host % clusterSize === 0) return host / clusterSize
    throw this.#failure('corrupt', `an L2 entry leads to ${host}, no cluster's start; see varve image check`)
  }

  async #step(): Promise<void> {
    this.#progress(++this.#done, Math.max(this.#total, this.#done))
    await this.#breather.pause()
  }

  #failure(kind: ErrorKind, what: string): BlockError {
    const { path } = this.#file
    return new BlockError(kind, `${path}: ${what}`, { path })
  }
}

function tableOf(l1: Uint8Array, at: number): number {
  return spec.entryOffset(getUint32(l1, at), getUint32(l1, at + 4))
}

/** Sets the flag of the entry at `at`; says whether that is a change. */
function setCopied(bytes: Uint8Array, at: number, isCopied: boolean): boolean {
  const before = bytes[at] as number
  const after = isCopied ? before | COPIED : before & ~COPIED
  bytes[at] = after
  return after !== before
}
