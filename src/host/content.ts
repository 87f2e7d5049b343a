// What a simulated file holds: sparse pages, copied on write, so that a clone of a whole host costs next to nothing; and
// the changes to it, as values that can be applied whole, in part or not at all. Only simulated.ts imports this file.

import { copyBytes } from '../base/bytes.ts'
import type { Random } from '../base/random.ts'
import { divideUp } from '../base/round.ts'
import { type ExtentVisitor, HOLE, ZERO } from '../block/device.ts'

const PAGE = 4096

/** What a disk writes whole or not at all, in bytes. */
const SECTOR = 512

/** One change of a file. Values: never changed once made, so that clones share them. */
export type Change =
  | { readonly kind: 'write'; readonly offset: number; readonly data: Uint8Array }
  | { readonly kind: 'punch' | 'zero'; readonly offset: number; readonly length: number }
  | { readonly kind: 'truncate'; readonly size: number }

interface Page {
  readonly bytes: Uint8Array
  /** The content that may write the page in place; any other copies it first. */
  readonly owner: object
}

export class Content {
  size = 0
  #pages = new Map<number, Page>()
  #sharesPages = false
  #owner: object = {}

  /** Bytes of the pages held. */
  get allocated(): number {
    return this.#pages.size * PAGE
  }

  /** An independent copy; both copy a page when they first write it. */
  clone(): Content {
    const other = new Content()
    other.size = this.size
    other.#pages = this.#pages
    other.#sharesPages = true
    this.#sharesPages = true
    this.#owner = {}
    return other
  }

  read(offset: number, length: number, into: Uint8Array, at: number): void {
    for (let done = 0; done < length; ) {
      const inPage = (offset + done) % PAGE
      const piece = Math.min(PAGE - inPage, length - done)
      const page = this.#pages.get(Math.floor((offset + done) / PAGE))
      if (page === undefined) into.fill(0, at + done, at + done + piece)
      else copyBytes(page.bytes, inPage, into, at + done, piece)
      done += piece
    }
  }

  apply(change: Change): void {
    if (change.kind === 'write') this.#write(change.offset, change.data, 0, change.data.length)
    else if (change.kind === 'truncate') this.#truncate(change.size)
    else if (change.kind === 'zero') this.#zero(change.offset, change.length)
    else this.#punch(change.offset, Math.min(change.offset + change.length, this.size))
  }

  /** Applies a part of the change that a power loss may have left: of a write, any of its sectors; else all or nothing. */
  applyTorn(change: Change, random: Random): void {
    if (change.kind !== 'write') {
      if (random.chance(0.5)) this.apply(change)
      return
    }
    const end = change.offset + change.data.length
    for (let at = change.offset; at < end; ) {
      const stop = Math.min(end, (Math.floor(at / SECTOR) + 1) * SECTOR)
      if (random.chance(0.5)) this.#write(at, change.data, at - change.offset, stop - at)
      at = stop
    }
    // A file system may have logged the new length although the data did not arrive.
    if (random.chance(0.25)) this.size = Math.max(this.size, end)
  }

  /** How many bytes of pages a change would allocate. */
  wouldAllocate(change: Change): number {
    if (change.kind === 'truncate' || change.kind === 'punch') return 0
    const length = change.kind === 'write' ? change.data.length : change.length
    const end = divideUp(change.offset + length, PAGE)
    let missing = 0
    for (let index = Math.floor(change.offset / PAGE); index < end; index++) {
      if (!this.#pages.has(index)) missing++
    }
    return missing * PAGE
  }

  extents(offset: number, length: number, visit: ExtentVisitor): void {
    const end = offset + length
    while (offset < end) {
      const index = Math.floor(offset / PAGE)
      const isData = this.#pages.has(index)
      let next = index + 1
      while (next * PAGE < end && this.#pages.has(next) === isData) next++
      const stop = Math.min(end, next * PAGE)
      if (!visit(stop - offset, isData ? 0 : HOLE | ZERO)) return
      offset = stop
    }
  }

  #write(offset: number, from: Uint8Array, at: number, length: number): void {
    for (let done = 0; done < length; ) {
      const inPage = (offset + done) % PAGE
      const piece = Math.min(PAGE - inPage, length - done)
      copyBytes(from, at + done, this.#pageToWrite(Math.floor((offset + done) / PAGE)), inPage, piece)
      done += piece
    }
    this.size = Math.max(this.size, offset + length)
  }

  #zero(offset: number, length: number): void {
    for (let done = 0; done < length; ) {
      const inPage = (offset + done) % PAGE
      const piece = Math.min(PAGE - inPage, length - done)
      this.#pageToWrite(Math.floor((offset + done) / PAGE)).fill(0, inPage, inPage + piece)
      done += piece
    }
    this.size = Math.max(this.size, offset + length)
  }

  #punch(offset: number, end: number): void {
    if (offset >= end) return
    const first = divideUp(offset, PAGE)
    const stop = end === this.size ? divideUp(end, PAGE) : Math.floor(end / PAGE)
    this.#dropPages((index) => index >= first && index < stop)
    this.#clearInPage(offset, Math.min(end, first * PAGE))
    if (stop >= first) this.#clearInPage(stop * PAGE, end)
  }

  /** Zeros a range that lies in one page; nothing when the range is empty or its page is a hole. */
  #clearInPage(offset: number, end: number): void {
    const index = Math.floor(offset / PAGE)
    if (offset < end && this.#pages.has(index))
      this.#pageToWrite(index).fill(0, offset - index * PAGE, end - index * PAGE)
  }

  #truncate(size: number): void {
    if (size < this.size) {
      const kept = divideUp(size, PAGE)
      this.#dropPages((index) => index >= kept)
      if (size % PAGE !== 0 && this.#pages.has(kept - 1)) this.#pageToWrite(kept - 1).fill(0, size % PAGE)
    }
    this.size = size
  }

  #dropPages(isDropped: (index: number) => boolean): void {
    this.#ownPages()
    for (const index of this.#pages.keys()) if (isDropped(index)) this.#pages.delete(index)
  }

  #pageToWrite(index: number): Uint8Array {
    const page = this.#pages.get(index)
    if (page !== undefined && page.owner === this.#owner) return page.bytes
    this.#ownPages()
    const bytes = page === undefined ? new Uint8Array(PAGE) : page.bytes.slice()
    this.#pages.set(index, { bytes, owner: this.#owner })
    return bytes
  }

  #ownPages(): void {
    if (!this.#sharesPages) return
    this.#pages = new Map(this.#pages)
    this.#sharesPages = false
  }
}
