// A repository: the backups in an object store. Opens it, begins and lists backups, opens and verifies one, and hands the housekeeping
// to whoever does it. It knows bytes, offsets and sizes, and no devices or jobs: who writes a backup drives its writer, who
// restores one reads its devices.
//
//   const repository = await openRepository(store)
//   const writer = await repository.begin({ machine, moment, kind: 'full', disks: [{ name, size }] })
//   await writer.disk(0).write(offset, length, from, at)
//   const { id } = await writer.finish()
//   const reader = await repository.openBackup(id)          reader.disks[0].device is a read-only BlockDevice

import os from 'node:os'
import { systemClock } from '../base/clock.ts'
import type { BlockDevice } from '../block/device.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { guard } from '../block/guard.ts'
import { BackupDevice } from './backup-device.ts'
import { type BackupList, forgetBackup, listBackups, readBackup, tagBackup } from './backups.ts'
import type { BlobIndex } from './blob-index.ts'
import { type CheckOptions, type CheckReport, checkRepository } from './check.ts'
import { ChunkReader } from './chunk-reader.ts'
import { type CopiedBackup, copyBackups, type CopyOptions } from './copy.ts'
import type { Core } from './core.ts'
import { visitDifferences } from './differences.ts'
import { DiskMap } from './disk-map.ts'
import { Inventory, type TablePlace } from './inventory.ts'
import { addKey, type Credential, type KeyInfo, listKeys, newSecret, openSecret, removeKey } from './key-box.ts'
import { LocalFirst, type LocalFirstOptions } from './local-first.ts'
import {
  type BackupDiskInfo,
  type BackupInfo,
  decodeConfig,
  encodeConfig,
  newBackupId,
  newConfig,
  type RepositoryConfig,
  rootOf,
} from './manifest.ts'
import { NodeReader } from './node-reader.ts'
import { PackWriter } from './pack-writer.ts'
import { type PruneOptions, type PruneReport, prune } from './prune.ts'
import { type RepairReport, repairRepository } from './repair.ts'
import { RenewingDevice } from './renewing-device.ts'
import { Session } from './session.ts'
import { CONFIG_KEY, FORMAT_VERSION, GRANULE_BYTES } from './spec.ts'
import type { Squeezer } from './squeezer.ts'
import { repositoryStats, type RepositoryStats } from './stats.ts'
import { mendedSink, type ObjectStore } from './store.ts'
import { AppendOnlyStore } from './stores/append-only.ts'
import { DISK_BYTES_MAX } from './tree.ts'
import { TreeBuilder } from './tree-builder.ts'
import { PLAIN_VAULT, Vault } from './vault.ts'
import { type VerifyProgress, type VerifyReport, verifyBackup } from './verify.ts'
import { WorkerSqueezer } from './worker-squeezer.ts'
import { type BackupWriter, beginBackup, type SessionDisk } from './writer.ts'

export type { BackupList } from './backups.ts'
export type { CheckOptions, CheckReport, HitBackup } from './check.ts'
export type { CopiedBackup, CopyOptions } from './copy.ts'
export type { Credential, KeyInfo } from './key-box.ts'
export { type BackupDiskInfo, type BackupInfo, newBackupId, PART_OF } from './manifest.ts'
export type { PruneOptions, PruneReport } from './prune.ts'
export type { RepairReport } from './repair.ts'
export type { Retention } from './retention.ts'
export type { RepositoryStats } from './stats.ts'
export type { DamagedObject, DamagedRange, VerifyProgress, VerifyReport } from './verify.ts'
export type { BackupNotes, BackupWriter, DiskWriter } from './writer.ts'

export interface RepositoryOptions {
  /** Makes what does the hashing and compressing; threads of the repository's own unless told. The repository closes it. */
  readonly squeezer?: (vault: Vault) => Squeezer
  /** Milliseconds since 1970. */
  readonly now?: () => number
  /** Written into manifests: program and version. */
  readonly tool?: string
  /** What opens it when it is encrypted. A repository that is not is then refused: somebody may have put it in its place. */
  readonly credential?: Credential
  /** This client may add and not take away. */
  readonly appendOnly?: boolean
  /** Where this host keeps what does not fit into memory of the index of the repository with this id; without it all is in memory. */
  readonly tables?: (repository: string) => TablePlace
}

/** A disk of a backup, by its name there. */
export interface BackupDiskName {
  readonly backup: string
  readonly disk: string
}

/** A disk to be backed up. With a parent, what is not written stays as it is there, cut or followed by zeros. */
export interface BackupDisk {
  readonly name: string
  /** Bytes. */
  readonly size: number
  readonly parent?: { readonly backup: string; readonly disk: string }
}

export interface BackupRequest {
  /** A new one of newBackupId; made unless given. */
  readonly id?: string
  readonly machine: string
  /** When the disks were as they will be written, in milliseconds since 1970. */
  readonly moment: number
  readonly kind: 'full' | 'incremental'
  readonly disks: readonly BackupDisk[]
}

/** What keeps a backup from going. `end` lets it go; `abandon` leaves it held, for a process that takes it over. */
export type BackupHold = Pick<Session, 'id' | 'end' | 'abandon'>

/** An open backup. Its devices share caches; close it when they are no longer read. */
export interface BackupReader {
  readonly info: BackupInfo
  readonly disks: readonly OpenDisk[]
  close(): Promise<void>
}

export interface OpenDisk {
  readonly name: string
  /** Bytes. */
  readonly size: number
  readonly device: BlockDevice
  /** The same for who has a device that is much like it, of that size or larger: what is in that is not fetched. Closing it is not needed. */
  readonly besides: (local: BlockDevice) => LocalFirst
}

/** Makes a repository in an empty store, an encrypted one with a credential. Kind 'exists' when there is one. */
export async function initRepository(store: ObjectStore, options: RepositoryOptions = {}): Promise<Repository> {
  const { credential, now = () => systemClock.wall() } = options
  const config = newConfig(now(), credential === undefined ? 'none' : 'aes-256-gcm')
  const exists = (cause?: unknown): BlockError =>
    new BlockError('exists', `${store.name} is a repository already: use it as it is`, { path: store.name }, cause)
  if ((await store.status(CONFIG_KEY)) !== undefined) throw exists()
  // The key is there before the config says that one is needed.
  if (credential !== undefined) {
    await addKey(store, config.id, newSecret(), { credential, label: 'first', nowMs: now() })
  }
  try {
    await store.put(CONFIG_KEY, [encodeConfig(config)])
  } catch (error) {
    throw isBlockError(error, 'exists') ? exists(error) : error
  }
  return openRepository(store, options)
}

/**
 * Kinds 'not-found' when there is no repository, 'invalid-format' when this Varve cannot read it, 'corrupt', 'permission' when it is
 * encrypted and the credential is missing or another.
 */
export async function openRepository(store: ObjectStore, options: RepositoryOptions = {}): Promise<Repository> {
  let content: Uint8Array
  try {
    content = await store.get(CONFIG_KEY)
  } catch (error) {
    if (!isBlockError(error, 'not-found')) throw error
    const message = `${store.name} is no repository: make one with \`varve repo init ${store.name}\``
    throw new BlockError('not-found', message, error.place, error)
  }
  const config = decodeConfig(content, store.name)
  const vault = await openVault(store, config, options.credential)
  const core: Core = {
    store: options.appendOnly === true ? new AppendOnlyStore(store) : store,
    vault,
    config,
    inventory: new Inventory(store, vault, options.tables?.(config.id)),
    squeezer: options.squeezer?.(vault) ?? new WorkerSqueezer(vault),
    now: options.now ?? (() => systemClock.wall()),
    tool: options.tool ?? 'varve',
    holder: `process ${process.pid} on ${os.hostname()}`,
  }
  try {
    await core.inventory.refresh()
  } catch (error) {
    await core.squeezer.close()
    await core.inventory.close()
    throw error
  }
  return new Repository(core)
}

async function openVault(store: ObjectStore, config: RepositoryConfig, credential?: Credential): Promise<Vault> {
  const isEncrypted = config.encryption !== 'none'
  if (isEncrypted && credential !== undefined) return new Vault(await openSecret(store, config.id, credential))
  if (!isEncrypted && credential === undefined) return PLAIN_VAULT
  const message = isEncrypted
    ? `${store.name} is encrypted: give its passphrase with --passphrase-file or VARVE_PASSPHRASE_FILE, or its key with --key-file or VARVE_KEY_FILE`
    : `${store.name} is not encrypted, and a passphrase or key was given for it: leave that out if it is meant to be so`
  throw new BlockError('permission', message, { path: store.name })
}

export class Repository {
  readonly #core: Core

  /** Use initRepository or openRepository. */
  constructor(core: Core) {
    this.#core = core
  }

  get store(): ObjectStore {
    return this.#core.store
  }

  get id(): string {
    return this.#core.config.id
  }

  /** The backups that can be read, newest last. Who shows them to people uses `list`, which names the damaged ones too. */
  async backups(): Promise<readonly BackupInfo[]> {
    return (await this.list()).backups
  }

  /** What is stored of backups that are in the making, or broke: another one can have them for parents. */
  async parts(): Promise<readonly BackupInfo[]> {
    return (await this.list()).parts
  }

  list(): Promise<BackupList> {
    return listBackups(this.#core)
  }

  /** What one backup says of itself. Kind 'not-found', or 'corrupt'. */
  backup(id: string): Promise<BackupInfo> {
    return readBackup(this.#core, id)
  }

  /**
   * Begins a backup, which nobody sees before its `finish`. Several may be in the making at once, in this process and in others, also
   * while a pruning is at work. What the store cannot take is put again whenever `mend` resolves; when it throws, and unless told,
   * the backup fails.
   */
  async begin(request: BackupRequest, mend?: (error: unknown) => Promise<void>): Promise<BackupWriter> {
    checkRequest(request)
    const { store, vault, inventory, squeezer, now, tool } = this.#core
    const { machine, moment, kind } = request
    const id = request.id ?? newBackupId(moment)
    const parents = [...new Set(request.disks.flatMap(({ parent }) => (parent === undefined ? [] : [parent.backup])))]
    for (const parent of parents) await this.backup(parent)
    const session = await Session.begin(this.#core, { id, kind: 'backup', parents })
    try {
      const { blobs, marks } = await inventory.refresh()
      await session.sees([...marks.keys()])
      const nodes = new NodeReader(store, vault, blobs)
      const disks: SessionDisk[] = []
      // Once more, now that the session is there to hold them.
      for (const disk of request.disks) disks.push(await this.#sessionDisk(disk, nodes))
      const sink = mend === undefined ? store : mendedSink(store, mend)
      return await beginBackup({
        store: sink,
        vault,
        squeezer,
        packs: new PackWriter(sink, vault, blobs, id.slice(-8), inventory),
        presence: session,
        disks,
        now,
        manifest: {
          format: FORMAT_VERSION,
          id,
          repository: this.id,
          machine,
          moment,
          kind,
          tool,
          startedMs: now(),
        },
      })
    } catch (error) {
      await session.end()
      throw error
    }
  }

  /**
   * Holds a backup: no pruning takes it away, also when it is forgotten, until the hold ends or its holder gave no sign of life for a week.
   * Kind 'not-found' when there is no such backup.
   */
  async hold(backup: string): Promise<BackupHold> {
    await this.backup(backup)
    const session = await Session.begin(this.#core, restoring(newBackupId(this.#core.now()), backup))
    try {
      // Once more, now that the session is there to hold it.
      await this.backup(backup)
      return session
    } catch (error) {
      await session.end()
      throw error
    }
  }

  /** Takes over a hold that another process left behind. Kind 'not-found' when the backup went since. */
  async takeOverHold(id: string, backup: string): Promise<BackupHold> {
    const session = await Session.takeOver(this.#core, restoring(id, backup))
    try {
      await readBackup(this.#core, backup, true)
      return session
    } catch (error) {
      session.abandon()
      throw error
    }
  }

  /** Ends a hold that another process left behind. */
  async endHold(id: string, backup: string): Promise<void> {
    await (await Session.takeOver(this.#core, restoring(id, backup))).end()
  }

  /** Whether the store answers and has the repository. */
  async isReachable(): Promise<boolean> {
    try {
      return (await this.#core.store.status(CONFIG_KEY)) !== undefined
    } catch {
      return false
    }
  }

  /** Opens a backup to read its disks. One that the caller holds may be forgotten. */
  async openBackup(id: string, hold?: BackupHold): Promise<BackupReader> {
    const info = await readBackup(this.#core, id, hold !== undefined)
    const { inventory } = this.#core
    let { blobs } = await inventory.refresh()
    let devices = this.#devices(info, blobs)
    const renew = async (index: number): Promise<BlockDevice | undefined> => {
      const { blobs: newer } = await inventory.refresh()
      if (newer === blobs) return undefined
      blobs = newer
      devices = this.#devices(info, newer)
      return devices[index]
    }
    const { squeezer } = this.#core
    const disks = info.disks.map((disk, index): OpenDisk => {
      const device = guard(new RenewingDevice(devices[index] as BackupDevice, () => renew(index)))
      const wholeChunks: LocalFirstOptions['wholeChunks'] = (offset, length) =>
        (devices[index] as BackupDevice).wholeChunks(offset, length)
      const besides = (local: BlockDevice): LocalFirst => new LocalFirst({ device, local, wholeChunks, squeezer })
      return { name: disk.name, size: disk.size, device, besides }
    })
    const close = async (): Promise<void> => {
      for (const disk of disks) await disk.device.close()
    }
    return { info, disks, close }
  }

  /** Visits, in order, where two disks of backups may differ; no data is read. See differences.ts. */
  async differences(
    one: BackupDiskName,
    two: BackupDiskName,
    visit: (offset: number, length: number) => void,
  ): Promise<void> {
    const { store, vault, inventory } = this.#core
    const disks: BackupDiskInfo[] = []
    // Also of a forgotten one, as long as it is there.
    for (const { backup, disk } of [one, two]) disks.push(diskOf(await readBackup(this.#core, backup, true), disk))
    const { blobs } = await inventory.refresh()
    const nodes = new NodeReader(store, vault, blobs)
    const [first, second] = disks.map((disk) => new DiskMap(disk.size, rootOf(disk), nodes)) as [DiskMap, DiskMap]
    await visitDifferences(first, second, blobs, visit)
  }

  /** Reads all that the backup refers to. Damage is in the report; what fails is what cannot be looked at, the manifest above all. */
  verify(id: string, progress: VerifyProgress = () => undefined): Promise<VerifyReport> {
    return verifyBackup(this.#core, id, progress)
  }

  /** The backup is none from now on; its space comes back with a pruning. Kind 'not-found'. */
  forget(id: string): Promise<void> {
    return forgetBackup(this.#core, id)
  }

  /** Adds and removes tags. Kind 'invalid-argument' for a word that is no tag, 'not-found'. */
  tag(id: string, change: { readonly add?: readonly string[]; readonly remove?: readonly string[] }): Promise<void> {
    return tagBackup(this.#core, id, change)
  }

  /** Forgets by a policy where one is given, and takes away what no backup needs. See prune.ts. */
  prune(options: PruneOptions = {}): Promise<PruneReport> {
    return prune(this.#core, options)
  }

  /** Checks every object, all maps, and what the options say of the data. See check.ts. */
  check(options: CheckOptions = {}): Promise<CheckReport> {
    return checkRepository(this.#core, options)
  }

  /** Moves what is good out of what a check found damaged. See repair.ts. */
  repair(found: CheckReport): Promise<RepairReport> {
    return repairRepository(this.#core, found)
  }

  stats(): Promise<RepositoryStats> {
    return repositoryStats(this.#core)
  }

  /** Copies backups that the other does not have. See copy.ts. */
  copyTo(target: Repository, options: CopyOptions = {}): Promise<readonly CopiedBackup[]> {
    return copyBackups(this.#core, target.#core, options)
  }

  /** Keys of an encrypted repository; none of a plain one. */
  keys(): Promise<readonly KeyInfo[]> {
    return listKeys(this.#core.store)
  }

  /** Lets another credential open it; returns the key's name. Kind 'unsupported' for a plain one. */
  addKey(credential: Credential, label: string): Promise<string> {
    const { store, vault, config, now } = this.#core
    if (vault.secret === undefined) {
      throw new BlockError('unsupported', `${store.name} is not encrypted: copy its backups into one that is`)
    }
    return addKey(store, config.id, vault.secret, { credential, label, nowMs: now() })
  }

  /** Kinds 'not-found', and 'invalid-argument' for the last one. */
  removeKey(name: string): Promise<void> {
    return removeKey(this.#core.store, name)
  }

  /** Ends the repository's threads. Backups in the making fail. */
  async close(): Promise<void> {
    await this.#core.squeezer.close()
    await this.#core.inventory.close()
  }

  #devices(info: BackupInfo, blobs: BlobIndex): BackupDevice[] {
    const { store, vault, squeezer } = this.#core
    const nodes = new NodeReader(store, vault, blobs)
    const chunks = new ChunkReader(store, blobs, squeezer)
    return info.disks.map((disk) => {
      const map = new DiskMap(disk.size, rootOf(disk), nodes)
      return new BackupDevice(`backup ${info.id}, disk ${disk.name}`, map, blobs, chunks)
    })
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

  async #parentOf(disk: BackupDisk, parent: BackupDiskName): Promise<BackupDiskInfo> {
    const found = diskOf(await this.backup(parent.backup), parent.disk)
    // The granule at the cut would keep what was behind the cut, and show it when the disk grows again.
    if (disk.size < found.size && disk.size % GRANULE_BYTES !== 0) {
      const message = `${disk.name} shrank to ${disk.size} bytes, no multiple of ${GRANULE_BYTES}: back it up without a parent`
      throw new BlockError('unsupported', message, { device: disk.name })
    }
    return found
  }
}

/** Kind 'not-found'. */
function diskOf(info: BackupInfo, name: string): BackupDiskInfo {
  const found = info.disks.find((candidate) => candidate.name === name)
  if (found !== undefined) return found
  const names = info.disks.map((candidate) => candidate.name).join(', ')
  throw new BlockError('not-found', `backup ${info.id} has no disk ${name}, only ${names}`)
}

function restoring(id: string, backup: string): { id: string; kind: 'restore'; parents: readonly string[] } {
  return { id, kind: 'restore', parents: [backup] }
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
