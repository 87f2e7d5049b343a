// A repository: the backups in an object store. Opens it, begins and lists backups, opens and verifies one. It knows bytes,
// offsets and sizes, and no devices or jobs: who writes a backup drives its writer, who restores one reads its devices.
//
//   const repository = await openRepository(store)
//   const writer = await repository.begin({ machine, moment, kind: 'full', disks: [{ name, size }] })
//   await writer.disk(0).write(offset, length, from, at)
//   const { id } = await writer.finish()
//   const reader = await repository.openBackup(id)          reader.disks[0].device is a read-only BlockDevice

import { systemClock } from '../base/clock.ts'
import { STORE_REQUESTS } from '../base/limits.ts'
import type { BlockDevice } from '../block/device.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { guard } from '../block/guard.ts'
import { BackupDevice } from './backup-device.ts'
import { BlobIndex } from './blob-index.ts'
import { ChunkReader } from './chunk-reader.ts'
import { DiskMap } from './disk-map.ts'
import { decodeIndex } from './index-object.ts'
import {
  type BackupDiskInfo,
  type BackupInfo,
  decodeConfig,
  decodeManifest,
  encodeConfig,
  isBackupId,
  newBackupId,
  newConfig,
  type RepositoryConfig,
} from './manifest.ts'
import { NodeReader } from './node-reader.ts'
import { packKey, readDirectory } from './pack.ts'
import { PackWriter } from './pack-writer.ts'
import { BACKUPS, CONFIG_KEY, FORMAT_VERSION, GRANULE_BYTES, INDEXES, PACKS } from './spec.ts'
import type { Squeezer } from './squeezer.ts'
import { mendedSink, type ObjectStore } from './store.ts'
import { DISK_BYTES_MAX } from './tree.ts'
import { TreeBuilder } from './tree-builder.ts'
import { Verification, type VerifyProgress, type VerifyReport } from './verify.ts'
import { WorkerSqueezer } from './worker-squeezer.ts'
import { type BackupWriter, beginBackup, type SessionDisk } from './writer.ts'

export type { BackupDiskInfo, BackupInfo } from './manifest.ts'
export type { DamagedObject, DamagedRange, VerifyProgress, VerifyReport } from './verify.ts'
export type { BackupNotes, BackupWriter, DiskWriter } from './writer.ts'

export interface RepositoryOptions {
  /** Does the hashing and compressing; threads of the repository's own unless told. The repository closes it. */
  readonly squeezer?: Squeezer
  /** Milliseconds since 1970. */
  readonly now?: () => number
  /** Written into manifests: program and version. */
  readonly tool?: string
}

/** A disk to be backed up. With a parent, what is not written stays as it is there, cut or followed by zeros. */
export interface BackupDisk {
  readonly name: string
  /** Bytes. */
  readonly size: number
  readonly parent?: { readonly backup: string; readonly disk: string }
}

export interface BackupRequest {
  readonly machine: string
  /** When the disks were as they will be written, in milliseconds since 1970. */
  readonly moment: number
  readonly kind: 'full' | 'incremental'
  readonly disks: readonly BackupDisk[]
}

/** All manifests: the readable in the order of their moments, newest last, and those that are damaged. */
export interface BackupList {
  readonly backups: readonly BackupInfo[]
  readonly damaged: readonly { readonly id: string; readonly reason: string }[]
}

/** An open backup. Its devices share caches; close it when they are no longer read. */
export interface BackupReader {
  readonly info: BackupInfo
  readonly disks: readonly { readonly name: string; readonly size: number; readonly device: BlockDevice }[]
  close(): Promise<void>
}

export interface RepositoryStats {
  readonly backups: number
  /** Sizes of all disks in all backups, and of all objects in the store, in bytes. */
  readonly logicalBytes: number
  readonly storedBytes: number
  readonly packs: number
  readonly blobs: number
}

/** Makes a repository in an empty store. Kind 'exists' when there is one. */
export async function initRepository(store: ObjectStore, options: RepositoryOptions = {}): Promise<Repository> {
  const config = newConfig(options.now?.() ?? systemClock.wall())
  try {
    await store.put(CONFIG_KEY, [encodeConfig(config)])
  } catch (error) {
    if (!isBlockError(error, 'exists')) throw error
    throw new BlockError('exists', `${store.name} is a repository already: use it as it is`, error.place, error)
  }
  return openRepository(store, options)
}

/** Kinds 'not-found' when there is no repository, 'invalid-format' when this Varve cannot read it, 'corrupt'. */
export async function openRepository(store: ObjectStore, options: RepositoryOptions = {}): Promise<Repository> {
  let content: Uint8Array
  try {
    content = await store.get(CONFIG_KEY)
  } catch (error) {
    if (!isBlockError(error, 'not-found')) throw error
    const message = `${store.name} is no repository: make one with \`varve repo init ${store.name}\``
    throw new BlockError('not-found', message, error.place, error)
  }
  const repository = new Repository(store, decodeConfig(content, store.name), options)
  await repository.refresh()
  return repository
}

export class Repository {
  readonly store: ObjectStore
  readonly #config: RepositoryConfig
  readonly #squeezer: Squeezer
  readonly #now: () => number
  readonly #tool: string
  readonly #blobs = new BlobIndex()
  /** Indexes that were read, and which one names a pack. */
  readonly #indexes = new Set<string>()
  readonly #indexOfPack = new Map<string, string>()
  /** Indexes and packs that cannot be used, and why. */
  readonly #damaged = new Map<string, BlockError>()

  /** Use initRepository or openRepository. */
  constructor(store: ObjectStore, config: RepositoryConfig, options: RepositoryOptions) {
    this.store = store
    this.#config = config
    this.#squeezer = options.squeezer ?? new WorkerSqueezer()
    this.#now = options.now ?? (() => systemClock.wall())
    this.#tool = options.tool ?? 'varve'
  }

  get id(): string {
    return this.#config.id
  }

  /** Learns of the packs that came since: through indexes, and of packs that no index names from themselves. */
  async refresh(): Promise<void> {
    const indexes = (await this.store.list(INDEXES)).filter((key) => !this.#indexes.has(key) && !this.#damaged.has(key))
    await inParallel(indexes, (key) => this.#orDamaged(key, () => this.#readIndex(key)))
    const names = (await this.store.list(PACKS)).map((key) => key.slice(PACKS.length))
    const packs = names.filter((pack) => !this.#blobs.hasPack(pack) && !this.#damaged.has(packKey(pack)))
    await inParallel(packs, (pack) =>
      this.#orDamaged(packKey(pack), async () => this.#blobs.addPack(await readDirectory(this.store, pack))),
    )
  }

  /** The backups that can be read, newest last. Who shows them to people uses `list`, which names the damaged ones too. */
  async backups(): Promise<readonly BackupInfo[]> {
    return (await this.list()).backups
  }

  async list(): Promise<BackupList> {
    const backups: BackupInfo[] = []
    const damaged: { id: string; reason: string }[] = []
    await inParallel(await this.store.list(BACKUPS), async (key) => {
      const id = key.slice(BACKUPS.length)
      try {
        backups.push(decodeManifest(await this.store.get(key), id, this.store.name))
      } catch (error) {
        // Removed since it was listed: then it is no backup any more.
        if (isBlockError(error, 'not-found')) return
        if (!isBlockError(error)) throw error
        damaged.push({ id, reason: error.message })
      }
    })
    backups.sort((a, b) => a.moment - b.moment || (a.id < b.id ? -1 : 1))
    return { backups, damaged }
  }

  /** What one backup says of itself. Kind 'not-found', or 'corrupt'. */
  async backup(id: string): Promise<BackupInfo> {
    const missing = `${this.store.name} has no backup ${id}: \`varve backups\` lists those that it has`
    if (!isBackupId(id)) throw new BlockError('not-found', missing)
    try {
      return decodeManifest(await this.store.get(BACKUPS + id), id, this.store.name)
    } catch (error) {
      throw isBlockError(error, 'not-found') ? new BlockError('not-found', missing, error.place, error) : error
    }
  }

  /**
   * Begins a backup, which nobody sees before its `finish`. Several may be in the making at once. What the store cannot take is put
   * again whenever `mend` resolves; when it throws, and unless told, the backup fails.
   */
  async begin(request: BackupRequest, mend?: (error: unknown) => Promise<void>): Promise<BackupWriter> {
    checkRequest(request)
    await this.refresh()
    const nodes = new NodeReader(this.store, this.#blobs)
    const disks: SessionDisk[] = []
    for (const disk of request.disks) disks.push(await this.#sessionDisk(disk, nodes))
    const { machine, moment, kind } = request
    const sink = mend === undefined ? this.store : mendedSink(this.store, mend)
    return beginBackup({
      store: sink,
      squeezer: this.#squeezer,
      packs: new PackWriter(sink, this.#blobs),
      disks,
      now: this.#now,
      manifest: {
        format: FORMAT_VERSION,
        id: newBackupId(moment),
        repository: this.id,
        machine,
        moment,
        kind,
        tool: this.#tool,
        startedMs: this.#now(),
      },
    })
  }

  async openBackup(id: string): Promise<BackupReader> {
    const info = await this.backup(id)
    await this.refresh()
    const nodes = new NodeReader(this.store, this.#blobs)
    const chunks = new ChunkReader(this.store, this.#blobs, this.#squeezer)
    const disks = info.disks.map((disk) => {
      const map = new DiskMap(disk.size, rootOf(disk), nodes)
      const device = guard(new BackupDevice(`backup ${id}, disk ${disk.name}`, map, this.#blobs, chunks))
      return { name: disk.name, size: disk.size, device }
    })
    const close = async (): Promise<void> => {
      for (const disk of disks) await disk.device.close()
    }
    return { info, disks, close }
  }

  /** Reads all that the backup refers to. Damage is in the report; what fails is what cannot be looked at, the manifest above all. */
  async verify(id: string, progress: VerifyProgress = () => undefined): Promise<VerifyReport> {
    const info = await this.backup(id)
    await this.refresh()
    const nodes = new NodeReader(this.store, this.#blobs)
    const verification = new Verification(this.#blobs, new ChunkReader(this.store, this.#blobs, this.#squeezer))
    const total = info.disks.reduce((sum, disk) => sum + disk.size, 0)
    let before = 0
    for (const disk of info.disks) {
      const map = new DiskMap(disk.size, rootOf(disk), nodes)
      await verification.disk({ name: disk.name, map }, (done) => progress(before + done, total))
      before += disk.size
    }
    const packs = [...new Set([...verification.packs, ...nodes.packs])]
    const indexes = new Set(packs.map((pack) => this.#indexOfPack.get(pack)).filter((key) => key !== undefined))
    const check = async (key: string, look: () => Promise<unknown>): Promise<void> => {
      await look().catch((error: unknown) => verification.object(key, error))
    }
    await check(CONFIG_KEY, async () => decodeConfig(await this.store.get(CONFIG_KEY), this.store.name))
    await inParallel(packs, (pack) => check(packKey(pack), () => readDirectory(this.store, pack)))
    await inParallel([...indexes], (key) =>
      check(key, async () => decodeIndex(await this.store.get(key), this.#where(key))),
    )
    for (const [key, error] of this.#damaged)
      if (!packs.includes(key.slice(PACKS.length))) verification.object(key, error)
    return verification.report(id)
  }

  async stats(): Promise<RepositoryStats> {
    const { backups, damaged } = await this.list()
    await this.refresh()
    let storedBytes = 0
    await inParallel(await this.store.list(''), async (key) => {
      const status = await this.store.status(key)
      storedBytes += status?.size ?? 0
    })
    const disks = backups.flatMap((backup) => backup.disks)
    return {
      backups: backups.length + damaged.length,
      logicalBytes: disks.reduce((sum, disk) => sum + disk.size, 0),
      storedBytes,
      packs: this.#blobs.packs,
      blobs: this.#blobs.count,
    }
  }

  /** Ends the repository's threads. Backups in the making fail. */
  async close(): Promise<void> {
    await this.#squeezer.close()
  }

  #where(key: string): string {
    return `${this.store.name}: ${key}`
  }

  async #readIndex(key: string): Promise<void> {
    const directories = decodeIndex(await this.store.get(key), this.#where(key))
    for (const directory of directories) {
      this.#blobs.addPack(directory)
      this.#indexOfPack.set(directory.pack, key)
    }
    this.#indexes.add(key)
  }

  /** One bad index or pack does not close the repository: what can be read without it can be read. `verify` tells of it. */
  async #orDamaged(key: string, work: () => Promise<void>): Promise<void> {
    try {
      await work()
    } catch (error) {
      if (!isBlockError(error, 'corrupt') && !isBlockError(error, 'not-found')) throw error
      this.#damaged.set(key, error)
    }
  }

  async #sessionDisk(disk: BackupDisk, nodes: NodeReader): Promise<SessionDisk> {
    const parent = disk.parent && (await this.#parentOf(disk, disk.parent))
    const tree = parent && { root: rootOf(parent), size: parent.size }
    return {
      name: disk.name,
      size: disk.size,
      ...(disk.parent === undefined ? {} : { parent: disk.parent }),
      builder: (save) =>
        TreeBuilder.begin(disk.size, { load: (ids, at, level) => nodes.load(ids, at, level), save }, tree),
    }
  }

  async #parentOf(disk: BackupDisk, parent: { backup: string; disk: string }): Promise<BackupDiskInfo> {
    const info = await this.backup(parent.backup)
    const found = info.disks.find((candidate) => candidate.name === parent.disk)
    if (found === undefined) {
      const names = info.disks.map((candidate) => candidate.name).join(', ')
      throw new BlockError('not-found', `backup ${parent.backup} has no disk ${parent.disk}, only ${names}`)
    }
    // The granule at the cut would keep what was behind the cut, and show it when the disk grows again.
    if (disk.size < found.size && disk.size % GRANULE_BYTES !== 0) {
      const message = `${disk.name} shrank to ${disk.size} bytes, no multiple of ${GRANULE_BYTES}: back it up without a parent`
      throw new BlockError('unsupported', message, { device: disk.name })
    }
    return found
  }
}

function rootOf(disk: BackupDiskInfo): Uint8Array | undefined {
  return disk.root === null ? undefined : Buffer.from(disk.root, 'hex')
}

function checkRequest({ machine, moment, disks }: BackupRequest): void {
  const bad = (message: string): BlockError => new BlockError('invalid-argument', message)
  if (machine === '') throw bad('a backup needs the name of its machine')
  if (!Number.isSafeInteger(moment) || moment < 0 || moment >= Date.UTC(9999, 0)) throw bad(`${moment} is no moment`)
  if (disks.length === 0) throw bad(`a backup of ${machine} needs at least one disk`)
  const names = new Set<string>()
  for (const { name, size } of disks) {
    if (name === '' || names.has(name))
      throw bad(`${machine}: disks have different names, and "${name}" is given twice or empty`)
    if (!Number.isSafeInteger(size) || size < 0 || size > DISK_BYTES_MAX) {
      throw bad(`${name}: a disk in a backup has from 0 to ${DISK_BYTES_MAX} bytes, not ${size}`)
    }
    names.add(name)
  }
}

/** Runs `work` on all items, a bounded number at a time. */
async function inParallel<T>(items: readonly T[], work: (item: T) => Promise<void>): Promise<void> {
  let next = 0
  const runner = async (): Promise<void> => {
    while (next < items.length) await work(items[next++] as T)
  }
  await Promise.all(Array.from({ length: Math.min(STORE_REQUESTS, items.length) }, runner))
}
