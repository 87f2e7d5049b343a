// Copies backups from one repository to another, which may have other keys: walks the maps, and stores what the target does not have.
// Where both name content alike, nodes stay as they are; else each node is made anew with the names that its children have there.

import { Breather } from '../base/breather.ts'
import { BATCH_BYTES } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import { readBackup, readBackups, tagBackup } from './backups.ts'
import { type BlobIndex, NO_ENTRY } from './blob-index.ts'
import { ChunkReader } from './chunk-reader.ts'
import type { Core } from './core.ts'
import { steadily } from './inventory.ts'
import { type BackupDiskInfo, type BackupInfo, isPart, newBackupId, rootOf } from './manifest.ts'
import { NodeReader } from './node-reader.ts'
import { nodeRecord, PackWriter } from './pack-writer.ts'
import { Session } from './session.ts'
import { BLOB_CHUNK, FANOUT, ID_BYTES, LEAF_HEADER_BYTES, SEGMENT_BYTES } from './spec.ts'
import { batchMemory, PLAIN_FIELDS, STORED_FIELDS } from './squeezer.ts'
import { childAt } from './tree.ts'
import { publish } from './writer.ts'

/** Ids there and here; `storedBytes` is what the target grew by. Without `to` it was there already. */
export interface CopiedBackup {
  readonly from: string
  readonly to?: string
  readonly storedBytes: number
}

export interface CopyOptions {
  /** All that are not there yet, unless told. */
  readonly backups?: readonly string[]
  /** Is told of each backup that is done, and of how many. */
  readonly progress?: (done: number, total: number) => void
}

/** Kind 'not-found' for a backup that is not there; 'corrupt' for one that cannot be read as a whole, of which nothing is visible then. */
export async function copyBackups(source: Core, target: Core, options: CopyOptions = {}): Promise<CopiedBackup[]> {
  if (source.config.id === target.config.id) {
    throw new BlockError('invalid-argument', `${source.store.name} and ${target.store.name} are one repository`)
  }
  const chosen = await choose(source, options.backups)
  const { backups, forgotten } = await readBackups(target)
  const there = new Set(backups.filter(({ id }) => !forgotten.has(id)).map(originOf))
  const { tags } = await readBackups(source)
  await source.inventory.refresh()
  const done: CopiedBackup[] = []
  let run: CopyRun | undefined
  for (const info of chosen) {
    options.progress?.(done.length, chosen.length)
    if (there.has(originOf(info))) done.push({ from: info.id, storedBytes: 0 })
    else {
      const copied = await steadily(source.inventory, ({ blobs }) => {
        if (run?.blobs !== blobs || run.known !== blobs.count) run = new CopyRun(source, target, blobs)
        return run.backup(info)
      })
      await tagBackup(target, copied.id, { add: tags.get(info.id) ?? [] })
      done.push({ from: info.id, to: copied.id, storedBytes: copied.storedBytes })
    }
  }
  options.progress?.(done.length, chosen.length)
  return done
}

async function choose(source: Core, ids: readonly string[] | undefined): Promise<BackupInfo[]> {
  if (ids !== undefined) return Promise.all(ids.map((id) => readBackup(source, id)))
  const { backups, damaged, forgotten } = await readBackups(source)
  const bad = damaged.find(({ id }) => !forgotten.has(id))
  if (bad !== undefined) throw new BlockError('corrupt', `${bad.reason}: say which backups to copy`)
  return backups.filter((info) => !forgotten.has(info.id) && !isPart(info))
}

/** Where a backup was first made, however often it was copied since. */
function originOf({ origin, repository, id }: BackupInfo): string {
  return origin === undefined ? `${repository}/${id}` : `${origin.repository}/${origin.backup}`
}

/** Several backups in a row: what one of them brought over is not looked at again for the next. */
class CopyRun {
  readonly #source: Core
  readonly #target: Core
  readonly blobs: BlobIndex
  /** Entries of the index when this began. */
  readonly known: number
  readonly #nodes: NodeReader
  readonly #chunks: ChunkReader
  /** By entry of the source: what is there, and, where names differ, its name there. */
  readonly #there: Uint8Array
  readonly #names: Uint8Array | undefined
  readonly #copies: string[] = []
  readonly #breather = new Breather()

  constructor(source: Core, target: Core, blobs: BlobIndex) {
    this.#source = source
    this.#target = target
    this.blobs = blobs
    this.known = blobs.count
    this.#nodes = new NodeReader(source.store, source.vault, blobs)
    this.#chunks = new ChunkReader(source.store, blobs, source.squeezer)
    this.#there = new Uint8Array(Math.ceil(blobs.count / 8))
    const isAlike = !source.vault.isEncrypted && !target.vault.isEncrypted
    this.#names = isAlike ? undefined : new Uint8Array(blobs.count * ID_BYTES)
  }

  async backup(info: BackupInfo): Promise<BackupInfo> {
    const { store, vault, config, inventory, now } = this.#target
    const id = newBackupId(info.moment)
    // The copies made before must stay: what they brought is taken as being there.
    const session = await Session.begin(this.#target, { id, kind: 'backup', parents: this.#copies })
    try {
      const { blobs, marks } = await inventory.refresh()
      await session.sees([...marks.keys()])
      for (const copy of this.#copies) await readBackup(this.#target, copy)
      const load = new Load(this.#target, new PackWriter(store, vault, blobs, id.slice(-8), inventory))
      const disks: BackupDiskInfo[] = []
      for (const disk of info.disks) {
        const { parent: _parent, ...rest } = disk
        const root = rootOf(disk)
        const name = root && (await this.#node(load, root, 0, disk.levels))
        disks.push({ ...rest, root: name === undefined ? null : Buffer.from(name).toString('hex') })
      }
      await load.finish()
      const copy: BackupInfo = {
        ...info,
        id,
        repository: config.id,
        origin: info.origin ?? { repository: info.repository, backup: info.id },
        finishedMs: now(),
        storedBytes: load.packs.storedBytes,
        disks,
      }
      await publish({ store, vault, presence: session }, copy)
      this.#copies.push(id)
      return copy
    } finally {
      await session.end()
    }
  }

  /** Brings over what is below the node, and the node; returns its name there. */
  async #node(load: Load, ids: Uint8Array, at: number, level: number): Promise<Uint8Array> {
    const known = this.#known(ids, at)
    if (known !== undefined) return known
    const id = ids.slice(at, at + ID_BYTES)
    const bytes = Uint8Array.from(await this.#nodes.load(id, 0, level))
    await this.#breather.pause()
    if (level === 0) await this.#leaf(load, bytes)
    for (let child = 0; level > 0 && child < FANOUT; child++) {
      const childIdAt = childAt(bytes, child)
      if (childIdAt >= 0) bytes.set(await this.#node(load, bytes, childIdAt, level - 1), childIdAt)
    }
    const name = this.#target.vault.idOf(bytes)
    load.node(name, bytes)
    this.#note(this.blobs.find(id, 0), name)
    return name
  }

  /** Brings over the chunks of a leaf, and puts their names there in place of those here. */
  async #leaf(load: Load, leaf: Uint8Array): Promise<void> {
    const wanted: number[] = []
    for (let at = LEAF_HEADER_BYTES; at < leaf.length; at += SEGMENT_BYTES) {
      if (this.#known(leaf, at + 3) !== undefined) continue
      const entry = this.blobs.find(leaf, at + 3)
      if (entry === NO_ENTRY)
        throw new BlockError('corrupt', `${this.#source.store.name}: a chunk is in no pack: packs are missing`)
      // Where names are alike, what is there need not be read here.
      if (this.#names === undefined && load.has(leaf, at + 3))
        this.#note(entry, leaf.subarray(at + 3, at + 3 + ID_BYTES))
      else wanted.push(entry)
    }
    await this.#chunks.load(wanted, async (chunkOf) => {
      for (const entry of new Set(wanted)) {
        const chunk = chunkOf(entry)
        if (chunk instanceof BlockError) throw chunk
        const name = this.#target.vault.idOf(chunk)
        await load.chunk(name, chunk)
        this.#note(entry, name)
      }
    })
    for (let at = LEAF_HEADER_BYTES; at < leaf.length; at += SEGMENT_BYTES) {
      leaf.set(this.#known(leaf, at + 3) as Uint8Array, at + 3)
    }
  }

  /** The name there, when it is there. */
  #known(ids: Uint8Array, at: number): Uint8Array | undefined {
    const entry = this.blobs.find(ids, at)
    if (entry === NO_ENTRY || ((this.#there[entry >>> 3] as number) & (1 << (entry & 7))) === 0) return undefined
    return this.#names === undefined
      ? ids.subarray(at, at + ID_BYTES)
      : this.#names.subarray(entry * ID_BYTES, (entry + 1) * ID_BYTES)
  }

  #note(entry: number, name: Uint8Array): void {
    this.#there[entry >>> 3] = (this.#there[entry >>> 3] as number) | (1 << (entry & 7))
    this.#names?.set(name, entry * ID_BYTES)
  }
}

/** What one backup brings over: chunks are gathered, compressed many at a time, and packed. */
class Load {
  readonly packs: PackWriter
  readonly #target: Core
  #chunks: { readonly name: Uint8Array; readonly bytes: Uint8Array }[] = []
  #bytes = 0

  constructor(target: Core, packs: PackWriter) {
    this.#target = target
    this.packs = packs
  }

  has(ids: Uint8Array, at: number): boolean {
    return this.packs.has(ids, at)
  }

  node(name: Uint8Array, bytes: Uint8Array): void {
    if (!this.packs.reserve(name, 0)) return
    const form = this.#target.vault.lock(bytes, name)
    this.packs.add(name, form, nodeRecord(bytes.length, form))
  }

  async chunk(name: Uint8Array, bytes: Uint8Array): Promise<void> {
    if (!this.packs.reserve(name, 0)) return
    // A copy: the reader's memory is for other chunks next.
    this.#chunks.push({ name, bytes: bytes.slice() })
    this.#bytes += bytes.length
    if (this.#bytes >= BATCH_BYTES) await this.#squeeze()
  }

  async finish(): Promise<void> {
    await this.#squeeze()
    await this.packs.finish()
  }

  async #squeeze(): Promise<void> {
    const chunks = this.#chunks
    if (chunks.length === 0) return
    this.#chunks = []
    const bytes = batchMemory(this.#bytes, chunks.length)
    this.#bytes = 0
    const pieces = new Uint32Array(chunks.length * PLAIN_FIELDS)
    const ids = new Uint8Array(chunks.length * ID_BYTES)
    let end = 0
    for (const [i, chunk] of chunks.entries()) {
      bytes.set(chunk.bytes, end)
      pieces.set([end, chunk.bytes.length], i * PLAIN_FIELDS)
      ids.set(chunk.name, i * ID_BYTES)
      end += chunk.bytes.length
    }
    const records = await this.#target.squeezer.compress(bytes, pieces, ids)
    let at = 0
    for (const [i, { name, bytes: plain }] of chunks.entries()) {
      const length = records[i * STORED_FIELDS] as number
      const codec = records[i * STORED_FIELDS + 1] as number
      const crc = records[i * STORED_FIELDS + 2] as number
      const record = { stored: length, plain: plain.length, crc, type: BLOB_CHUNK, codec }
      this.packs.add(name, bytes.subarray(at, at + length), record)
      at += length
    }
    const room = this.packs.room()
    if (room !== undefined) await room
  }
}
