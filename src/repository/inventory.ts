// What is in a repository's store, as one client knows it: which packs there are, where each blob is, and which packs are
// about to be removed. It is brought up to date by asking, from copies of the packs' directories (indexes) where there are any.
//
//   marks, then indexes, then packs: in this order, so that a pack which a mark spared us is not taken from an old index
//
// What is known only grows while packs come. When one goes or is condemned, another BlobIndex is begun: whoever works with the old one goes
// on with it. Where there is a folder for that, what becomes too much for memory is put into tables there (table-folder.ts).

import { MEMORY_BLOBS, STEADY_TRIES, STORE_REQUESTS, TABLE_GONE_SHARE } from '../base/limits.ts'
import { Mutex } from '../base/mutex.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { BlobIndex } from './blob-index.ts'
import type { BlobTable } from './blob-table.ts'
import { decodeIndex } from './index-object.ts'
import { type Mark, readMark } from './mark.ts'
import { type PackDirectory, packKey, readDirectory } from './pack.ts'
import { inParallel } from './parallel.ts'
import { INDEXES, MARKS, PACKS } from './spec.ts'
import type { ObjectStore } from './store.ts'
import type { TableFolder } from './table-folder.ts'
import type { Vault } from './vault.ts'

/** Where tables go, and how many blobs are in memory before one is made. */
export interface TablePlace {
  readonly folder: TableFolder
  readonly memoryBlobs?: number
}

/** What a refresh found. */
export interface Stock {
  readonly blobs: BlobIndex
  /** The marks whose packs `blobs` holds as condemned, by key. */
  readonly marks: ReadonlyMap<string, Mark>
}

/** What the store has, as it was listed. */
interface Listing {
  readonly indexes: ReadonlySet<string>
  readonly packs: ReadonlySet<string>
  readonly condemned: ReadonlySet<string>
}

export class Inventory {
  readonly store: ObjectStore
  readonly vault: Vault
  readonly #place: TablePlace | undefined
  readonly #turn = new Mutex()
  #blobs = new BlobIndex()
  #isBegun = false
  /** Undefined before they were looked for. */
  #tables: readonly BlobTable[] | undefined
  #marks = new Map<string, Mark>()
  /** Index objects that were read, and the packs that they name. */
  #indexes = new Map<string, readonly string[]>()
  /** Objects that cannot be used, and why. */
  #damaged = new Map<string, BlockError>()
  /** Packs that an index names and that are not there. */
  #missing = new Map<string, BlockError>()

  /** Without a place for tables all is in memory. */
  constructor(store: ObjectStore, vault: Vault, place?: TablePlace) {
    this.store = store
    this.vault = vault
    this.#place = place
  }

  /** As the last refresh found it. */
  get blobs(): BlobIndex {
    return this.#blobs
  }

  /** Indexes, packs and marks that cannot be used, and packs that are gone though an index names them. */
  get damaged(): ReadonlyMap<string, BlockError> {
    return new Map([...this.#damaged, ...this.#missing])
  }

  /** The indexes that were read and name one of the packs. */
  indexesOf(packs: ReadonlySet<string>): string[] {
    return [...this.#indexes].filter(([, named]) => named.some((pack) => packs.has(pack))).map(([key]) => key)
  }

  /** All indexes that were read, each with the packs that it names. */
  get indexes(): ReadonlyMap<string, readonly string[]> {
    return this.#indexes
  }

  /** The directory of a pack as an index has it, or undefined when none that can be read has. */
  async copyOf(pack: string): Promise<PackDirectory | undefined> {
    const [key] = this.indexesOf(new Set([pack]))
    if (key === undefined) return undefined
    const directories = decodeIndex(this.vault, await this.store.get(key), `${this.store.name}: ${key}`)
    return directories.find((directory) => directory.pack === pack)
  }

  /** Learns of what came and went since. */
  refresh(): Promise<Stock> {
    return this.#turn.run(() => this.#refresh())
  }

  /** As refresh, and reads again what is not in tables. */
  readAnew(): Promise<Stock> {
    return this.#turn.run(() => {
      this.#isBegun = false
      return this.#refresh()
    })
  }

  /** As refresh, and takes nothing as known: tables are made anew. */
  readFromStore(): Promise<Stock> {
    return this.#turn.run(async () => {
      await this.#dropTables()
      this.#isBegun = false
      return this.#refresh()
    })
  }

  /** An index for whoever adds to `index`: another when that one has become too large for memory. */
  async relieve(index: BlobIndex): Promise<BlobIndex> {
    return this.#isCrowded(index) ? (await this.refresh()).blobs : index
  }

  async close(): Promise<void> {
    await this.#place?.folder.close()
  }

  async #refresh(): Promise<Stock> {
    const marks = await this.#readMarks()
    const condemned = new Set([...marks.values()].flatMap((mark) => mark.packs))
    const indexes = new Set(await this.store.list(INDEXES))
    const packs = new Set((await this.store.list(PACKS)).map((key) => key.slice(PACKS.length)))
    const listing = { indexes, packs, condemned }
    this.#tables ??= (await this.#place?.folder.load()) ?? []
    if (this.#tables.some(({ isDamaged }) => isDamaged)) await this.#dropTables()
    if (!this.#isBegun || this.#isOutdated(listing)) await this.#begin(listing)
    for (const key of this.#indexes.keys()) if (!indexes.has(key)) this.#indexes.delete(key)
    this.#marks = marks
    await this.#readPacks(listing)
    return { blobs: this.#blobs, marks }
  }

  /** Begins another index: knows what is in the tables, and nothing else. */
  async #begin(listing: Listing): Promise<void> {
    this.#newBlobs(listing)
    if (this.#blobs.goneShare > TABLE_GONE_SHARE) {
      await this.#dropTables()
      this.#newBlobs(listing)
    }
    this.#indexes = new Map()
    this.#damaged = new Map()
    this.#missing = new Map()
    this.#marks = new Map()
    for (const { notes } of this.#tables ?? []) {
      for (const [key, named] of Object.entries(notes.indexes)) {
        // One of which a pack is in no table any more is read again.
        if (!listing.indexes.has(key) || named.some((pack) => listing.packs.has(pack) && !this.#blobs.hasPack(pack)))
          continue
        this.#indexes.set(key, named)
        for (const pack of named) if (!listing.packs.has(pack)) this.#miss(pack, key)
      }
    }
    this.#isBegun = true
  }

  #newBlobs({ packs, condemned }: Listing): void {
    this.#blobs = new BlobIndex(this.#tables, {
      isThere: (pack) => packs.has(pack),
      isCondemned: (pack) => condemned.has(pack),
    })
  }

  async #dropTables(): Promise<void> {
    for (const table of this.#tables ?? (await this.#place?.folder.load()) ?? []) await this.#place?.folder.drop(table)
    this.#tables = []
    this.#isBegun = false
  }

  #isCrowded(index: BlobIndex): boolean {
    return this.#place !== undefined && index.memoryCount > (this.#place.memoryBlobs ?? MEMORY_BLOBS)
  }

  /** Makes a table of what is in memory, and begins another index with it. What a backup adds meanwhile is found by the next refresh. */
  async #spill(listing: Listing): Promise<void> {
    const { folder } = this.#place as TablePlace
    const noted = new Set((this.#tables ?? []).flatMap(({ notes }) => Object.keys(notes.indexes)))
    const table = await folder.write(
      this.#blobs,
      Object.fromEntries([...this.#indexes].filter(([key]) => !noted.has(key))),
    )
    this.#tables = await folder.join([...(this.#tables ?? []), table], {
      hasPack: (pack) => listing.packs.has(pack),
      hasIndex: (key) => listing.indexes.has(key),
    })
    this.#newBlobs(listing)
  }

  /** Only what was added since can be added to what is known. */
  #isOutdated({ packs, condemned }: Listing): boolean {
    for (const pack of this.#blobs.packNames()) {
      if (!packs.has(pack) || condemned.has(pack) !== this.#blobs.isCondemned(pack)) return true
    }
    return false
  }

  async #readMarks(): Promise<Map<string, Mark>> {
    const marks = new Map<string, Mark>()
    await inParallel(await this.store.list(MARKS), STORE_REQUESTS, async (key) => {
      const mark = this.#marks.get(key) ?? (await readMark(this.store, this.vault, key))
      if (mark instanceof BlockError) this.#damaged.set(key, mark)
      else if (mark !== undefined) marks.set(key, mark)
    })
    return marks
  }

  async #readPacks(listing: Listing): Promise<void> {
    const { indexes, packs, condemned } = listing
    const adding = new Mutex()
    /** One after the other: an index that becomes too large is put away before the next is added. */
    const addAll = (directories: readonly PackDirectory[], index?: string): Promise<void> =>
      adding.run(async () => {
        for (const directory of directories) {
          if (packs.has(directory.pack)) this.#blobs.addPack(directory, condemned.has(directory.pack))
          else if (index !== undefined) this.#miss(directory.pack, index)
        }
        if (index !== undefined) {
          const named = directories.map(({ pack }) => pack)
          this.#indexes.set(index, named)
        }
        if (this.#isCrowded(this.#blobs)) await this.#spill(listing)
      })
    this.#missing = new Map([...this.#missing].filter(([key]) => !packs.has(key.slice(PACKS.length))))
    const isNew = (key: string): boolean => !this.#indexes.has(key) && !this.#damaged.has(key)
    await inParallel([...indexes].filter(isNew), STORE_REQUESTS, (key) =>
      this.#orDamaged(key, async () => {
        const directories = decodeIndex(this.vault, await this.store.get(key), `${this.store.name}: ${key}`)
        await addAll(directories, key)
      }),
    )
    const unnamed = [...packs].filter((pack) => !this.#blobs.hasPack(pack) && !this.#damaged.has(packKey(pack)))
    await inParallel(unnamed, STORE_REQUESTS, (pack) =>
      this.#orDamaged(packKey(pack), async () => addAll([await readDirectory(this.store, this.vault, pack)])),
    )
    // Whoever backs up adds to it too.
    if (this.#isCrowded(this.#blobs)) await this.#spill(listing)
  }

  #miss(pack: string, index: string): void {
    const key = packKey(pack)
    const message = `${this.store.name}: ${key} is not there, and ${index} names it`
    this.#missing.set(key, new BlockError('corrupt', message, { path: key }))
  }

  /** One bad object does not close the repository: what can be read without it can be read. What is gone meanwhile was removed. */
  async #orDamaged(key: string, work: () => Promise<void>): Promise<void> {
    try {
      await work()
    } catch (error) {
      if (isBlockError(error, 'not-found')) return
      const isBad = isBlockError(error, 'corrupt') || isBlockError(error, 'invalid-format')
      if (!isBad && !isBlockError(error, 'out-of-range')) throw error
      this.#damaged.set(key, error)
    }
  }
}

/**
 * Does work that reads much, while prunings may move blobs away under it: what it found to be damaged counts when nothing has moved
 * meanwhile; else it is done again, a few times at most.
 */
export async function steadily<T>(
  inventory: Inventory,
  work: (stock: Stock) => Promise<T>,
  isGood: (result: T) => boolean = () => true,
): Promise<T> {
  for (let left = STEADY_TRIES; ; left--) {
    const stock = await inventory.refresh()
    const hasMoved = async (): Promise<boolean> => left > 1 && (await inventory.refresh()).blobs !== stock.blobs
    try {
      const result = await work(stock)
      if (isGood(result) || !(await hasMoved())) return result
    } catch (error) {
      if (!isBlockError(error, 'corrupt') || !(await hasMoved())) throw error
    }
  }
}
