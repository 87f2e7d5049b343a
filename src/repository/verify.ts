// Verifies one backup: reads all that it refers to, and tells what is damaged and which parts of which disks that takes along.
// Each chunk is read once, however often the backup shows it.

import { DAMAGED_RANGES_MAX, READ_AHEAD_BYTES, STORE_REQUESTS } from '../base/limits.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { readBackup } from './backups.ts'
import type { BlobIndex } from './blob-index.ts'
import { ChunkReader } from './chunk-reader.ts'
import type { Core } from './core.ts'
import { DiskMap, type MapPiece } from './disk-map.ts'
import { steadily } from './inventory.ts'
import { decodeIndex } from './index-object.ts'
import { type BackupInfo, decodeConfig, rootOf } from './manifest.ts'
import { NodeReader } from './node-reader.ts'
import { packKey, readDirectory } from './pack.ts'
import { inParallel } from './parallel.ts'
import { MISSING, type Segment, segmentsBetween } from './segments.ts'
import { CONFIG_KEY, LEAF_BYTES, PACKS } from './spec.ts'

/** A part of a disk that cannot be restored, in bytes. */
export interface DamagedRange {
  readonly disk: string
  readonly offset: number
  readonly length: number
  readonly reason: string
}

/** An object of the repository that is not as it should be, though the disks may be whole. */
export interface DamagedObject {
  readonly key: string
  readonly reason: string
}

export interface VerifyReport {
  readonly backup: string
  readonly isGood: boolean
  /** Different chunks read, and their plain bytes. */
  readonly chunks: number
  readonly bytes: number
  /** Neighbours of one reason are one range. At most 10,000; `damagedBytes` counts all. */
  readonly ranges: readonly DamagedRange[]
  readonly damagedBytes: number
  readonly objects: readonly DamagedObject[]
}

/** Bytes of disk looked at, and in all. */
export type VerifyProgress = (done: number, total: number) => void

export interface VerifiedDisk {
  readonly name: string
  readonly map: DiskMap
}

/** What a verification has found so far. It reads through its own readers: nothing is taken from a cache. */
export class Verification {
  readonly #index: BlobIndex
  readonly #chunks: ChunkReader
  readonly #seen: Uint8Array
  readonly #bad = new Map<number, string>()
  readonly #ranges: { disk: string; offset: number; length: number; reason: string }[] = []
  readonly #objects: DamagedObject[] = []
  /** Packs that the backup has chunks in. */
  readonly packs = new Set<string>()
  #count = 0
  #bytes = 0
  #damagedBytes = 0

  constructor(index: BlobIndex, chunks: ChunkReader) {
    this.#index = index
    this.#chunks = chunks
    this.#seen = new Uint8Array(Math.ceil(index.count / 8))
  }

  async disk(disk: VerifiedDisk, progress: (done: number) => void): Promise<void> {
    const { size } = disk.map
    let window: Segment[] = []
    let windowStart = 0
    for (let position = 0; position < size; ) {
      const piece = await this.#pieceAt(disk, position)
      if (piece.leaf !== undefined) window.push(...segmentsBetween(piece, this.#index, position, piece.end))
      position = piece.end
      if (position - windowStart < READ_AHEAD_BYTES && position < size) continue
      await this.#check(disk.name, window)
      window = []
      windowStart = position
      progress(position)
    }
  }

  object(key: string, error: unknown): void {
    if (!(error instanceof BlockError)) throw error
    this.#objects.push({ key, reason: error.message })
  }

  report(backup: string): VerifyReport {
    return {
      backup,
      isGood: this.#damagedBytes === 0 && this.#objects.length === 0,
      chunks: this.#count,
      bytes: this.#bytes,
      ranges: this.#ranges,
      damagedBytes: this.#damagedBytes,
      objects: this.#objects,
    }
  }

  /** What a damaged node covers is damage, and is passed over as though it were zeros. */
  async #pieceAt(disk: VerifiedDisk, position: number): Promise<MapPiece> {
    try {
      return await disk.map.at(position)
    } catch (error) {
      if (!isBlockError(error)) throw error
      const { offset = position, length = LEAF_BYTES } = error.place
      const end = Math.min(disk.map.size, offset + length)
      this.#damage(disk.name, position, end - position, error.message)
      return { start: position, end, leaf: undefined }
    }
  }

  async #check(disk: string, segments: readonly Segment[]): Promise<void> {
    const fresh: number[] = []
    for (const { entry } of segments) {
      if (entry < 0 || this.#wasSeen(entry)) continue
      fresh.push(entry)
      this.#count++
      this.#bytes += this.#index.plain(entry)
      this.packs.add(this.#index.pack(entry))
    }
    await this.#chunks.load(fresh, (chunkOf) => {
      for (const entry of fresh) {
        const chunk = chunkOf(entry)
        if (chunk instanceof BlockError) this.#bad.set(entry, chunk.message)
      }
      return undefined
    })
    for (const { entry, offset, length } of segments) {
      const reason = entry === MISSING ? 'its chunk is in no pack: packs are missing' : this.#bad.get(entry)
      if (reason !== undefined) this.#damage(disk, offset, length, reason)
    }
  }

  #wasSeen(entry: number): boolean {
    const bit = 1 << (entry & 7)
    const seen = ((this.#seen[entry >>> 3] as number) & bit) !== 0
    this.#seen[entry >>> 3] = (this.#seen[entry >>> 3] as number) | bit
    return seen
  }

  #damage(disk: string, offset: number, length: number, reason: string): void {
    this.#damagedBytes += length
    const last = this.#ranges.at(-1)
    if (last?.disk === disk && last.reason === reason && last.offset + last.length === offset) last.length += length
    else if (this.#ranges.length < DAMAGED_RANGES_MAX) this.#ranges.push({ disk, offset, length, reason })
  }
}

/** Reads all that the backup refers to. Damage is in the report; what fails is what cannot be looked at, the manifest above all. */
export function verifyBackup(core: Core, id: string, progress: VerifyProgress): Promise<VerifyReport> {
  return steadily(
    core.inventory,
    async ({ blobs }) => {
      const info = await readBackup(core, id)
      await core.inventory.refresh()
      return verifyWith(core, blobs, info, progress)
    },
    ({ isGood }) => isGood,
  )
}

async function verifyWith(
  core: Core,
  blobs: BlobIndex,
  info: BackupInfo,
  progress: VerifyProgress,
): Promise<VerifyReport> {
  const { store, vault, inventory, squeezer } = core
  const nodes = new NodeReader(store, vault, blobs)
  const verification = new Verification(blobs, new ChunkReader(store, blobs, squeezer))
  const total = info.disks.reduce((sum, disk) => sum + disk.size, 0)
  let before = 0
  for (const disk of info.disks) {
    const map = new DiskMap(disk.size, rootOf(disk), nodes)
    await verification.disk({ name: disk.name, map }, (done) => progress(before + done, total))
    before += disk.size
  }
  const packs = new Set([...verification.packs, ...nodes.packs])
  const check = async (key: string, look: () => Promise<unknown>): Promise<void> => {
    await look().catch((error: unknown) => verification.object(key, error))
  }
  await check(CONFIG_KEY, async () => decodeConfig(await store.get(CONFIG_KEY), store.name))
  await inParallel([...packs], STORE_REQUESTS, (pack) => check(packKey(pack), () => readDirectory(store, vault, pack)))
  await inParallel(inventory.indexesOf(packs), STORE_REQUESTS, (key) =>
    check(key, async () => {
      const bytes = await store.get(key).catch((error: unknown) => {
        // A copy of directories, which a pruning has put into another one meanwhile.
        if (isBlockError(error, 'not-found')) return undefined
        throw error
      })
      if (bytes !== undefined) decodeIndex(vault, bytes, `${store.name}: ${key}`)
    }),
  )
  for (const [key, error] of inventory.damaged) {
    if (!packs.has(key.slice(PACKS.length))) verification.object(key, error)
  }
  return verification.report(info.id)
}
