// Writes one backup: takes the new content of its disks, cuts it into chunks, stores those that are new, makes the maps,
// and at the end the manifest that makes it visible.
//
//   write --copy--> batch --hash--> which are new? --compress--> packs
//                                        `--ids, in order--> map of each disk
//
// Batches are hashed and compressed elsewhere and at once; their ids come back here in order. A bounded number of batches
// is in memory: a writer that is ahead of the store waits. After a failure nothing is stored any more, and nothing is visible.

import { assert } from '../base/assert.ts'
import { copyBytes, isZero } from '../base/bytes.ts'
import { nextTurn } from '../base/breather.ts'
import { BATCH_BYTES, BATCH_RUNS, BATCHES, PACK_TURN_BYTES, REPOSITORY_SPARE_MS } from '../base/limits.ts'
import { Mutex } from '../base/mutex.ts'
import { Spares } from '../base/spares.ts'
import type { Pending } from '../block/device.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { threadGuests } from '../block/thread-guests.ts'
import { type BackupDiskInfo, type BackupInfo, encodeManifest, newBackupId, PART_OF } from './manifest.ts'
import { nodeRecord, type PackWriter } from './pack-writer.ts'
import type { Session } from './session.ts'
import { BACKUPS, BLOB_CHUNK, CHUNK_BYTES, GRANULE_BYTES, ID_BYTES } from './spec.ts'
import { batchMemory, PLAIN_FIELDS, type Squeezer, STORED_FIELDS } from './squeezer.ts'
import type { ObjectSink } from './store.ts'
import { levelsFor } from './tree.ts'
import type { TreeBuilder } from './tree-builder.ts'
import type { Vault } from './vault.ts'

/** One disk of a backup as it is given its content. One call at a time, or in order: calls are taken in the order they come. */
export interface DiskWriter {
  /**
   * The disk's content at the moment of the backup. The offset and the length are multiples of 4096 bytes, but that the last run
   * may end with the disk; runs ascend and do not overlap. The buffer is the caller's again when this is done.
   */
  write(offset: number, length: number, from: Uint8Array, at: number): Pending
  /** The range reads as zeros; aligned and ascending as for `write`. */
  zero(offset: number, length: number): Pending
}

/** Strings to keep with the backup and with its disks, in their order: a checkpoint's name for instance. */
export interface BackupNotes {
  readonly labels?: Readonly<Record<string, string>>
  readonly disks?: readonly Readonly<Record<string, string>>[]
}

/** A backup in the making. */
export interface BackupWriter {
  readonly id: string
  disk(index: number): DiskWriter
  /**
   * Makes durable what was written so far, as a part (PART_OF) from which another backup can go on should this one break; more may follow.
   * No write may be under way.
   */
  keepPart(): Promise<BackupInfo>
  /** Makes durable what was written, which is all; nothing is visible yet. `finish` does it where it was not done. */
  store(): Promise<void>
  /** Makes the backup durable and then visible. What was not written is as in the parent, or zeros without one. */
  finish(notes?: BackupNotes): Promise<BackupInfo>
  /** Gives up: nothing becomes visible. Harmless after a failure, and after `finish`. */
  abort(): Promise<void>
}

/** A run of a disk in a batch; `at` is -1 for zeros. */
interface Run {
  readonly disk: DiskSink
  readonly offset: number
  length: number
  readonly at: number
}

interface Batch {
  bytes: Uint8Array<SharedArrayBuffer> | undefined
  used: number
  readonly runs: Run[]
}

/** What is known before a backup begins: the manifest but for what only its end can tell. */
export interface WriterSetup {
  readonly store: ObjectSink
  readonly vault: Vault
  readonly squeezer: Squeezer
  readonly packs: PackWriter
  /** What keeps prunings from what this backup needs, until it ends. */
  readonly presence: Pick<Session, 'end' | 'abandon' | 'confirm'>
  readonly manifest: Omit<BackupInfo, 'disks' | 'finishedMs' | 'storedBytes' | 'labels'>
  readonly disks: readonly SessionDisk[]
  now(): number
}

export interface SessionDisk {
  readonly name: string
  readonly size: number
  readonly parent?: { readonly backup: string; readonly disk: string }
  /** The map begins as the parent's. Its nodes are saved by `saveNode`. */
  readonly builder: (save: (bytes: Uint8Array) => Uint8Array) => Promise<TreeBuilder>
}

/** Of backups that ended: for one after the other, as a host has them, memory is taken once. */
const spareBatches = new Spares<Uint8Array<SharedArrayBuffer>>(BATCHES, REPOSITORY_SPARE_MS)

/** Begins the backup that `session` describes. */
export async function beginBackup(session: WriterSetup): Promise<BackupWriter> {
  const writer = new SessionWriter(session)
  await writer.begin()
  return writer
}

class DiskSink implements DiskWriter {
  readonly info: SessionDisk
  readonly #writer: SessionWriter
  builder: TreeBuilder | undefined
  /** Of its map, once that is finished. */
  root: Uint8Array | undefined
  changedBytes = 0
  storedBytes = 0
  #end = 0

  constructor(writer: SessionWriter, info: SessionDisk) {
    this.#writer = writer
    this.info = info
  }

  write(offset: number, length: number, from: Uint8Array, at: number): Pending {
    assert(at >= 0 && at + length <= from.length, 'the run lies in its buffer')
    this.#advance('write', offset, length)
    return this.#writer.put(this, offset, length, from, at)
  }

  zero(offset: number, length: number): Pending {
    this.#advance('zero', offset, length)
    return this.#writer.put(this, offset, length, undefined, 0)
  }

  #advance(verb: string, offset: number, length: number): void {
    const { name, size } = this.info
    const end = offset + length
    const safe = Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0
    if (!safe || end > size) {
      const message = `${name}: ${verb} of ${length} bytes at ${offset} is outside the ${size} bytes`
      throw new BlockError('out-of-range', message, { device: name, offset, length })
    }
    if (offset % GRANULE_BYTES !== 0 || (length % GRANULE_BYTES !== 0 && end !== size) || offset < this.#end) {
      const rule = `in a backup, runs ascend and are multiples of ${GRANULE_BYTES} bytes`
      const message = `${name}: ${verb} of ${length} bytes at ${offset} after ${this.#end}: ${rule}`
      throw new BlockError('invalid-argument', message, { device: name, offset, length })
    }
    this.#end = end
    this.changedBytes += length
  }
}

class SessionWriter implements BackupWriter {
  readonly id: string
  readonly #session: WriterSetup
  readonly #disks: readonly DiskSink[]
  #state: 'open' | 'storing' | 'stored' | 'finishing' | 'done' | 'aborted' = 'open'
  #failure: unknown
  readonly #order = new Mutex()
  #batch: Batch | undefined
  #batches = 0
  readonly #free: Uint8Array<SharedArrayBuffer>[] = []
  readonly #waiters: (() => void)[] = []
  #tail: Promise<void> = Promise.resolve()
  readonly #compressing = new Set<Promise<void>>()

  constructor(session: WriterSetup) {
    this.id = session.manifest.id
    this.#session = session
    this.#disks = session.disks.map((disk) => new DiskSink(this, disk))
  }

  async begin(): Promise<void> {
    for (const disk of this.#disks) disk.builder = await disk.info.builder((bytes) => this.#saveNode(disk, bytes))
  }

  disk(index: number): DiskWriter {
    const disk = this.#disks[index]
    assert(disk !== undefined, `a backup of ${this.#disks.length} disks has no disk ${index}`)
    return disk
  }

  /** Takes a run, data or (without `from`) zeros. */
  put(disk: DiskSink, offset: number, length: number, from: Uint8Array | undefined, at: number): Pending {
    this.#check()
    if (!this.#order.tryAcquire()) return this.#putLater(disk, offset, length, from, at, true)
    const done = this.#append(disk, offset, length, from, at)
    if (done < length) return this.#putLater(disk, offset + done, length - done, from, at + done, false)
    this.#order.release()
    return undefined
  }

  async store(): Promise<void> {
    this.#check()
    this.#state = 'storing'
    await this.#orSettle(() => this.#store())
    this.#state = 'stored'
  }

  async keepPart(): Promise<BackupInfo> {
    this.#check()
    return this.#orSettle(async () => {
      await this.#store()
      const { manifest } = this.#session
      const info = this.#info(newBackupId(manifest.moment), { labels: { [PART_OF]: this.id } })
      await publish(this.#session, info)
      await this.#session.presence.confirm(info.id)
      return info
    })
  }

  /** All that was written is durable, and the maps show it. */
  async #store(): Promise<void> {
    if (this.#batch !== undefined) this.#dispatch(this.#batch)
    await this.#settle()
    for (const disk of this.#disks) {
      disk.root = await (disk.builder as TreeBuilder).finish()
      await this.#session.packs.room()
    }
    await this.#session.packs.finish()
  }

  #info(id: string, notes: BackupNotes): BackupInfo {
    const { packs, manifest } = this.#session
    return {
      ...manifest,
      id,
      finishedMs: this.#session.now(),
      storedBytes: packs.storedBytes,
      labels: notes.labels ?? {},
      disks: this.#disks.map((disk, index) => infoOf(disk, notes.disks?.[index] ?? {})),
    }
  }

  async finish(notes: BackupNotes = {}): Promise<BackupInfo> {
    if (this.#state !== 'stored') await this.store()
    this.#state = 'finishing'
    return this.#orSettle(async () => {
      const info = this.#info(this.id, notes)
      await publish(this.#session, info)
      this.#state = 'done'
      for (const bytes of this.#free.splice(0)) spareBatches.keep(bytes)
      this.#session.packs.spare()
      await this.#session.presence.end()
      return info
    })
  }

  async #orSettle<T>(work: () => Promise<T>): Promise<T> {
    try {
      return await work()
    } catch (error) {
      this.#fail(error)
      // What is still on its way to the store ends before the caller hears: afterwards the store is quiet.
      await this.#session.packs.settle()
      throw error
    }
  }

  async abort(): Promise<void> {
    if (this.#state === 'done' || this.#state === 'aborted') return
    this.#state = 'aborted'
    this.#fail(new BlockError('cancelled', `backup ${this.id} was given up`))
    await this.#settle().catch(() => undefined)
    await this.#session.packs.settle()
    await this.#session.presence.end()
  }

  #check(): void {
    if (this.#failure !== undefined) throw this.#failure
    if (this.#state !== 'open') throw new BlockError('closed', `backup ${this.id} is ${this.#state}`)
  }

  async #putLater(
    disk: DiskSink,
    offset: number,
    length: number,
    from: Uint8Array | undefined,
    at: number,
    queue: boolean,
  ): Promise<void> {
    if (queue) await this.#order.acquire()
    try {
      for (let done = 0; done < length; ) {
        this.#check()
        if (this.#batches >= BATCHES && this.#batch === undefined) {
          await new Promise<void>((resolve) => this.#waiters.push(resolve))
          continue
        }
        done += this.#append(disk, offset + done, length - done, from, at + done)
      }
    } finally {
      this.#order.release()
    }
  }

  /** Copies as much of the run as the free batches take; returns how many bytes. */
  #append(disk: DiskSink, offset: number, length: number, from: Uint8Array | undefined, at: number): number {
    let done = 0
    while (done < length) {
      const start = offset + done
      const piece = Math.min(length - done, from === undefined ? length : CHUNK_BYTES - (start % CHUNK_BYTES))
      const taken =
        from === undefined || isZero(from, at + done, piece)
          ? this.#addZeros(disk, start, piece)
          : this.#addData(disk, start, piece, from, at + done)
      if (!taken) break
      done += piece
    }
    return done
  }

  #addZeros(disk: DiskSink, offset: number, length: number): boolean {
    const batch = this.#batchFor(0)
    if (batch === undefined) return false
    const last = batch.runs.at(-1)
    if (last?.disk === disk && last.at < 0 && last.offset + last.length === offset) last.length += length
    else batch.runs.push({ disk, offset, length, at: -1 })
    return true
  }

  /** A piece that lies within one chunk. Pieces that follow one another become one, up to the chunk's end. */
  #addData(disk: DiskSink, offset: number, length: number, from: Uint8Array, at: number): boolean {
    const last = this.#batch?.runs.at(-1)
    const joins =
      last?.disk === disk && last.at >= 0 && last.offset + last.length === offset && offset % CHUNK_BYTES !== 0
    // A new chunk begins only where all of it has room, so that a batch's end never cuts one.
    const batch = joins ? this.#batch : this.#batchFor(CHUNK_BYTES - (offset % CHUNK_BYTES))
    if (batch === undefined) return false
    batch.bytes ??= this.#free.pop() ?? spareBatches.take() ?? batchMemory(BATCH_BYTES, BATCH_RUNS)
    copyBytes(from, at, batch.bytes, batch.used, length)
    if (joins) last.length += length
    else batch.runs.push({ disk, offset, length, at: batch.used })
    batch.used += length
    return true
  }

  /** The batch that takes one more run and `bytes` of data; undefined when there may not be another now. */
  #batchFor(bytes: number): Batch | undefined {
    const batch = this.#batch
    if (batch !== undefined) {
      if (batch.used + bytes <= BATCH_BYTES && batch.runs.length < BATCH_RUNS) return batch
      this.#dispatch(batch)
    }
    if (this.#batches >= BATCHES) return undefined
    this.#batches++
    this.#batch = { bytes: undefined, used: 0, runs: [] }
    return this.#batch
  }

  #dispatch(batch: Batch): void {
    this.#batch = undefined
    const hashed = this.#hash(batch)
    // It is awaited in its turn; until then a failure must not count as unhandled.
    hashed.catch(() => undefined)
    this.#tail = this.#tail.then(async () => {
      try {
        await this.#take(batch, await hashed)
      } catch (error) {
        this.#fail(error)
      }
    })
  }

  async #hash({ bytes, runs }: Batch): Promise<Uint8Array | undefined> {
    if (bytes === undefined) return undefined
    const pieces = runs.filter((run) => run.at >= 0).flatMap((run) => [run.at, run.length])
    return this.#session.squeezer.hash(bytes, Uint32Array.from(pieces))
  }

  /** In the order of the batches: what is new goes on to be compressed, and the maps learn all ids. */
  async #take({ bytes, runs }: Batch, ids: Uint8Array | undefined): Promise<void> {
    if (this.#failure !== undefined) return this.#giveBack(bytes)
    const fresh: Run[] = []
    const freshIds: Uint8Array[] = []
    let idAt = 0
    for (const run of runs) {
      const builder = run.disk.builder as TreeBuilder
      if (run.at < 0 || ids === undefined) {
        await builder.clear(run.offset, run.length)
        continue
      }
      await builder.set(run.offset, run.length, ids, idAt)
      if (this.#session.packs.reserve(ids, idAt)) {
        fresh.push(run)
        freshIds.push(ids.subarray(idAt, idAt + ID_BYTES))
      }
      idAt += ID_BYTES
    }
    await this.#session.packs.room()
    if (bytes === undefined || fresh.length === 0) return this.#giveBack(bytes)
    const work = this.#compress(bytes, fresh, freshIds)
      .catch((error: unknown) => this.#fail(error))
      .finally(() => this.#compressing.delete(work))
    this.#compressing.add(work)
  }

  async #compress(
    bytes: Uint8Array<SharedArrayBuffer>,
    runs: readonly Run[],
    ids: readonly Uint8Array[],
  ): Promise<void> {
    const pieces = new Uint32Array(runs.length * PLAIN_FIELDS)
    for (const [i, run] of runs.entries()) pieces.set([run.at, run.length], i * PLAIN_FIELDS)
    const records = await this.#session.squeezer.compress(bytes, pieces, joined(ids))
    let end = 0
    let turned = 0
    for (const [i, run] of runs.entries()) {
      if (end - turned >= PACK_TURN_BYTES && !threadGuests.areIdle(performance.now())) {
        await nextTurn()
        turned = end
      }
      const [stored, codec, crc] = records.subarray(i * STORED_FIELDS, (i + 1) * STORED_FIELDS) as unknown as [
        number,
        number,
        number,
      ]
      const form = bytes.subarray(end, end + stored)
      this.#session.packs.add(ids[i] as Uint8Array, form, { stored, plain: run.length, crc, type: BLOB_CHUNK, codec })
      run.disk.storedBytes += stored
      end += stored
    }
    this.#giveBack(bytes)
  }

  #saveNode(disk: DiskSink, bytes: Uint8Array): Uint8Array {
    const { packs, vault } = this.#session
    const id = vault.idOf(bytes)
    if (packs.reserve(id, 0)) {
      const form = vault.lock(bytes, id)
      packs.add(id, form, nodeRecord(bytes.length, form))
      disk.storedBytes += form.length
    }
    return id
  }

  /** Waits for all batches. */
  async #settle(): Promise<void> {
    await this.#tail
    await Promise.all(this.#compressing)
    if (this.#failure !== undefined) throw this.#failure
  }

  #giveBack(bytes: Uint8Array<SharedArrayBuffer> | undefined): void {
    if (bytes !== undefined) this.#free.push(bytes)
    this.#batches--
    for (const wake of this.#waiters.splice(0)) wake()
  }

  #fail(error: unknown): void {
    this.#failure ??= error
    for (const wake of this.#waiters.splice(0)) wake()
  }
}

function infoOf(
  { info: { name, size, parent }, root, changedBytes, storedBytes }: DiskSink,
  labels: Readonly<Record<string, string>>,
): BackupDiskInfo {
  return {
    name,
    size,
    levels: levelsFor(size),
    root: root === undefined ? null : Buffer.from(root).toString('hex'),
    ...(parent === undefined ? {} : { parent }),
    changedBytes,
    storedBytes,
    labels,
  }
}

/** The ids one after the other, in a buffer of their own, which can be handed to another thread. */
function joined(ids: readonly Uint8Array[]): Uint8Array<ArrayBuffer> {
  const all = new Uint8Array(ids.length * ID_BYTES)
  for (const [i, id] of ids.entries()) all.set(id, i * ID_BYTES)
  return all
}

/** Makes a backup visible of which all else is durable. Kind 'timeout' when a pruning has given up waiting for it. */
export async function publish(
  { store, vault, presence }: Pick<WriterSetup, 'store' | 'vault' | 'presence'>,
  info: BackupInfo,
): Promise<void> {
  try {
    await store.put(BACKUPS + info.id, [encodeManifest(vault, info)])
  } catch (error) {
    if (isBlockError(error, 'exists')) {
      const message = `backup ${info.id} was silent for so long that a pruning gave it up: nothing of it is visible, make it again`
      throw new BlockError('timeout', message, {}, error)
    }
    // Without an answer it may be there, or come to be there late: so long as that is not known, what it needs must stay.
    if (isBlockError(error, 'io') || isBlockError(error, 'timeout')) presence.abandon()
    throw error
  }
}
