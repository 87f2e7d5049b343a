// Checks a whole repository: every object, the maps of all backups, and on request every byte of the packs or of a part of
// them. Tells which backups the damage hits, and where. Other clients may be at work meanwhile, prunings too.

import { DAMAGED_RANGES_MAX, STORE_REQUESTS } from '../base/limits.ts'
import { equalBytes } from '../base/bytes.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { type AllBackups, readBackups } from './backups.ts'
import { CheckWalk } from './check-walk.ts'
import type { BlobIndex } from './blob-index.ts'
import type { Core } from './core.ts'
import { steadily } from './inventory.ts'
import { decodeIndex } from './index-object.ts'
import { decodeConfig } from './manifest.ts'
import { packKey, type PackDirectory, readDirectory } from './pack.ts'
import { type BadBlob, readPack } from './pack-reader.ts'
import { inParallel } from './parallel.ts'
import { unsealFor } from './sealed.ts'
import { CONFIG_KEY, FORGOTTEN, KEYS, MARKS, SESSIONS, TAGS } from './spec.ts'
import type { DamagedObject, DamagedRange } from './verify.ts'
import { unsealKey } from './key-box.ts'

export interface CheckOptions {
  /** Which packs are read as a whole; none unless told. */
  readonly reads?: (pack: string) => boolean
  /** Is told of each pack that was read as a whole and is whole. */
  readonly packDone?: (pack: string) => void
  /** Bytes of packs that were read, and in all. */
  readonly progress?: (done: number, total: number) => void
}

/** A backup that cannot be restored as a whole. */
export interface HitBackup {
  readonly id: string
  /** Why none of it can be restored; else the ranges say what is lost. */
  readonly reason?: string
  readonly ranges: readonly DamagedRange[]
  readonly damagedBytes: number
}

export interface CheckReport {
  readonly isGood: boolean
  readonly backups: number
  readonly packs: number
  /** Packs that were read as a whole, and their bytes. */
  readonly packsRead: number
  readonly bytesRead: number
  readonly objects: readonly DamagedObject[]
  readonly hit: readonly HitBackup[]
  /** Blobs that are not what they should be: by their pack, for a repair. */
  readonly bad: readonly BadBlob[]
}

/** Damage is in the report; what fails is what the store itself fails at. */
export async function checkRepository(core: Core, options: CheckOptions = {}): Promise<CheckReport> {
  // Packs that were read and are whole need not be read again when all begins anew.
  const whole = new Set<string>()
  const once: CheckOptions = {
    ...options,
    reads: (pack) => !whole.has(pack) && options.reads?.(pack) === true,
    packDone: (pack) => {
      whole.add(pack)
      options.packDone?.(pack)
    },
  }
  await core.inventory.readFromStore()
  return steadily(
    core.inventory,
    ({ blobs }) => new Check(core, blobs, once).run(),
    ({ isGood }) => isGood,
  )
}

class Check {
  readonly #core: Core
  readonly #blobs: BlobIndex
  readonly #options: CheckOptions
  readonly #objects = new Map<string, string>()
  readonly #bad: BadBlob[] = []
  /** Of packs whose own directory is damaged, what an index says. */
  readonly #copies = new Map<string, PackDirectory>()
  #packsRead = 0
  #bytesRead = 0

  constructor(core: Core, blobs: BlobIndex, options: CheckOptions) {
    this.#core = core
    this.#blobs = blobs
    this.#options = options
  }

  async run(): Promise<CheckReport> {
    const { store, inventory } = this.#core
    await this.#look(CONFIG_KEY, async () => void decodeConfig(await store.get(CONFIG_KEY), store.name))
    await this.#notes()
    const all = await readBackups(this.#core)
    // A backup may be newer than what is known: what it needs is learnt of here.
    await inventory.refresh()
    for (const [key, error] of inventory.damaged) this.#objects.set(key, error.message)
    await this.#directories()
    await this.#packs([...this.#blobs.packNames()])
    return this.#report(all, await this.#walk(all))
  }

  /** Small objects that are opened by their own rules. */
  async #notes(): Promise<void> {
    const { store, vault } = this.#core
    for (const prefix of [SESSIONS, FORGOTTEN, MARKS, TAGS, KEYS]) {
      await inParallel(await store.list(prefix), STORE_REQUESTS, (key) =>
        this.#look(key, async () => {
          const bytes = await store.get(key)
          const where = `${store.name}: ${key}`
          if (prefix === KEYS) unsealKey(bytes, where)
          else unsealFor(vault, key, bytes, where)
        }),
      )
    }
  }

  /** Every pack's directory, and that each copy of it in an index is one. */
  async #directories(): Promise<void> {
    const { store, vault, inventory } = this.#core
    const compare = async (copy: PackDirectory, index: string): Promise<void> => {
      const own = await readDirectory(store, vault, copy.pack).catch((error: unknown) => {
        if (isBlockError(error) && error.kind !== 'not-found') this.#copies.set(copy.pack, copy)
        throw error
      })
      if (equalBytes(own.records, copy.records)) return
      const message = `${store.name}: ${index} names other blobs for ${packKey(copy.pack)} than its directory`
      throw new BlockError('corrupt', message, { path: index })
    }
    for (const index of inventory.indexes.keys()) {
      await this.#look(index, async () => {
        const directories = decodeIndex(vault, await store.get(index), `${store.name}: ${index}`)
        await inParallel(directories, STORE_REQUESTS, (copy) =>
          this.#look(packKey(copy.pack), () => compare(copy, index)),
        )
      })
    }
  }

  async #packs(names: readonly string[]): Promise<void> {
    const { store, vault } = this.#core
    const chosen = names.filter((pack) => this.#copies.has(pack) || this.#options.reads?.(pack) === true)
    const sizes = new Map<string, number>()
    await inParallel(chosen, STORE_REQUESTS, async (pack) => {
      sizes.set(pack, (await store.status(packKey(pack)))?.size ?? 0)
    })
    const total = [...sizes.values()].reduce((sum, size) => sum + size, 0)
    for (const pack of chosen) {
      const before = this.#bad.length
      const isKnown = this.#objects.has(packKey(pack))
      await this.#look(packKey(pack), async () => {
        const directory = this.#copies.get(pack) ?? (await readDirectory(store, vault, pack))
        const bad = await readPack(this.#core, directory)
        this.#bad.push(...bad)
        const [first] = bad
        if (first !== undefined) throw new BlockError('corrupt', `${bad.length} blobs are damaged: ${first.reason}`)
      })
      this.#packsRead++
      this.#bytesRead += sizes.get(pack) as number
      if (!isKnown && this.#bad.length === before && !this.#objects.has(packKey(pack))) this.#options.packDone?.(pack)
      this.#options.progress?.(this.#bytesRead, total)
    }
  }

  /** The backups whose maps, or what they show, are damaged. */
  async #walk(all: AllBackups): Promise<HitBackup[]> {
    const hit: HitBackup[] = all.damaged
      .filter(({ id }) => !all.forgotten.has(id))
      .map(({ id, reason }) => ({ id, reason, ranges: [], damagedBytes: 0 }))
    const walk = new CheckWalk(this.#core, this.#blobs, this.#bad)
    let room = DAMAGED_RANGES_MAX
    for (const info of all.backups) {
      if (all.forgotten.has(info.id)) continue
      const { ranges, damagedBytes } = await walk.backup(info, room)
      room -= ranges.length
      if (damagedBytes > 0) hit.push({ id: info.id, ranges, damagedBytes })
    }
    return hit
  }

  #report(all: AllBackups, hit: readonly HitBackup[]): CheckReport {
    const objects = [...this.#objects].map(([key, reason]) => ({ key, reason }))
    for (const { id, reason } of all.damaged) objects.push({ key: `backups/${id}`, reason })
    return {
      isGood: objects.length === 0 && hit.length === 0,
      backups: all.backups.filter(({ id }) => !all.forgotten.has(id)).length,
      packs: this.#blobs.packs,
      packsRead: this.#packsRead,
      bytesRead: this.#bytesRead,
      objects,
      hit,
      bad: this.#bad,
    }
  }

  /** Notes what is wrong with an object. One that is gone was taken away by a pruning or by its owner. */
  async #look(key: string, work: () => Promise<void>): Promise<void> {
    try {
      await work()
    } catch (error) {
      if (isBlockError(error, 'not-found')) return
      const isDamage = (['corrupt', 'invalid-format', 'out-of-range'] as const).some((kind) =>
        isBlockError(error, kind),
      )
      if (!isDamage) throw error
      if (!this.#objects.has(key)) this.#objects.set(key, (error as BlockError).message)
    }
  }
}
