// Internal snapshots of a qcow2 image: their list, and how one is made, applied and deleted. Each is an L1 table that shares L2
// tables and clusters with the disk; a write to what is shared goes elsewhere (writer.ts). Large images are walked table by
// table, so that memory stays bounded.
//
//   make     count all once more -> new table -> header leads to it
//   apply    count what the snapshot holds once more -> its L1 as the disk's -> header leads to it -> count the old disk once less
//   delete   header leads to a table without it -> count all that it held once less
//
// Each step is durable before the next, and a header changes within one sector: a crash leaves the old state or the new one,
// and at most clusters that are counted too often. No request may be in flight.

import { setUint32, setUint64, utf8 } from '../../base/bytes.ts'
import { QCOW2_DIRECTORY_MAX, QCOW2_SNAPSHOTS_MAX } from '../../base/limits.ts'
import { divideUp } from '../../base/round.ts'
import { BlockError, type ErrorKind, isBlockError } from '../../block/error.ts'
import type { HostFile } from '../../host/host.ts'
import type { Allocator } from './allocator.ts'
import { type Header, l1EntriesFor } from './header.ts'
import { type Progress, SharedClusters } from './shared-clusters.ts'
import { encodeSnapshots, newSnapshot, readSnapshots, type Snapshot, tableLength } from './snapshot-table.ts'
import * as spec from './spec.ts'
import type { Tables } from './tables.ts'
import type { Writer } from './writer.ts'

/** The image that is written. */
export interface SnapshotHome {
  readonly tables: Tables
  readonly allocator: Allocator
  readonly writer: Writer
}

/** Bytes of the longest name that QEMU's tools can be given. */
const NAME_MAX = 255

export class Snapshots {
  readonly #file: HostFile
  readonly #header: Header
  #list: readonly Snapshot[] = []
  #problem: BlockError | undefined
  /** Ids of the snapshots that are open as devices, one for each time. */
  readonly #open: string[] = []

  constructor(file: HostFile, header: Header) {
    this.#file = file
    this.#header = header
  }

  /** Reads the table; what is wrong in it is said by `list`. */
  async open(): Promise<void> {
    try {
      this.#list = await readSnapshots(this.#file, this.#header)
    } catch (error) {
      if (!isBlockError(error, 'invalid-format')) throw error
      this.#problem = error
    }
  }

  /** Oldest first. Kind 'invalid-format' when the table cannot be right. */
  get list(): readonly Snapshot[] {
    if (this.#problem !== undefined) throw this.#problem
    return this.#list
  }

  /** The snapshot whose id, or else whose name, is `wanted`; the first of several. Kind 'not-found'. */
  find(wanted: string): Snapshot {
    const found = this.list.find(({ id }) => id === wanted) ?? this.list.find(({ name }) => name === wanted)
    if (found !== undefined) return found
    throw this.#failure('not-found', `there is no internal snapshot with the id or name ${JSON.stringify(wanted)}`)
  }

  /** Keeps a snapshot from being deleted until what this gives is called. */
  hold({ id }: Snapshot): () => void {
    this.#open.push(id)
    return () => void this.#open.splice(this.#open.indexOf(id), 1)
  }

  /** See `Qcow2Image.createSnapshot`. */
  async create(home: SnapshotHome, name: string, progress: Progress): Promise<Snapshot> {
    const { tables, allocator, writer } = home
    const header = this.#header
    this.#refuseToCreate(name)
    await writer.finish()
    const l1 = tables.l1.slice()
    const clusters = new SharedClusters(this.#homeOf(allocator), progress)
    clusters.expect(l1, l1)
    const place = await this.#allocate(allocator, l1.length)
    try {
      await clusters.add(l1)
    } catch (error) {
      await this.#free(allocator, place, l1.length)
      throw error
    }
    const { size: diskSize, l1Size } = header
    const taken = { id: this.#nextId(), name, takenMs: Date.now(), diskSize, l1Offset: place, l1Size }
    const snapshot = newSnapshot(taken, header)
    await orDamaged(allocator, async () => {
      await allocator.refcounts.writeBack()
      await this.#file.sync()
      await clusters.mark(l1, header.l1Offset)
      // The copy in the snapshot has no marks: nobody writes through it.
      await this.#file.write(place, l1.length, l1, 0)
      await tables.open()
      tables.forget()
      await this.#writeTable(allocator, [...this.#list, snapshot])
    })
    return snapshot
  }

  /** See `Qcow2Image.applySnapshot`. */
  async apply(home: SnapshotHome, wanted: string, progress: Progress): Promise<void> {
    const { tables, allocator, writer } = home
    const header = this.#header
    const snapshot = this.find(wanted)
    this.#refuseDataFile()
    await writer.finish()
    const { diskSize } = snapshot
    const l1Size = Math.max(snapshot.l1Size, l1EntriesFor(diskSize, header.clusterSize, header.l2EntrySize), 1)
    const l1 = new Uint8Array(l1Size * spec.ENTRY_SIZE)
    await this.#file.read(snapshot.l1Offset, snapshot.l1Size * spec.ENTRY_SIZE, l1, 0)
    const old = { l1: tables.l1.slice(), place: header.l1Offset }
    const clusters = new SharedClusters(this.#homeOf(allocator), progress)
    clusters.expect(l1, l1, old.l1)
    const place = await this.#allocate(allocator, l1.length)
    try {
      await clusters.add(l1)
    } catch (error) {
      await this.#free(allocator, place, l1.length)
      throw error
    }
    await orDamaged(allocator, async () => {
      await this.#file.write(place, l1.length, l1, 0)
      await clusters.mark(l1, place)
      await allocator.refcounts.writeBack()
      await this.#file.sync()
      await this.#leadToDisk({ size: diskSize, l1Size, place })
      await tables.open()
      tables.forget()
      await clusters.remove(old.l1)
      await this.#free(allocator, old.place, old.l1.length)
    })
  }

  /** See `Qcow2Image.deleteSnapshot`. */
  async delete(home: SnapshotHome, wanted: string, progress: Progress): Promise<void> {
    const { tables, allocator, writer } = home
    const snapshot = this.find(wanted)
    this.#refuseDataFile()
    if (this.#open.includes(snapshot.id))
      throw this.#failure('busy', `its internal snapshot ${JSON.stringify(snapshot.name)} is open; close it first`)
    await writer.finish()
    const l1 = new Uint8Array(snapshot.l1Size * spec.ENTRY_SIZE)
    await this.#file.read(snapshot.l1Offset, l1.length, l1, 0)
    const active = tables.l1.slice()
    const clusters = new SharedClusters(this.#homeOf(allocator), progress)
    clusters.expect(l1, active)
    await orDamaged(allocator, async () => {
      await this.#writeTable(
        allocator,
        this.#list.filter((other) => other !== snapshot),
      )
      await clusters.remove(l1)
      await this.#free(allocator, snapshot.l1Offset, l1.length)
      // A mark that is durable before the count says one would be wrong where no dirty bit is.
      await allocator.refcounts.writeBack()
      await this.#file.sync()
      await clusters.mark(active, this.#header.l1Offset)
      await tables.open()
      tables.forget()
    })
  }

  #refuseToCreate(name: string): void {
    this.#refuseDataFile()
    const length = utf8.encode(name).length
    if (length === 0 || length > NAME_MAX || name.includes('\0'))
      throw this.#failure('invalid-argument', `a snapshot's name has 1 to ${NAME_MAX} bytes, and no zero byte`)
    const bytes =
      tableLength(this.list) + spec.SNAPSHOT_LENGTH + spec.SNAPSHOT_EXTRA_LENGTH + length + 2 * spec.ENTRY_SIZE
    if (this.list.length >= QCOW2_SNAPSHOTS_MAX || bytes > QCOW2_DIRECTORY_MAX)
      throw this.#failure('unsupported', 'no more internal snapshots fit; delete some')
  }

  #refuseDataFile(): void {
    if (this.#header.dataFile === undefined) return
    throw this.#failure('unsupported', 'an image with an external data file has no internal snapshots')
  }

  /** One more than the largest number among the ids, as QEMU counts. */
  #nextId(): string {
    const numbers = this.#list.map(({ id }) => Number.parseInt(id, 10)).filter(Number.isSafeInteger)
    return String(numbers.reduce((most, number) => Math.max(most, number), 0) + 1)
  }

  /** Writes the table to a new place, with all that was written before durable, leads the header to it, and frees the old one. */
  async #writeTable(allocator: Allocator, list: readonly Snapshot[]): Promise<void> {
    const header = this.#header
    const bytes = encodeSnapshots(list)
    const place = bytes.length === 0 ? 0 : await this.#allocate(allocator, bytes.length)
    if (place !== 0) await this.#file.write(place, bytes.length, bytes, 0)
    await allocator.refcounts.writeBack()
    await this.#file.sync()
    const fields = new Uint8Array(12)
    setUint32(fields, 0, list.length)
    setUint64(fields, 4, place)
    await this.#file.write(spec.HEADER.nb_snapshots, fields.length, fields, 0)
    await this.#file.sync()
    const old = { place: header.snapshotsOffset, length: tableLength(this.#list) }
    header.snapshotCount = list.length
    header.snapshotsOffset = place
    this.#list = list
    if (old.length > 0) await this.#free(allocator, old.place, old.length)
  }

  /** Leads the header to another L1 table, of a disk of another size. The fields between are those of encryption: none. */
  async #leadToDisk({ size, l1Size, place }: { size: number; l1Size: number; place: number }): Promise<void> {
    const { HEADER } = spec
    const fields = new Uint8Array(HEADER.refcount_table_offset - HEADER.size)
    setUint64(fields, 0, size)
    setUint32(fields, HEADER.l1_size - HEADER.size, l1Size)
    setUint64(fields, HEADER.l1_table_offset - HEADER.size, place)
    await this.#file.write(HEADER.size, fields.length, fields, 0)
    await this.#file.sync()
    const header = this.#header
    header.size = size
    header.l1Size = l1Size
    header.l1Offset = place
  }

  #homeOf(allocator: Allocator): { file: HostFile; header: Header; allocator: Allocator } {
    return { file: this.#file, header: this.#header, allocator }
  }

  async #allocate(allocator: Allocator, bytes: number): Promise<number> {
    const { clusterSize } = this.#header
    return (await allocator.allocateRun(Math.max(1, divideUp(bytes, clusterSize)))) * clusterSize
  }

  async #free(allocator: Allocator, place: number, bytes: number): Promise<void> {
    const { clusterSize } = this.#header
    await allocator.freeLater(place / clusterSize, Math.max(1, divideUp(bytes, clusterSize)))
  }

  #failure(kind: ErrorKind, what: string): BlockError {
    const { path } = this.#file
    return new BlockError(kind, `${path}: ${what}`, { path })
  }
}

/** A failure on the way leaves counts and marks that the next opening rebuilds: the dirty bit stays. */
async function orDamaged(allocator: Allocator, work: () => Promise<void>): Promise<void> {
  try {
    await work()
  } catch (error) {
    allocator.isDamaged = true
    throw error
  }
}
