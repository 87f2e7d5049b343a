// The bitmaps of a log as its callers see them, and what an edit does to them: all of its changes or none. An edit never
// changes a Bitmap in place, since a fold may be writing it to its slot: it puts another one there.

import { DIRTYLOG_BITMAPS_MAX, DIRTYLOG_NAME_MAX, DIRTYLOG_TEXT_MAX, GRANULE } from '../base/limits.ts'
import { unreachable } from '../base/assert.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import { BlockError } from '../block/error.ts'
import type { Durability } from './durability.ts'

/** A bitmap of a disk. The object stays the same as long as the bitmap lives; `bits` may be another one after an edit. */
export interface LoggedBitmap {
  readonly id: number
  readonly name: string
  /** Only the log changes it. */
  readonly bits: Bitmap
  /** Marks of the disk set its granules. */
  readonly recording: boolean
  /** 'void': it lost what it knew, when the log failed or by a crash that it does not outlive. All its bits are set; only a clear makes it valid again. */
  readonly state: 'valid' | 'void'
  readonly durability: Durability
  /** A text of the caller's, JSON as a rule. */
  readonly meta: string
}

/** Names are 1 to 1023 bytes of UTF-8, texts at most 4 KiB. */
export type BitmapChange =
  | {
      readonly kind: 'add'
      readonly name: string
      /** Bytes; that of the filling bitmap, else 4 KiB, unless told. */
      readonly granule?: number
      readonly recording: boolean
      /** A Bitmap of the disk's size is copied. */
      readonly fill: 'none' | 'all' | Bitmap
      readonly meta?: string
      /** 'host' unless told. */
      readonly durability?: Durability
    }
  | { readonly kind: 'remove'; readonly name: string }
  | { readonly kind: 'rename'; readonly name: string; readonly to: string }
  | { readonly kind: 'record'; readonly name: string; readonly on: boolean }
  /** No granule is set from now on; a void bitmap is valid again. */
  | { readonly kind: 'clear'; readonly name: string }
  /** Sets in `into` what `from` has set. With either one void, `into` is void. */
  | { readonly kind: 'merge'; readonly from: string; readonly into: string }
  /** Clears what `bits` has set: a job is done with it. */
  | { readonly kind: 'subtract'; readonly name: string; readonly bits: Bitmap }
  | { readonly kind: 'meta'; readonly name: string; readonly meta: string }

/** What a log keeps of a bitmap: LoggedBitmap, writable. */
export type Entry = { -readonly [K in keyof LoggedBitmap]: LoggedBitmap[K] }

export interface Directory {
  entries: Map<string, Entry>
  nextId: number
}

/**
 * The directory after the changes; that given is not touched, and the entries are copies with the same ids. Throws kind
 * 'exists', 'not-found' or 'invalid-argument'.
 */
export function applyChanges(directory: Directory, size: number, changes: readonly BitmapChange[]): Directory {
  const entries = new Map(Array.from(directory.entries, ([name, entry]) => [name, { ...entry }]))
  const after: Directory = { entries, nextId: directory.nextId }
  for (const change of changes) applyChange(after, size, change)
  return after
}

function applyChange(directory: Directory, size: number, change: BitmapChange): void {
  const { entries } = directory
  switch (change.kind) {
    case 'add':
      return add(directory, size, change)
    case 'remove':
      find(entries, change.name)
      entries.delete(change.name)
      return
    case 'rename': {
      const entry = find(entries, change.name)
      entries.delete(change.name)
      checkNew(entries, change.to)
      entry.name = change.to
      entries.set(change.to, entry)
      return
    }
    case 'record': {
      const entry = find(entries, change.name)
      // Marks change the bits from now on.
      if (change.on && !entry.recording) entry.bits = entry.bits.copy()
      entry.recording = change.on
      return
    }
    case 'clear': {
      const entry = find(entries, change.name)
      entry.bits = new Bitmap(size, entry.bits.granule)
      entry.state = 'valid'
      return
    }
    case 'merge':
      return merge(find(entries, change.from), find(entries, change.into))
    case 'subtract':
      return subtract(find(entries, change.name), change.bits)
    case 'meta':
      find(entries, change.name).meta = checkText(change.meta, `text of bitmap "${change.name}"`)
      return
    default:
      return unreachable(change)
  }
}

function add(directory: Directory, size: number, change: BitmapChange & { kind: 'add' }): void {
  const { name, fill, recording, meta = '', durability = 'host' } = change
  checkNew(directory.entries, name)
  if (directory.entries.size >= DIRTYLOG_BITMAPS_MAX) {
    throw new BlockError('invalid-argument', `A disk has at most ${DIRTYLOG_BITMAPS_MAX} bitmaps; remove one first`)
  }
  const from = fill instanceof Bitmap ? fill : undefined
  if (from !== undefined && from.size !== size) {
    const message = `Bitmap "${name}": it is filled from a bitmap for ${from.size} bytes, but the disk has ${size}`
    throw new BlockError('invalid-argument', message)
  }
  const granule = change.granule ?? from?.granule ?? GRANULE
  const bits = from?.inGranules(granule) ?? new Bitmap(size, granule)
  if (fill === 'all') bits.setAll()
  const id = directory.nextId++
  directory.entries.set(name, {
    id,
    name,
    bits,
    recording,
    state: 'valid',
    durability,
    meta: checkText(meta, `text of bitmap "${name}"`),
  })
}

function merge(from: Entry, into: Entry): void {
  const bits = into.bits.copy()
  bits.or(from.bits.inGranules(bits.granule))
  into.bits = bits
  if (from.state !== 'void' || into.state === 'void') return
  bits.setAll()
  into.state = 'void'
}

function subtract(entry: Entry, less: Bitmap): void {
  if (entry.state === 'void') return
  const bits = entry.bits.copy()
  const size = Math.min(less.size, bits.size)
  less.runs(0, size, size, (offset, length) => bits.clear(offset, length) >= 0)
  entry.bits = bits
}

function find(entries: Map<string, Entry>, name: string): Entry {
  const entry = entries.get(name)
  if (entry === undefined) throw new BlockError('not-found', `There is no bitmap "${name}" on this disk`)
  return entry
}

function checkNew(entries: Map<string, Entry>, name: string): void {
  if (entries.has(name)) throw new BlockError('exists', `There is a bitmap "${name}" on this disk already`)
  const bytes = Buffer.byteLength(name)
  if (bytes >= 1 && bytes <= DIRTYLOG_NAME_MAX) return
  throw new BlockError('invalid-argument', `A bitmap's name has 1 to ${DIRTYLOG_NAME_MAX} bytes; this one has ${bytes}`)
}

/** The text, if it is short enough; `what` is it for the message. */
export function checkText(text: string, what: string): string {
  if (Buffer.byteLength(text) <= DIRTYLOG_TEXT_MAX) return text
  throw new BlockError('invalid-argument', `The ${what} is longer than ${DIRTYLOG_TEXT_MAX} bytes`)
}
