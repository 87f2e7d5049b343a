// Where each blob of a repository is: tables on disk of what was known before, where there are very many blobs (blob-table.ts), and what
// came since, in memory (memory-blobs.ts). Entries are numbered, first those of the tables, then those in memory as they come; they
// never change or go. A blob that is in several packs has an entry for each: one in a pack that lasts is found before one in a pack that is
// about to be removed, and none in a pack that is gone.

import { Breather } from '../base/breather.ts'
import { getUint32 } from '../base/bytes.ts'
import { BLOBS_MAX } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import { type BlobTable, ENTRY_BYTES, type Field, FIELD } from './blob-table.ts'
import { MemoryBlobs } from './memory-blobs.ts'
import { type PackDirectory, visitRecords } from './pack.ts'
import { PACK_HEADER_BYTES } from './spec.ts'

/** Not in the index. */
export const NO_ENTRY = -1

/** A table, and the numbers of its first entry and of its first pack. */
interface Part {
  readonly table: BlobTable
  readonly first: number
  readonly firstPack: number
}

export class BlobIndex {
  readonly #parts: readonly Part[]
  readonly #inTables: number
  readonly #memory = new MemoryBlobs()
  readonly #firstOwnPack: number
  readonly #packs: string[] = []
  readonly #packEnds: number[] = []
  readonly #packNumbers = new Map<string, number>()
  readonly #condemned = new Set<number>()
  readonly #gone = new Set<number>()

  /** Of the packs in the tables, `state` says which are gone, and which are about to be. */
  constructor(
    tables: readonly BlobTable[] = [],
    state: { readonly isThere: (pack: string) => boolean; readonly isCondemned: (pack: string) => boolean } = ALL_THERE,
  ) {
    const parts: Part[] = []
    let first = 0
    for (const table of tables) {
      parts.push({ table, first, firstPack: this.#packs.length })
      first += table.count
      for (const [pack, end] of table.notes.packs) {
        const number = this.#packs.length
        this.#packs.push(pack)
        this.#packEnds.push(end)
        if (!state.isThere(pack)) this.#gone.add(number)
        else this.#packNumbers.set(pack, number)
        if (state.isCondemned(pack)) this.#condemned.add(number)
      }
    }
    this.#parts = parts
    this.#inTables = first
    this.#firstOwnPack = this.#packs.length
  }

  /** Entries. */
  get count(): number {
    return this.#inTables + this.#memory.count
  }

  /** Entries in memory. */
  get memoryCount(): number {
    return this.#memory.count
  }

  /** Packs that are there. */
  get packs(): number {
    return this.#packNumbers.size
  }

  /** Numbers of packs are less than this. */
  get packNumbers(): number {
    return this.#packs.length
  }

  /** Which part of the packs in the tables is gone. */
  get goneShare(): number {
    return this.#firstOwnPack === 0 ? 0 : this.#gone.size / this.#firstOwnPack
  }

  /** Memory that the arrays take, in bytes. */
  get bytes(): number {
    return this.#parts.reduce((sum, { table }) => sum + table.bytes, this.#memory.bytes)
  }

  hasPack(pack: string): boolean {
    return this.#packNumbers.has(pack)
  }

  /** True for a pack that is about to be removed: what is in it can be read, and is not to be relied on. */
  isCondemned(pack: string): boolean {
    return this.#condemned.has(this.#packNumbers.get(pack) ?? NO_ENTRY)
  }

  /** Names of all packs that are there. */
  packNames(): Iterable<string> {
    return this.#packNumbers.keys()
  }

  /** The same with their numbers. */
  numberedPacks(): Iterable<readonly [name: string, number: number]> {
    return this.#packNumbers
  }

  /** The entry of the id of 32 bytes at `ids[at]`, or NO_ENTRY. */
  find(ids: Uint8Array, at: number): number {
    const found = this.#memory.find(ids, at)
    const own = found < 0 ? NO_ENTRY : this.#inTables + found
    if (this.#parts.length === 0 || (own !== NO_ENTRY && !this.#condemned.has(this.#memory.field(found, 'pack')))) {
      return own
    }
    return this.#findInTables(ids, at, own)
  }

  /** As `find`, but not a blob in a condemned pack. */
  findLasting(ids: Uint8Array, at: number): number {
    const entry = this.find(ids, at)
    return entry !== NO_ENTRY && this.#condemned.has(this.packNumber(entry)) ? NO_ENTRY : entry
  }

  /** Adds the blobs of a pack. Kind 'corrupt' when a record cannot be right. */
  addPack(directory: PackDirectory, isCondemned = false): void {
    if (this.hasPack(directory.pack)) return
    // Looked at as a whole first: a bad directory adds nothing.
    let end = 0
    visitRecords(directory, (_idAt, offset, record) => (end = offset + record.stored))
    if (this.count + directory.count > BLOBS_MAX) {
      const message = `the repository has ${BLOBS_MAX} blobs, the most that Varve keeps track of: begin another repository`
      throw new BlockError('no-space', message)
    }
    const pack = this.#packs.length
    this.#packs.push(directory.pack)
    this.#packEnds.push(end)
    this.#packNumbers.set(directory.pack, pack)
    if (isCondemned) this.#condemned.add(pack)
    const fields = { pack, offset: 0, stored: 0, plainCodec: 0, crc: 0 }
    visitRecords(directory, (idAt, offset, record) => {
      fields.offset = offset
      fields.stored = record.stored
      fields.plainCodec = record.plain * 4 + record.codec
      fields.crc = record.crc
      const before = this.#memory.find(directory.records, idAt)
      const isBetter = !isCondemned && before >= 0 && this.#condemned.has(this.#memory.field(before, 'pack'))
      this.#memory.add(directory.records, idAt, fields, isBetter)
    })
  }

  /** A copy of the entry's id. */
  id(entry: number): Uint8Array {
    if (entry >= this.#inTables) return this.#memory.id(entry - this.#inTables)
    const { table, first } = this.#partOf(entry)
    return table.id(entry - first)
  }

  /** A number for each pack, which stays as it is while the index is there. */
  packNumber(entry: number): number {
    if (entry >= this.#inTables) return this.#memory.field(entry - this.#inTables, 'pack')
    const { table, first, firstPack } = this.#partOf(entry)
    return firstPack + table.field(entry - first, 'pack')
  }

  pack(entry: number): string {
    return this.#packs[this.packNumber(entry)] as string
  }

  /** Where the blobs of the entry's pack end, in bytes. */
  packEnd(entry: number): number {
    return this.#packEnds[this.packNumber(entry)] as number
  }

  /** Length of all blobs of the pack with this number, in bytes. */
  packBytes(number: number): number {
    return Math.max(0, (this.#packEnds[number] as number) - PACK_HEADER_BYTES)
  }

  offset(entry: number): number {
    return this.#field(entry, 'offset')
  }

  stored(entry: number): number {
    return this.#field(entry, 'stored')
  }

  plain(entry: number): number {
    return this.#field(entry, 'plainCodec') >>> 2
  }

  codec(entry: number): number {
    return this.#field(entry, 'plainCodec') & 3
  }

  crc(entry: number): number {
    return this.#field(entry, 'crc')
  }

  /** All entries but those in packs that are gone, in their order. */
  async visit(see: (entry: number, pack: number, stored: number, plain: number) => void): Promise<void> {
    for (const { table, first, firstPack } of this.#parts) {
      await table.scan((bytes, count, start) => {
        for (let i = 0; i < count; i++) {
          const at = i * ENTRY_BYTES
          const pack = firstPack + getUint32(bytes, at + FIELD.pack)
          if (this.#gone.has(pack)) continue
          const plain = getUint32(bytes, at + FIELD.plainCodec) >>> 2
          see(first + start + i, pack, getUint32(bytes, at + FIELD.stored), plain)
        }
      })
    }
    const breather = new Breather()
    for (let own = 0; own < this.#memory.count; own++) {
      const plain = this.#memory.field(own, 'plainCodec') >>> 2
      see(this.#inTables + own, this.#memory.field(own, 'pack'), this.#memory.field(own, 'stored'), plain)
      if ((own & 0xfff) === 0) await breather.pause()
    }
  }

  /** What is in memory now: its entries, the number of its first pack, and its packs from that on. */
  get recent(): Recent {
    const packs = this.#packs.slice(this.#firstOwnPack).map((name, i) => {
      return [name, this.#packEnds[this.#firstOwnPack + i] as number] as const
    })
    return { blobs: this.#memory, count: this.#memory.count, firstPack: this.#firstOwnPack, packs }
  }

  #findInTables(ids: Uint8Array, at: number, otherwise: number): number {
    let second = otherwise
    for (const { table, first, firstPack } of this.#parts) {
      let found = table.find(ids, at)
      for (; found >= 0; found = table.isId(found + 1, ids, at) ? found + 1 : -1) {
        const pack = firstPack + table.field(found, 'pack')
        if (this.#gone.has(pack)) continue
        if (!this.#condemned.has(pack)) return first + found
        if (second === NO_ENTRY) second = first + found
      }
    }
    return second
  }

  #field(entry: number, field: Field): number {
    if (entry >= this.#inTables) return this.#memory.field(entry - this.#inTables, field)
    const { table, first } = this.#partOf(entry)
    return table.field(entry - first, field)
  }

  #partOf(entry: number): Part {
    let part = this.#parts[0] as Part
    for (const other of this.#parts) if (entry >= other.first) part = other
    return part
  }
}

interface Recent {
  readonly blobs: MemoryBlobs
  readonly count: number
  readonly firstPack: number
  readonly packs: readonly (readonly [name: string, end: number])[]
}

const ALL_THERE = { isThere: () => true, isCondemned: () => false }
