// Where blobs are, in memory: a hash table from id to pack, offset and lengths, in typed arrays, so that a million blobs are a few arrays
// and no objects. Entries are numbered from 0 as they come and never change or go.
//
//   slots    [ - | 7 | - | 0 | ... ]      open addressing by the first 4 bytes of the id; entry + 1, or 0
//   entries  pages of 4096: ids (32 bytes each) and 5 numbers each
//
// A blob that comes again, from another pack, has an entry of its own; which of them is found is up to who adds it.

import { assert } from '../base/assert.ts'
import { Breather } from '../base/breather.ts'
import { getUint32, setUint32 } from '../base/bytes.ts'
import { type Field, FIELD } from './blob-table.ts'
import { ID_BYTES } from './spec.ts'

const PAGE_ENTRIES = 4096
const FIELDS = 5
const PLACE: Readonly<Record<Field, number>> = { pack: 0, offset: 1, stored: 2, plainCodec: 3, crc: 4 }
const NAMES = Object.keys(PLACE) as Field[]
const SLOTS_MIN = 1024

export class MemoryBlobs {
  #slots = new Uint32Array(SLOTS_MIN)
  #used = 0
  #count = 0
  readonly #ids: Uint8Array[] = []
  readonly #fields: Uint32Array[] = []

  get count(): number {
    return this.#count
  }

  /** Memory that the arrays take, in bytes. */
  get bytes(): number {
    return this.#slots.byteLength + this.#ids.length * PAGE_ENTRIES * (ID_BYTES + FIELDS * 4)
  }

  /** The entry of the id of 32 bytes at `ids[at]`, or -1. */
  find(ids: Uint8Array, at: number): number {
    return (this.#slots[this.#slotOf(ids, at)] as number) - 1
  }

  /** Adds an entry, which is found from now on when `isFound`, or else only when there is no other of this id. */
  add(ids: Uint8Array, at: number, fields: Readonly<Record<Field, number>>, isFound: boolean): void {
    if ((this.#used + 1) * 4 > this.#slots.length * 3) this.#grow()
    const entry = this.#count++
    if (entry % PAGE_ENTRIES === 0) {
      this.#ids.push(new Uint8Array(PAGE_ENTRIES * ID_BYTES))
      this.#fields.push(new Uint32Array(PAGE_ENTRIES * FIELDS))
    }
    const page = this.#ids[Math.floor(entry / PAGE_ENTRIES)] as Uint8Array
    page.set(ids.subarray(at, at + ID_BYTES), (entry % PAGE_ENTRIES) * ID_BYTES)
    const numbers = this.#fields[Math.floor(entry / PAGE_ENTRIES)] as Uint32Array
    for (const field of NAMES) numbers[(entry % PAGE_ENTRIES) * FIELDS + PLACE[field]] = fields[field]
    const slot = this.#slotOf(ids, at)
    if (this.#slots[slot] === 0) this.#used++
    if (this.#slots[slot] === 0 || isFound) this.#slots[slot] = entry + 1
  }

  field(entry: number, field: Field): number {
    assert(entry >= 0 && entry < this.#count, 'an entry of the index')
    const page = this.#fields[Math.floor(entry / PAGE_ENTRIES)] as Uint32Array
    return page[(entry % PAGE_ENTRIES) * FIELDS + PLACE[field]] as number
  }

  /** A copy of the entry's id. */
  id(entry: number): Uint8Array {
    const at = (entry % PAGE_ENTRIES) * ID_BYTES
    return this.#page(entry).slice(at, at + ID_BYTES)
  }

  /** The first `count` entries in the order of their ids. */
  async sorted(count: number): Promise<Uint32Array> {
    const breather = new Breather()
    // By the first two bytes in one go, which leaves short runs.
    const starts = new Uint32Array(65_537)
    for (let entry = 0; entry < count; entry++) {
      const next = (this.#key(entry) >>> 16) + 1
      starts[next] = (starts[next] as number) + 1
      if ((entry & 0xfff) === 0) await breather.pause()
    }
    for (let i = 1; i < starts.length; i++) starts[i] = (starts[i] as number) + (starts[i - 1] as number)
    const order = new Uint32Array(count)
    const ends = starts.slice()
    for (let entry = 0; entry < count; entry++) {
      const run = this.#key(entry) >>> 16
      order[ends[run] as number] = entry
      ends[run] = (ends[run] as number) + 1
      if ((entry & 0xfff) === 0) await breather.pause()
    }
    for (let run = 0; run < 65_536; run++) {
      const start = starts[run] as number
      const end = starts[run + 1] as number
      if (end - start > 1) order.subarray(start, end).sort((a, b) => this.#compare(a, b))
      if ((run & 0x3f) === 0) await breather.pause()
    }
    return order
  }

  /** Writes the entry as a record of a table (blob-table.ts). */
  copy(entry: number, into: Uint8Array, at: number): void {
    const idAt = (entry % PAGE_ENTRIES) * ID_BYTES
    const page = this.#page(entry)
    for (let i = 0; i < ID_BYTES; i++) into[at + i] = page[idAt + i] as number
    for (const field of NAMES) setUint32(into, at + FIELD[field], this.field(entry, field))
  }

  #page(entry: number): Uint8Array {
    return this.#ids[Math.floor(entry / PAGE_ENTRIES)] as Uint8Array
  }

  #key(entry: number): number {
    return getUint32(this.#page(entry), (entry % PAGE_ENTRIES) * ID_BYTES)
  }

  #compare(a: number, b: number): number {
    const aAt = (a % PAGE_ENTRIES) * ID_BYTES
    const bAt = (b % PAGE_ENTRIES) * ID_BYTES
    const aPage = this.#page(a)
    const bPage = this.#page(b)
    for (let i = 0; i < ID_BYTES; i++) {
      const difference = (aPage[aAt + i] as number) - (bPage[bAt + i] as number)
      if (difference !== 0) return difference
    }
    return a - b
  }

  /** The slot that has the id, or the free one where it belongs. */
  #slotOf(ids: Uint8Array, at: number): number {
    const mask = this.#slots.length - 1
    let slot = getUint32(ids, at) & mask
    while (this.#slots[slot] !== 0 && !this.#isId((this.#slots[slot] as number) - 1, ids, at)) slot = (slot + 1) & mask
    return slot
  }

  #isId(entry: number, ids: Uint8Array, at: number): boolean {
    const page = this.#page(entry)
    const start = (entry % PAGE_ENTRIES) * ID_BYTES
    for (let i = 0; i < ID_BYTES; i++) if (page[start + i] !== ids[at + i]) return false
    return true
  }

  #grow(): void {
    const before = this.#slots
    this.#slots = new Uint32Array(before.length * 2)
    for (const taken of before) {
      if (taken === 0) continue
      const entry = taken - 1
      this.#slots[this.#slotOf(this.#page(entry), (entry % PAGE_ENTRIES) * ID_BYTES)] = taken
    }
  }
}
