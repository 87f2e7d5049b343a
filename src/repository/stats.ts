// What a repository holds and what that costs: sizes of disks, of what is stored for them, and how much of it is whose alone.

import { Breather } from '../base/breather.ts'
import { STORE_REQUESTS } from '../base/limits.ts'
import { readBackups } from './backups.ts'
import { type BlobIndex, NO_ENTRY } from './blob-index.ts'
import type { Core } from './core.ts'
import { steadily } from './inventory.ts'
import { type BackupInfo, isPart, rootOf } from './manifest.ts'
import { NodeReader } from './node-reader.ts'
import { inParallel } from './parallel.ts'
import { FANOUT, LEAF_HEADER_BYTES, SEGMENT_BYTES } from './spec.ts'
import { childAt } from './tree.ts'

/** Bytes throughout. */
export interface RepositoryStats {
  readonly backups: number
  readonly packs: number
  readonly blobs: number
  /** Sizes of all disks in all backups. */
  readonly logicalBytes: number
  /** What the backups hold of data before it is compressed, what several share counted once. */
  readonly plainBytes: number
  /** Of all objects in the store; and of the blobs that some backup needs, that several need, that none needs. */
  readonly storedBytes: number
  readonly neededBytes: number
  readonly sharedBytes: number
  readonly unusedBytes: number
  /** Oldest first. `ownBytes` is what removing this one alone would free. */
  readonly each: readonly {
    readonly id: string
    readonly logicalBytes: number
    readonly ownBytes: number
  }[]
}

/** Kind 'corrupt' when damage hides what a backup needs. */
export function repositoryStats(core: Core): Promise<RepositoryStats> {
  return steadily(core.inventory, ({ blobs }) => statsWith(core, blobs))
}

async function statsWith(core: Core, blobs: BlobIndex): Promise<RepositoryStats> {
  const { store, inventory } = core
  const { backups, damaged, forgotten } = await readBackups(core)
  await inventory.refresh()
  const visible = backups.filter((info) => !forgotten.has(info.id) && !isPart(info))
  const owners = new Owners(core, blobs, visible.length)
  for (const [index, info] of visible.entries()) await owners.add(info, index)
  let storedBytes = 0
  await inParallel(await store.list(''), STORE_REQUESTS, async (key) => {
    const status = await store.status(key)
    storedBytes += status?.size ?? 0
  })
  const { own, ...sums } = await owners.sums(visible.length)
  const each = visible.map((info, index) => ({
    id: info.id,
    logicalBytes: logicalOf(info),
    ownBytes: own[index] as number,
  }))
  return {
    backups: visible.length + damaged.filter(({ id }) => !forgotten.has(id)).length,
    packs: blobs.packs,
    blobs: blobs.count,
    logicalBytes: each.reduce((sum, { logicalBytes }) => sum + logicalBytes, 0),
    storedBytes,
    ...sums,
    each,
  }
}

const logicalOf = ({ disks }: BackupInfo): number => disks.reduce((sum, disk) => sum + disk.size, 0)

const NOBODY = 0
const SEVERAL = -1

/** For each blob, which backup needs it: nobody, one (its number plus one), or several. */
class Owners {
  readonly #blobs: BlobIndex
  readonly #nodes: NodeReader
  readonly #owners: Int16Array | Int32Array
  readonly #breather = new Breather()

  constructor({ store, vault }: Core, blobs: BlobIndex, backups: number) {
    this.#blobs = blobs
    this.#nodes = new NodeReader(store, vault, blobs)
    this.#owners = backups < 32_767 ? new Int16Array(blobs.count) : new Int32Array(blobs.count)
  }

  async add(info: BackupInfo, index: number): Promise<void> {
    for (const disk of info.disks) {
      const root = rootOf(disk)
      if (root !== undefined) await this.#node(root, 0, disk.levels, index + 1)
    }
  }

  async sums(backups: number): Promise<
    Pick<RepositoryStats, 'plainBytes' | 'neededBytes' | 'sharedBytes' | 'unusedBytes'> & {
      own: Float64Array
    }
  > {
    const own = new Float64Array(backups)
    const sums = { plainBytes: 0, neededBytes: 0, sharedBytes: 0, unusedBytes: 0 }
    await this.#blobs.visit((entry, _pack, stored, plain) => {
      const owner = this.#owners[entry]
      if (owner === undefined) return
      if (owner === NOBODY) {
        sums.unusedBytes += stored
        return
      }
      sums.neededBytes += stored
      sums.plainBytes += plain
      if (owner === SEVERAL) sums.sharedBytes += stored
      else own[owner - 1] = (own[owner - 1] as number) + stored
    })
    return { ...sums, own }
  }

  async #node(ids: Uint8Array, at: number, level: number, owner: number): Promise<void> {
    const entry = this.#blobs.find(ids, at)
    if (entry !== NO_ENTRY && !this.#claim(entry, owner)) return
    const node = await this.#nodes.load(ids, at, level)
    await this.#breather.pause()
    if (level === 0) {
      for (let segment = LEAF_HEADER_BYTES; segment < node.length; segment += SEGMENT_BYTES) {
        const chunk = this.#blobs.find(node, segment + 3)
        if (chunk !== NO_ENTRY) this.#claim(chunk, owner)
      }
      return
    }
    for (let child = 0; child < FANOUT; child++) {
      const childIdAt = childAt(node, child)
      if (childIdAt >= 0) await this.#node(node, childIdAt, level - 1, owner)
    }
  }

  /** False when that was known: then all that is below it was claimed as well. */
  #claim(entry: number, owner: number): boolean {
    const before = this.#owners[entry]
    if (before === owner || before === SEVERAL) return false
    this.#owners[entry] = before === NOBODY ? owner : SEVERAL
    return true
  }
}
