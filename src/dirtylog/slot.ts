// Writes and reads one slot: all bitmaps of a disk as they were when an epoch began. Bits first, header last, then a sync, so
// that a slot that was not written to its end has a wrong checksum. Which slot counts is recovery's question.

import { crc32 } from 'node:zlib'
import { Breather } from '../base/breather.ts'
import { getUint32, setUint32, utf8 } from '../base/bytes.ts'
import { DIRTYLOG_DIRECTORY_MAX, DIRTYLOG_PIECE, GRANULE_MAX, GRANULE_MIN } from '../base/limits.ts'
import { divideUp, isPowerOfTwo, roundUp } from '../base/round.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import { pool } from '../block/pool.ts'
import type { HostFile } from '../host/host.ts'
import type { Entry } from './changes.ts'
import { isDurability } from './durability.ts'
import { BITS_ALIGNMENT, HEADER_BYTES, MAGIC, VERSION } from './spec.ts'

export interface SlotContent {
  readonly epoch: number
  readonly bootId: string
  readonly stamp: string | undefined
  /** Bytes of the disk. */
  readonly size: number
  /** The record of this epoch from which on records count. */
  readonly start: number
  readonly nextId: number
  readonly entries: readonly Entry[]
}

/** Writes and syncs a slot. Bits that change meanwhile may be written as they were or as they are. */
export async function writeSlot(file: HostFile, content: SlotContent): Promise<void> {
  const directory = encodeDirectory(content)
  const valid = content.entries.filter((entry) => entry.state === 'valid')
  const bitsChecksum = await writeBits(
    file,
    roundUp(HEADER_BYTES + directory.length, BITS_ALIGNMENT),
    valid.map((entry) => entry.bits),
  )
  const head = Buffer.alloc(HEADER_BYTES + directory.length)
  head.write(MAGIC, 0, 'latin1')
  setUint32(head, 8, VERSION)
  setUint32(head, 12, content.epoch)
  setUint32(head, 16, directory.length)
  setUint32(head, 20, bitsChecksum)
  setUint32(head, 24, crc32(directory))
  setUint32(head, 28, crc32(head.subarray(0, 28)))
  head.set(directory, HEADER_BYTES)
  const written = file.write(0, head.length, head, 0)
  if (written !== undefined) await written
  await file.sync()
}

/** Writes the bits in pieces, letting other work go on in between; returns their checksum. */
async function writeBits(file: HostFile, position: number, bitmaps: readonly Bitmap[]): Promise<number> {
  const breather = new Breather()
  const piece = pool.take(DIRTYLOG_PIECE)
  let checksum = 0
  try {
    for (const bits of bitmaps) {
      const size = byteLength(bits)
      for (let done = 0; done < size; done += DIRTYLOG_PIECE) {
        const length = Math.min(DIRTYLOG_PIECE, size - done)
        bits.copyBytes(done, length, piece, 0)
        checksum = crc32(piece.subarray(0, length), checksum)
        const written = file.write(position, length, piece, 0)
        if (written !== undefined) await written
        position += length
        // Small bitmaps are written at one go.
        const breath = length === DIRTYLOG_PIECE ? breather.pause() : undefined
        if (breath !== undefined) await breath
      }
    }
  } finally {
    pool.give(piece)
  }
  return checksum
}

export interface SlotHeader {
  readonly epoch: number
  readonly directoryLength: number
  readonly bitsChecksum: number
  readonly directoryChecksum: number
}

/** The header of the slot in the file, or undefined when there is none that is whole. */
export async function readSlotHeader(file: HostFile): Promise<SlotHeader | undefined> {
  const head = Buffer.alloc(HEADER_BYTES)
  const read = file.read(0, head.length, head, 0)
  if (read !== undefined) await read
  const isWhole = getUint32(head, 28) === crc32(head.subarray(0, 28))
  if (!isWhole || head.toString('latin1', 0, 8) !== MAGIC || getUint32(head, 8) !== VERSION) return undefined
  return {
    epoch: getUint32(head, 12),
    directoryLength: getUint32(head, 16),
    bitsChecksum: getUint32(head, 20),
    directoryChecksum: getUint32(head, 24),
  }
}

/** The slot with this header, or undefined when what follows the header is damaged. */
export async function readSlot(file: HostFile, header: SlotHeader): Promise<SlotContent | undefined> {
  if (header.directoryLength > DIRTYLOG_DIRECTORY_MAX) return undefined
  const directory = Buffer.alloc(header.directoryLength)
  const read = file.read(HEADER_BYTES, directory.length, directory, 0)
  if (read !== undefined) await read
  if (crc32(directory) !== header.directoryChecksum) return undefined
  const content = decodeDirectory(header.epoch, utf8.decode(directory))
  if (content === undefined) return undefined
  let position = roundUp(HEADER_BYTES + directory.length, BITS_ALIGNMENT)
  let checksum = 0
  for (const entry of content.entries) {
    if (entry.state === 'void') {
      entry.bits.setAll()
      continue
    }
    const bytes = Buffer.allocUnsafeSlow(byteLength(entry.bits))
    const pending = file.read(position, bytes.length, bytes, 0)
    if (pending !== undefined) await pending
    checksum = crc32(bytes, checksum)
    entry.bits = Bitmap.fromBytes(content.size, entry.bits.granule, bytes)
    position += bytes.length
  }
  return checksum === header.bitsChecksum ? content : undefined
}

function byteLength(bits: Bitmap): number {
  return divideUp(bits.length, 8)
}

function encodeDirectory({ bootId, stamp, size, start, nextId, entries }: SlotContent): Uint8Array {
  const bitmaps = entries.map(({ id, name, bits, recording, state, durability, meta }) => {
    return { id, name, granule: bits.granule, recording, state, durability, meta }
  })
  return utf8.encode(JSON.stringify({ bootId, stamp: stamp ?? null, size, start, nextId, bitmaps }))
}

/** The directory with empty bitmaps, or undefined when it is not one that `encodeDirectory` makes. */
function decodeDirectory(epoch: number, text: string): SlotContent | undefined {
  let parsed: unknown
  try {
    parsed = JSON.parse(text)
  } catch {
    return undefined
  }
  const { bootId, stamp, size, start, nextId, bitmaps } = (parsed ?? {}) as Record<string, unknown>
  if (typeof bootId !== 'string' || (stamp !== null && typeof stamp !== 'string')) return undefined
  if (!isCount(size) || !isCount(start) || !isCount(nextId) || !Array.isArray(bitmaps)) return undefined
  const entries = bitmaps.map((bitmap) => decodeEntry(size, bitmap))
  if (!entries.every((entry) => entry !== undefined)) return undefined
  return { epoch, bootId, stamp: stamp ?? undefined, size, start, nextId, entries }
}

function decodeEntry(size: number, bitmap: unknown): Entry | undefined {
  const { id, name, granule, recording, state, durability = 'host', meta } = (bitmap ?? {}) as Record<string, unknown>
  if (!isCount(id) || typeof name !== 'string' || typeof recording !== 'boolean') return undefined
  if ((state !== 'valid' && state !== 'void') || typeof meta !== 'string') return undefined
  if (!isDurability(durability)) return undefined
  if (!isCount(granule) || !isPowerOfTwo(granule) || granule < GRANULE_MIN || granule > GRANULE_MAX) return undefined
  return { id, name, bits: new Bitmap(size, granule), recording, state, durability, meta }
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0
}
