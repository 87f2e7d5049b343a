// What is in a repository's store, as one client knows it: which packs there are, where each blob is, and which packs are
// about to be removed. It is brought up to date by asking, from copies of the packs' directories (indexes) where there are any.
//
//   marks, then indexes, then packs: in this order, so that a pack which a mark spared us is not taken from an old index
//
// What is known only grows while packs come. When one goes or is condemned, all is read anew into another BlobIndex: whoever
// works with the old one goes on with it.

import { STEADY_TRIES, STORE_REQUESTS } from '../base/limits.ts'
import { Mutex } from '../base/mutex.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { BlobIndex } from './blob-index.ts'
import { decodeIndex } from './index-object.ts'
import { type Mark, readMark } from './mark.ts'
import { type PackDirectory, packKey, readDirectory } from './pack.ts'
import { inParallel } from './parallel.ts'
import { INDEXES, MARKS, PACKS } from './spec.ts'
import type { ObjectStore } from './store.ts'
import type { Vault } from './vault.ts'

/** What a refresh found. */
export interface Stock {
  readonly blobs: BlobIndex
  /** The marks whose packs `blobs` holds as condemned, by key. */
  readonly marks: ReadonlyMap<string, Mark>
}

export class Inventory {
  readonly store: ObjectStore
  readonly vault: Vault
  readonly #turn = new Mutex()
  #blobs = new BlobIndex()
  #marks = new Map<string, Mark>()
  /** Index objects that were read, and the packs that they name. */
  #indexes = new Map<string, readonly string[]>()
  /** Objects that cannot be used, and why. */
  #damaged = new Map<string, BlockError>()
  /** Packs that an index names and that are not there. */
  #missing = new Map<string, BlockError>()

  constructor(store: ObjectStore, vault: Vault) {
    this.store = store
    this.vault = vault
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

  /** As refresh, and takes nothing as known. */
  readAnew(): Promise<Stock> {
    return this.#turn.run(() => {
      this.#forget()
      return this.#refresh()
    })
  }

  async #refresh(): Promise<Stock> {
    const marks = await this.#readMarks()
    const condemned = new Set([...marks.values()].flatMap((mark) => mark.packs))
    const indexes = new Set(await this.store.list(INDEXES))
    const packs = new Set((await this.store.list(PACKS)).map((key) => key.slice(PACKS.length)))
    if (this.#isOutdated(packs, condemned)) this.#forget()
    for (const key of this.#indexes.keys()) if (!indexes.has(key)) this.#indexes.delete(key)
    this.#marks = marks
    await this.#readPacks(indexes, packs, condemned)
    return { blobs: this.#blobs, marks }
  }

  #forget(): void {
    this.#blobs = new BlobIndex()
    this.#indexes = new Map()
    this.#damaged = new Map()
    this.#missing = new Map()
    this.#marks = new Map()
  }

  /** Only what was added since can be added to what is known. */
  #isOutdated(packs: ReadonlySet<string>, condemned: ReadonlySet<string>): boolean {
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

  async #readPacks(
    indexes: ReadonlySet<string>,
    packs: ReadonlySet<string>,
    condemned: ReadonlySet<string>,
  ): Promise<void> {
    const late: PackDirectory[] = []
    const add = (directory: PackDirectory): void => {
      // The condemned come last, so that a blob which is elsewhere too is found there.
      if (condemned.has(directory.pack)) late.push(directory)
      else this.#blobs.addPack(directory)
    }
    this.#missing = new Map([...this.#missing].filter(([key]) => !packs.has(key.slice(PACKS.length))))
    const isNew = (key: string): boolean => !this.#indexes.has(key) && !this.#damaged.has(key)
    await inParallel([...indexes].filter(isNew), STORE_REQUESTS, (key) =>
      this.#orDamaged(key, async () => {
        const directories = decodeIndex(this.vault, await this.store.get(key), `${this.store.name}: ${key}`)
        for (const directory of directories) {
          if (packs.has(directory.pack)) add(directory)
          else this.#miss(directory.pack, key)
        }
        this.#indexes.set(
          key,
          directories.map(({ pack }) => pack),
        )
      }),
    )
    const known = new Set(late.map(({ pack }) => pack))
    const unnamed = [...packs].filter(
      (pack) => !this.#blobs.hasPack(pack) && !known.has(pack) && !this.#damaged.has(packKey(pack)),
    )
    await inParallel(unnamed, STORE_REQUESTS, (pack) =>
      this.#orDamaged(packKey(pack), async () => add(await readDirectory(this.store, this.vault, pack))),
    )
    for (const directory of late) this.#blobs.addPack(directory, true)
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
