// The tables (blob-table.ts) of one repository, in a folder of this host. They are a copy of what the repository's indexes say, so that
// opening it need not read them again, and so that memory is bounded however many blobs there are.
//
//   NAME.table         whole, and never changed
//   NAME.table.part    being written by whoever has a claim on it
//
// Several processes may use the folder at once, and need not know of each other: a table that another has taken away can still be read
// by who has it open, and when a pack is in two tables, one of these is left out.

import crypto from 'node:crypto'
import path from 'node:path'
import { Breather } from '../base/breather.ts'
import { getUint32 } from '../base/bytes.ts'
import { TABLES_MAX } from '../base/limits.ts'
import { isBlockError } from '../block/error.ts'
import type { Host, HostFile } from '../host/host.ts'
import type { BlobIndex } from './blob-index.ts'
import { BlobTable, ENTRY_BYTES, FIELD, PageCache, type TableNotes, TableReader, TableWriter } from './blob-table.ts'
import { ID_BYTES } from './spec.ts'

const SUFFIX = '.table'
const PART = '.part'

/** What is in the store now. What a table knows beyond that is left out of the next one. */
export interface Present {
  readonly hasPack: (pack: string) => boolean
  readonly hasIndex: (key: string) => boolean
}

export class TableFolder {
  readonly #host: Host
  readonly #folder: string
  #cache: PageCache | undefined
  readonly #open = new Set<BlobTable>()

  constructor(host: Host, folder: string) {
    this.#host = host
    this.#folder = folder
  }

  /** The tables that are there, of which no two have a pack in common. What is damaged or left over is taken away. */
  async load(): Promise<BlobTable[]> {
    const tables: BlobTable[] = []
    for (const name of await this.#host.list(this.#folder)) {
      const file = path.join(this.#folder, name)
      if (name.endsWith(PART)) await this.#tidy(file)
      if (!name.endsWith(SUFFIX)) continue
      const table = await this.#openTable(file)
      if (table === undefined) await this.#host.unlink(file)
      else tables.push(table)
    }
    tables.sort((a, b) => b.count - a.count)
    const seen = new Set<string>()
    const chosen: BlobTable[] = []
    for (const table of tables) {
      if (table.notes.packs.some(([pack]) => seen.has(pack))) {
        await this.drop(table)
        continue
      }
      for (const [pack] of table.notes.packs) seen.add(pack)
      chosen.push(table)
    }
    return chosen
  }

  /** Makes a table of what an index has in memory. */
  async write(index: BlobIndex, indexes: TableNotes['indexes']): Promise<BlobTable> {
    const { blobs, count, firstPack, packs } = index.recent
    const breather = new Breather()
    return this.#make(async (writer) => {
      const record = new Uint8Array(ENTRY_BYTES)
      for (const entry of await blobs.sorted(count)) {
        blobs.copy(entry, record, 0)
        await writer.add(record, 0, blobs.field(entry, 'pack') - firstPack)
        if (writer.count % 1024 === 0) await breather.pause()
      }
      return { packs, indexes }
    })
  }

  /**
   * Joins tables while there are many, and those last that are larger than all after them together: so a record is written anew a few times
   * at most. Those that were joined are taken away.
   */
  async join(tables: readonly BlobTable[], present: Present): Promise<BlobTable[]> {
    if (tables.length <= TABLES_MAX) return [...tables]
    const sorted = [...tables].sort((a, b) => b.count - a.count)
    let first = sorted.length - 1
    let sum = 0
    while (first > 0 && (sorted.length - first < 2 || (sorted[first - 1] as BlobTable).count < sum * 2)) {
      sum += (sorted[first--] as BlobTable).count
    }
    const joined = await this.#merge(sorted.slice(first), present)
    for (const table of sorted.slice(first)) await this.drop(table)
    return [...sorted.slice(0, first), joined]
  }

  /** Takes a table away. Whoever works with it can go on. */
  async drop(table: BlobTable): Promise<void> {
    await this.#host.unlink(table.path)
  }

  async close(): Promise<void> {
    for (const table of this.#open) await table.close()
    this.#open.clear()
  }

  async #openTable(file: string): Promise<BlobTable | undefined> {
    let opened: HostFile
    try {
      opened = await this.#host.open(file, { background: true })
    } catch (error) {
      // Another process has joined it into a larger one.
      if (isBlockError(error, 'not-found')) return undefined
      throw error
    }
    this.#cache ??= new PageCache()
    const table = await BlobTable.open(opened, this.#cache)
    if (table === undefined) await opened.close()
    else this.#open.add(table)
    return table
  }

  async #make(fill: (writer: TableWriter) => Promise<TableNotes>): Promise<BlobTable> {
    await this.#host.makeFolder(this.#folder)
    const name = path.join(this.#folder, `${crypto.randomBytes(16).toString('hex')}${SUFFIX}`)
    const file = await this.#host.open(name + PART, {
      write: true,
      create: 'exclusive',
      lock: 'write',
      background: true,
    })
    try {
      const writer = new TableWriter(file)
      await writer.finish(await fill(writer))
      await this.#host.rename(name + PART, name)
    } catch (error) {
      await this.#host.unlink(name + PART).catch(() => undefined)
      throw error
    } finally {
      await file.close()
    }
    return (await this.#openTable(name)) as BlobTable
  }

  async #merge(tables: readonly BlobTable[], present: Present): Promise<BlobTable> {
    const packs: (readonly [string, number])[] = []
    const indexes: Record<string, readonly string[]> = {}
    const inputs: Input[] = []
    for (const table of tables) {
      const numbers = new Int32Array(table.notes.packs.length).fill(-1)
      for (const [number, pack] of table.notes.packs.entries()) {
        if (present.hasPack(pack[0])) numbers[number] = packs.push(pack) - 1
      }
      for (const [key, names] of Object.entries(table.notes.indexes)) if (present.hasIndex(key)) indexes[key] = names
      inputs.push(new Input(table, numbers))
    }
    return this.#make(async (writer) => {
      await mergeInto(writer, inputs)
      return { packs, indexes }
    })
  }

  /** A crash left it; or somebody writes it, and has a claim. */
  async #tidy(file: string): Promise<void> {
    try {
      await (await this.#host.open(file, { write: true, lock: 'write' })).close()
      await this.#host.unlink(file)
    } catch (error) {
      if (!isBlockError(error, 'busy') && !isBlockError(error, 'not-found')) throw error
    }
  }
}

/** A table that is read in order. */
class Input {
  readonly #reader: TableReader
  /** New numbers of its packs; -1 for one that is gone. */
  readonly #numbers: Int32Array
  #left = 0
  at = 0
  key = -1

  constructor(table: BlobTable, numbers: Int32Array) {
    this.#reader = new TableReader(table)
    this.#numbers = numbers
  }

  get bytes(): Uint8Array {
    return this.#reader.bytes
  }

  get pack(): number {
    return this.#numbers[getUint32(this.bytes, this.at + FIELD.pack)] as number
  }

  /** Goes to the next record, in the call when it is at hand; then `key` is the first 4 bytes of its id, or -1 at the end. */
  next(): Promise<void> | undefined {
    this.at += ENTRY_BYTES
    if (--this.#left <= 0) return this.fill()
    this.key = getUint32(this.bytes, this.at)
    return undefined
  }

  async fill(): Promise<void> {
    this.#left = await this.#reader.next()
    this.at = 0
    this.key = this.#left === 0 ? -1 : getUint32(this.bytes, 0)
  }
}

async function mergeInto(writer: TableWriter, inputs: readonly Input[]): Promise<void> {
  const breather = new Breather()
  for (const input of inputs) await input.fill()
  let live = inputs.filter(({ key }) => key >= 0)
  for (let done = 1; live.length > 0; done++) {
    let least = live[0] as Input
    for (const input of live) if (input !== least && isBefore(input, least)) least = input
    if (least.pack >= 0) {
      const full = writer.add(least.bytes, least.at, least.pack)
      if (full !== undefined) await full
    }
    const more = least.next()
    if (more !== undefined) {
      await more
      if (least.key < 0) live = live.filter((input) => input !== least)
    }
    if (done % 1024 === 0) await breather.pause()
  }
}

function isBefore(a: Input, b: Input): boolean {
  if (a.key !== b.key) return a.key < b.key
  for (let i = 4; i < ID_BYTES; i++) {
    const difference = (a.bytes[a.at + i] as number) - (b.bytes[b.at + i] as number)
    if (difference !== 0) return difference < 0
  }
  return false
}
