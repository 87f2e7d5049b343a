// Bitmaps on their way to another daemon: in pieces of their bytes, those that are all clear left out. The sender remembers what it sent,
// so that at the end, under the guest's eyes, only what changed since goes; the receiver keeps the bits until it is told that they are
// whole. A piece that is sent again takes the place of the one before.
//
//   bits   |....|#..#|....|.#..|      whole:  the second, the fourth piece
//   later  |....|#.##|#...|.#..|      rest:   the second, the third

import { MIGRATE_BITS_BYTES, MIGRATE_BITS_PIECE } from '../base/limits.ts'
import { divideUp } from '../base/round.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import { BlockError } from '../block/error.ts'
import type { BitmapChange, LoggedBitmap } from '../dirtylog/dirty-log.ts'
import type { BitmapPiece, BitmapShape } from './peers.ts'

type Logged = ReadonlyMap<string, LoggedBitmap>

/** The bitmaps of a disk that go along: those of users and backups that are worth something, no job's own. */
export function shapesOf(bitmaps: Logged): BitmapShape[] {
  return [...bitmaps.values()]
    .filter(({ name, state }) => state === 'valid' && !name.startsWith('job:'))
    .map(({ name, bits, recording, meta }) => ({ name, granule: bits.granule, recording, meta }))
}

export class BitmapSender {
  /** The bits that the other side has. */
  readonly #sent = new Map<string, Bitmap>()

  /** The pieces in which the other side lacks something, in batches that fit a request, the last one maybe empty. What is returned counts as sent. */
  rest(bitmaps: Logged): Iterable<BitmapPiece[]> {
    return batches(this.#sent, bitmaps)
  }
}

function* batches(sent: Map<string, Bitmap>, bitmaps: Logged): Iterable<BitmapPiece[]> {
  let batch: BitmapPiece[] = []
  let length = 0
  for (const { name } of shapesOf(bitmaps)) {
    const bits = (bitmaps.get(name) as LoggedBitmap).bits.copy()
    const before = sent.get(name) ?? new Bitmap(bits.size, bits.granule)
    sent.set(name, bits)
    for (const piece of differences(name, before, bits)) {
      batch.push(piece)
      length += piece.bits.length
      if (length < MIGRATE_BITS_BYTES) continue
      yield batch
      batch = []
      length = 0
    }
  }
  yield batch
}

function* differences(name: string, before: Bitmap, now: Bitmap): Iterable<BitmapPiece> {
  const total = divideUp(now.length, 8)
  const old = new Uint8Array(MIGRATE_BITS_PIECE)
  const bytes = Buffer.alloc(MIGRATE_BITS_PIECE)
  for (let first = 0; first < total; first += MIGRATE_BITS_PIECE) {
    const length = Math.min(MIGRATE_BITS_PIECE, total - first)
    before.copyBytes(first, length, old, 0)
    now.copyBytes(first, length, bytes, 0)
    if (bytes.compare(old, 0, length, 0, length) === 0) continue
    yield { name, first, bits: bytes.toString('base64', 0, length) }
  }
}

export class BitmapReceiver {
  readonly #size: number
  readonly #bytes = new Map<string, { readonly granule: number; readonly bytes: Buffer }>()

  /** `size` of the disk, in bytes. */
  constructor(size: number) {
    this.#size = size
  }

  /** Makes room for bitmaps, with no bit set. */
  expect(shapes: readonly BitmapShape[]): void {
    for (const { name, granule } of shapes)
      this.#bytes.set(name, { granule, bytes: Buffer.alloc(bytesOf(this.#size, granule)) })
  }

  /** Kind 'closed' for a bitmap that was not expected, 'invalid-argument' for bits past its end. */
  take(pieces: readonly BitmapPiece[]): void {
    for (const { name, first, bits } of pieces) {
      const { bytes } = this.#find(name)
      const piece = Buffer.from(bits, 'base64')
      if (first + piece.length > bytes.length)
        throw new BlockError('invalid-argument', `bitmap ${name}: ${piece.length} bytes at ${first} are past its end`)
      piece.copy(bytes, first)
    }
  }

  /** The edit of a log that makes its bitmaps these alone. */
  changes(shapes: readonly BitmapShape[], present: Logged): BitmapChange[] {
    const added = shapes.map(({ name, granule, recording, meta }): BitmapChange => {
      const found = this.#find(name)
      if (found.granule !== granule)
        throw new BlockError('closed', `bitmap ${name} has other granules than its bits: they are sent again`)
      return { kind: 'add', name, granule, recording, meta, fill: Bitmap.fromBytes(this.#size, granule, found.bytes) }
    })
    return [...[...present.keys()].map((name): BitmapChange => ({ kind: 'remove', name })), ...added]
  }

  #find(name: string): { readonly granule: number; readonly bytes: Buffer } {
    const found = this.#bytes.get(name)
    if (found !== undefined) return found
    throw new BlockError('closed', `the bits of bitmap ${name} are not here any more: they are sent again`)
  }
}

function bytesOf(size: number, granule: number): number {
  return divideUp(divideUp(size, granule), 8)
}
