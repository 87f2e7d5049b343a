// Where each blob of a repository is: a hash table from id to pack, offset and lengths, in typed arrays, so that a million
// blobs are a few arrays and no objects. Entries are numbered from 0 as they come and never change or go: a blob that is in
// a pack which is about to be removed gets a second entry when it is stored again, and is found by that one from then on.
//
//   slots    [ - | 7 | - | 0 | ... ]      open addressing by the first 4 bytes of the id; entry + 1, or 0
//   entries  pages of 4096: ids (32 bytes each) and 5 numbers each

import { assert } from '../base/assert.ts'
import { getUint32 } from '../base/bytes.ts'
import { BLOBS_MAX } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import { type PackDirectory, visitRecords } from './pack.ts'
import { ID_BYTES, PACK_HEADER_BYTES } from './spec.ts'

const PAGE_ENTRIES = 4096
const FIELDS = 5
const PACK = 0
const OFFSET = 1
const STORED = 2
const PLAIN_CODEC = 3 // plain length * 4 + codec
const CRC = 4
const SLOTS_MIN = 1024

/** Not in the index. */
export const NO_ENTRY = -1

export class BlobIndex {
  #slots = new Uint32Array(SLOTS_MIN)
  #count = 0
  readonly #ids: Uint8Array[] = []
  readonly #fields: Uint32Array[] = []
  readonly #packs: string[] = []
  readonly #packEnds: number[] = []
  readonly #packNumbers = new Map<string, number>()
  readonly #condemned = new Set<number>()

  /** Blobs known. */
  get count(): number {
    return this.#count
  }

  get packs(): number {
    return this.#packs.length
  }

  /** Memory that the arrays take, in bytes. */
  get bytes(): number {
    return this.#slots.byteLength + this.#ids.length * PAGE_ENTRIES * (ID_BYTES + FIELDS * 4)
  }

  hasPack(pack: string): boolean {
    return this.#packNumbers.has(pack)
  }

  /** True for a pack that is about to be removed: what is in it can be read, and is not to be relied on. */
  isCondemned(pack: string): boolean {
    return this.#condemned.has(this.#packNumbers.get(pack) ?? NO_ENTRY)
  }

  /** Names of all packs. */
  packNames(): Iterable<string> {
    return this.#packs
  }

  /** The entry of the id of 32 bytes at `ids[at]`, or NO_ENTRY. */
  find(ids: Uint8Array, at: number): number {
    const mask = this.#slots.length - 1
    for (let slot = getUint32(ids, at) & mask; ; slot = (slot + 1) & mask) {
      const entry = (this.#slots[slot] as number) - 1
      if (entry < 0) return NO_ENTRY
      if (this.#isId(entry, ids, at)) return entry
    }
  }

  /** As `find`, but not a blob in a condemned pack. */
  findLasting(ids: Uint8Array, at: number): number {
    const entry = this.find(ids, at)
    return entry !== NO_ENTRY && this.#condemned.has(this.packNumber(entry)) ? NO_ENTRY : entry
  }

  /**
   * Adds the blobs of a pack that are not known from another, or only from a condemned one. Kind 'corrupt' when a record cannot
   * be right.
   */
  addPack(directory: PackDirectory, isCondemned = false): void {
    if (this.hasPack(directory.pack)) return
    // Looked at as a whole first: a bad directory adds nothing.
    let end = 0
    visitRecords(directory, (_idAt, offset, record) => (end = offset + record.stored))
    const number = this.#packs.length
    this.#packs.push(directory.pack)
    this.#packEnds.push(end)
    this.#packNumbers.set(directory.pack, number)
    if (isCondemned) this.#condemned.add(number)
    visitRecords(directory, (idAt, offset, record) => {
      if ((isCondemned ? this.find(directory.records, idAt) : this.findLasting(directory.records, idAt)) !== NO_ENTRY)
        return
      const entry = this.#insert(directory.records, idAt)
      const fields = this.#fields[Math.floor(entry / PAGE_ENTRIES)] as Uint32Array
      const at = (entry % PAGE_ENTRIES) * FIELDS
      fields[at + PACK] = number
      fields[at + OFFSET] = offset
      fields[at + STORED] = record.stored
      fields[at + PLAIN_CODEC] = record.plain * 4 + record.codec
      fields[at + CRC] = record.crc
    })
  }

  /** A copy of the entry's id. */
  id(entry: number): Uint8Array {
    const at = (entry % PAGE_ENTRIES) * ID_BYTES
    return (this.#ids[Math.floor(entry / PAGE_ENTRIES)] as Uint8Array).slice(at, at + ID_BYTES)
  }

  /** A number for each pack, which stays as it is while the repository is open. */
  packNumber(entry: number): number {
    return this.#field(entry, PACK)
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
    return this.#field(entry, OFFSET)
  }

  stored(entry: number): number {
    return this.#field(entry, STORED)
  }

  plain(entry: number): number {
    return this.#field(entry, PLAIN_CODEC) >>> 2
  }

  codec(entry: number): number {
    return this.#field(entry, PLAIN_CODEC) & 3
  }

  crc(entry: number): number {
    return this.#field(entry, CRC)
  }

  #field(entry: number, field: number): number {
    assert(entry >= 0 && entry < this.#count, 'an entry of the index')
    return (this.#fields[Math.floor(entry / PAGE_ENTRIES)] as Uint32Array)[
      (entry % PAGE_ENTRIES) * FIELDS + field
    ] as number
  }

  #isId(entry: number, ids: Uint8Array, at: number): boolean {
    const page = this.#ids[Math.floor(entry / PAGE_ENTRIES)] as Uint8Array
    const start = (entry % PAGE_ENTRIES) * ID_BYTES
    for (let i = 0; i < ID_BYTES; i++) if (page[start + i] !== ids[at + i]) return false
    return true
  }

  #insert(ids: Uint8Array, at: number): number {
    if (this.#count >= BLOBS_MAX) {
      const message = `the repository has ${BLOBS_MAX} blobs, the most that Varve keeps track of: begin another repository`
      throw new BlockError('no-space', message)
    }
    if ((this.#count + 1) * 4 > this.#slots.length * 3) this.#grow()
    const entry = this.#count++
    if (entry % PAGE_ENTRIES === 0) {
      this.#ids.push(new Uint8Array(PAGE_ENTRIES * ID_BYTES))
      this.#fields.push(new Uint32Array(PAGE_ENTRIES * FIELDS))
    }
    const page = this.#ids[Math.floor(entry / PAGE_ENTRIES)] as Uint8Array
    const start = (entry % PAGE_ENTRIES) * ID_BYTES
    page.set(ids.subarray(at, at + ID_BYTES), start)
    this.#place(page, start, entry)
    return entry
  }

  #place(page: Uint8Array, idAt: number, entry: number): void {
    const mask = this.#slots.length - 1
    let slot = getUint32(page, idAt) & mask
    // An older entry of the same id makes room: entries are placed in their order, so the last one is found.
    while (this.#slots[slot] !== 0 && !this.#isId((this.#slots[slot] as number) - 1, page, idAt))
      slot = (slot + 1) & mask
    this.#slots[slot] = entry + 1
  }

  #grow(): void {
    this.#slots = new Uint32Array(this.#slots.length * 2)
    for (let entry = 0; entry < this.#count; entry++) {
      this.#place(this.#ids[Math.floor(entry / PAGE_ENTRIES)] as Uint8Array, (entry % PAGE_ENTRIES) * ID_BYTES, entry)
    }
  }
}
