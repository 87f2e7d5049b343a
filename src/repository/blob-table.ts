// Where very many blobs are: a file of their records in the order of their ids, which is not in memory. It is a copy for this host alone,
// made of the repository's indexes, and made again when it is damaged or gone. Nothing in it changes once it is there.
//
//   page of 4096   78 records of 52 bytes | zeros | CRC-32 of the page          record   id 32 | pack | offset | stored | plain * 4 + codec | crc
//   ...
//   after them     first 4 bytes of the first id of each page | JSON: packs, indexes | footer: magic, counts, SHA-256 of this part
//
// Ids are digests, so their first bytes are spread evenly: those of each page's first id, in memory, lead to the page that holds
// an id, and one read of the file finds it or shows that it is not there. A page that was read once leaves behind which values the ninth
// bytes of its ids have: of what is not there, three in four are known by that from then on. A blob that is in several packs has a record for each.

import crypto from 'node:crypto'
import zlib from 'node:zlib'
import { equalBytes, getUint32, getUint64, setUint32, setUint64, utf8 } from '../base/bytes.ts'
import { Breather } from '../base/breather.ts'
import { TABLE_CACHE_BYTES, TABLE_WRITE_BYTES } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import type { HostFile } from '../host/host.ts'
import { ID_BYTES } from './spec.ts'

const PAGE = 4096
const CRC_AT = PAGE - 4
/** Bytes of a record; its fields are 32-bit numbers after the id. */
export const ENTRY_BYTES = 52
export const PAGE_ENTRIES = Math.floor(CRC_AT / ENTRY_BYTES)
const MAGIC = 'VARVTABL'
const VERSION = 1
const FOOTER_BYTES = 64

/** The byte of an id that a page is known by, beside those that it is found by; and words of 32 bits that tell of its 256 values. */
const SIGN_AT = 8
const SIGN_WORDS = 8

/** Places of the fields in a record. */
export const FIELD = { pack: 32, offset: 36, stored: 40, plainCodec: 44, crc: 48 } as const
export type Field = keyof typeof FIELD

/** What a table tells of itself. */
export interface TableNotes {
  /** Each pack by its number in the table, and where its blobs end, in bytes. */
  readonly packs: readonly (readonly [name: string, end: number])[]
  /** Index objects that were taken in, and the packs that each names. */
  readonly indexes: Readonly<Record<string, readonly string[]>>
}

/** Pages of all tables of one repository that were read last: each has one place where it may be. */
export class PageCache {
  readonly #pages = new Uint8Array(TABLE_CACHE_BYTES)
  readonly #owners = new Float64Array(TABLE_CACHE_BYTES / PAGE).fill(-1)
  #tables = 0

  get bytes(): Uint8Array {
    return this.#pages
  }

  /** A number for a table. */
  join(): number {
    return this.#tables++
  }

  /** Where in `bytes` the page is to be; `isThere` says whether it is. */
  place(table: number, page: number): number {
    return ((Math.imul(table, 0x9e37_79b1) + page) >>> 0) % this.#owners.length
  }

  isThere(place: number, table: number, page: number): boolean {
    return this.#owners[place] === table * 2 ** 32 + page
  }

  own(place: number, table: number, page: number): void {
    this.#owners[place] = table * 2 ** 32 + page
  }

  disown(place: number): void {
    this.#owners[place] = -1
  }
}

export class BlobTable {
  readonly path: string
  readonly count: number
  readonly notes: TableNotes
  readonly #file: HostFile
  readonly #cache: PageCache
  readonly #number: number
  readonly #fences: Uint32Array
  /** A bit for each value that a page's signs may have: all of them until it was read. */
  readonly #signs: Uint32Array
  #isDamaged = false

  private constructor(file: HostFile, cache: PageCache, count: number, fences: Uint32Array, notes: TableNotes) {
    this.path = file.path
    this.count = count
    this.notes = notes
    this.#file = file
    this.#cache = cache
    this.#number = cache.join()
    this.#fences = fences
    this.#signs = new Uint32Array(fences.length * SIGN_WORDS).fill(0xffff_ffff)
  }

  /** Takes over the file. Undefined when it is no whole table of this version. */
  static async open(file: HostFile, cache: PageCache): Promise<BlobTable | undefined> {
    const size = file.size()
    const footer = new Uint8Array(FOOTER_BYTES)
    if (size < FOOTER_BYTES) return undefined
    await file.read(size - FOOTER_BYTES, FOOTER_BYTES, footer, 0)
    const count = getUint64(footer, 16)
    const pages = Math.ceil(count / PAGE_ENTRIES)
    const start = pages * PAGE
    if (utf8.decode(footer.subarray(0, 8)) !== MAGIC || getUint32(footer, 8) !== VERSION) return undefined
    if (getUint64(footer, 24) !== size || start + pages * 4 + FOOTER_BYTES > size) return undefined
    const rest = new Uint8Array(size - start - FOOTER_BYTES)
    await file.read(start, rest.length, rest, 0)
    if (!equalBytes(digestOf(rest, footer), footer.subarray(32))) return undefined
    const fences = new Uint32Array(pages)
    for (let page = 0; page < pages; page++) fences[page] = getUint32(rest, page * 4)
    const notes = JSON.parse(utf8.decode(rest.subarray(pages * 4))) as TableNotes
    return new BlobTable(file, cache, count, fences, notes)
  }

  /** A page of it was not what was written: it must go. */
  get isDamaged(): boolean {
    return this.#isDamaged
  }

  /** Memory beside the cache, in bytes, without the notes. */
  get bytes(): number {
    return this.#fences.byteLength + this.#signs.byteLength
  }

  /** The first record of the id, or -1. Those of the same id follow it. */
  find(ids: Uint8Array, at: number): number {
    const key = getUint32(ids, at)
    let page = this.#pageBefore(key)
    for (; page < this.#fences.length && (this.#fences[page] as number) <= key; page++) {
      const found = this.#findInPage(page, ids, at, key)
      if (found >= 0) return found
    }
    return -1
  }

  isId(entry: number, ids: Uint8Array, at: number): boolean {
    if (entry >= this.count) return false
    const place = this.#entryAt(entry)
    return isIdAt(this.#cache.bytes, place, ids, at)
  }

  field(entry: number, field: Field): number {
    return getUint32(this.#cache.bytes, this.#entryAt(entry) + FIELD[field])
  }

  id(entry: number): Uint8Array {
    const place = this.#entryAt(entry)
    return this.#cache.bytes.slice(place, place + ID_BYTES)
  }

  /** All records in order, in pieces: `bytes` has `count` of them, 52 bytes each, until the visit is over. */
  async scan(visit: (bytes: Uint8Array, count: number, first: number) => void): Promise<void> {
    const reader = new TableReader(this)
    const breather = new Breather()
    for (let first = 0; ; ) {
      const count = await reader.next()
      if (count === 0) return
      visit(reader.bytes, count, first)
      first += count
      await breather.pause()
    }
  }

  /** Reads pages from `page` on into `into`, as many as there are and as fit; returns how many. Kind 'io' when one is damaged. */
  async readPages(page: number, into: Uint8Array): Promise<number> {
    const pages = Math.min(this.#fences.length - page, into.length / PAGE)
    if (pages <= 0) return 0
    await this.#file.read(page * PAGE, pages * PAGE, into, 0)
    for (let i = 0; i < pages; i++) this.#checkPage(into, i * PAGE)
    return pages
  }

  close(): Promise<void> {
    return this.#file.close()
  }

  /** The last page whose first id begins with less than `key`, or the first of all: where an id that begins so may be. */
  #pageBefore(key: number): number {
    let low = 0
    let high = this.#fences.length
    while (low < high) {
      const middle = (low + high) >>> 1
      if ((this.#fences[middle] as number) < key) low = middle + 1
      else high = middle
    }
    return Math.max(0, low - 1)
  }

  #findInPage(page: number, ids: Uint8Array, at: number, key: number): number {
    const sign = ids[at + SIGN_AT] as number
    if (((this.#signs[page * SIGN_WORDS + (sign >>> 5)] as number) & (1 << (sign & 31))) === 0) return -1
    const start = this.#load(page)
    const bytes = this.#cache.bytes
    let low = 0
    let high = Math.min(PAGE_ENTRIES, this.count - page * PAGE_ENTRIES)
    const end = high
    while (low < high) {
      const middle = (low + high) >>> 1
      if (getUint32(bytes, start + middle * ENTRY_BYTES) < key) low = middle + 1
      else high = middle
    }
    for (; low < end && getUint32(bytes, start + low * ENTRY_BYTES) === key; low++) {
      if (isIdAt(bytes, start + low * ENTRY_BYTES, ids, at)) return page * PAGE_ENTRIES + low
    }
    return -1
  }

  #entryAt(entry: number): number {
    return this.#load(Math.floor(entry / PAGE_ENTRIES)) + (entry % PAGE_ENTRIES) * ENTRY_BYTES
  }

  /** Where the page is in the cache. */
  #load(page: number): number {
    const cache = this.#cache
    const place = cache.place(this.#number, page)
    const at = place * PAGE
    if (cache.isThere(place, this.#number, page)) return at
    cache.disown(place)
    this.#file.readNow(page * PAGE, PAGE, cache.bytes, at)
    this.#checkPage(cache.bytes, at)
    this.#learnSigns(page, at)
    cache.own(place, this.#number, page)
    return at
  }

  /** Of a page that was read to there. */
  #learnSigns(page: number, at: number): void {
    const bytes = this.#cache.bytes
    const first = page * SIGN_WORDS
    this.#signs.fill(0, first, first + SIGN_WORDS)
    const count = Math.min(PAGE_ENTRIES, this.count - page * PAGE_ENTRIES)
    for (let i = 0; i < count; i++) {
      const sign = bytes[at + i * ENTRY_BYTES + SIGN_AT] as number
      const word = first + (sign >>> 5)
      this.#signs[word] = (this.#signs[word] as number) | (1 << (sign & 31))
    }
  }

  #checkPage(bytes: Uint8Array, at: number): void {
    if (zlib.crc32(bytes.subarray(at, at + CRC_AT)) === getUint32(bytes, at + CRC_AT)) return
    this.#isDamaged = true
    const message = `${this.path}, this host's copy of the repository's index, is damaged: it is made anew when the work is begun again`
    throw new BlockError('io', message, { path: this.path })
  }
}

/** Reads the records of a table one piece after the other, past the cache. */
export class TableReader {
  readonly #table: BlobTable
  readonly #pages = new Uint8Array(TABLE_WRITE_BYTES)
  readonly bytes = new Uint8Array((TABLE_WRITE_BYTES / PAGE) * PAGE_ENTRIES * ENTRY_BYTES)
  #page = 0

  constructor(table: BlobTable) {
    this.#table = table
  }

  /** The next records are in `bytes`: returns how many, 0 at the end. */
  async next(): Promise<number> {
    const pages = await this.#table.readPages(this.#page, this.#pages)
    for (let i = 0; i < pages; i++) {
      const length = PAGE_ENTRIES * ENTRY_BYTES
      this.bytes.set(this.#pages.subarray(i * PAGE, i * PAGE + length), i * length)
    }
    const first = this.#page * PAGE_ENTRIES
    this.#page += pages
    return pages === 0 ? 0 : Math.min(pages * PAGE_ENTRIES, this.#table.count - first)
  }
}

/** Writes a table into an empty file, from records in the order of their ids. */
export class TableWriter {
  readonly #file: HostFile
  readonly #piece = new Uint8Array(TABLE_WRITE_BYTES)
  #used = 0
  #inPage = 0
  #written = 0
  count = 0
  #fences = new Uint32Array(1024)
  #pages = 0

  constructor(file: HostFile) {
    this.#file = file
  }

  /** The record is copied; then its pack's number is made `pack`. A promise when a piece of the file is full. */
  add(bytes: Uint8Array, at: number, pack: number): Promise<void> | undefined {
    if (this.#inPage === 0) this.#beginPage(getUint32(bytes, at))
    const to = this.#used + this.#inPage * ENTRY_BYTES
    for (let i = 0; i < ENTRY_BYTES; i++) this.#piece[to + i] = bytes[at + i] as number
    setUint32(this.#piece, to + FIELD.pack, pack)
    this.count++
    if (++this.#inPage < PAGE_ENTRIES) return undefined
    return this.#endPage()
  }

  async finish(notes: TableNotes): Promise<void> {
    if (this.#inPage > 0) await this.#endPage()
    await this.#flush()
    const text = utf8.encode(JSON.stringify(notes))
    const rest = new Uint8Array(this.#pages * 4 + text.length)
    for (let page = 0; page < this.#pages; page++) setUint32(rest, page * 4, this.#fences[page] as number)
    rest.set(text, this.#pages * 4)
    const footer = new Uint8Array(FOOTER_BYTES)
    footer.set(utf8.encode(MAGIC))
    setUint32(footer, 8, VERSION)
    setUint64(footer, 16, this.count)
    setUint64(footer, 24, this.#written + rest.length + FOOTER_BYTES)
    footer.set(digestOf(rest, footer), 32)
    await this.#file.write(this.#written, rest.length, rest, 0)
    await this.#file.write(this.#written + rest.length, FOOTER_BYTES, footer, 0)
  }

  #beginPage(fence: number): void {
    if (this.#pages === this.#fences.length) {
      const larger = new Uint32Array(this.#fences.length * 2)
      larger.set(this.#fences)
      this.#fences = larger
    }
    this.#fences[this.#pages++] = fence
  }

  #endPage(): Promise<void> | undefined {
    const end = this.#used + CRC_AT
    this.#piece.fill(0, this.#used + this.#inPage * ENTRY_BYTES, end)
    setUint32(this.#piece, end, zlib.crc32(this.#piece.subarray(this.#used, end)))
    this.#used += PAGE
    this.#inPage = 0
    return this.#used < this.#piece.length ? undefined : this.#flush()
  }

  async #flush(): Promise<void> {
    await this.#file.write(this.#written, this.#used, this.#piece, 0)
    this.#written += this.#used
    this.#used = 0
  }
}

function digestOf(rest: Uint8Array, footer: Uint8Array): Uint8Array {
  return crypto.createHash('sha256').update(rest).update(footer.subarray(0, 32)).digest()
}

function isIdAt(bytes: Uint8Array, place: number, ids: Uint8Array, at: number): boolean {
  for (let i = 0; i < ID_BYTES; i++) if (bytes[place + i] !== ids[at + i]) return false
  return true
}
