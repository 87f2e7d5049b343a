// Reads a pack as a whole and checks every byte of it: each blob by its checksum, its lock and its id, the rest by the digest at its end.

import { FETCH_BYTES } from '../base/limits.ts'
import { isBlockError } from '../block/error.ts'
import type { Core } from './core.ts'
import { type BlobRecord, packKey, type PackDirectory, readBlobs, recordId, visitRecords } from './pack.ts'
import { ID_BYTES } from './spec.ts'
import { EXPAND_FIELDS, PIECE_GOOD, PIECE_REASONS, sharedMemory } from './squeezer.ts'

/** A blob that is not what its record says. */
export interface BadBlob {
  readonly pack: string
  readonly id: Uint8Array
  readonly reason: string
}

/** A blob in its pack. */
export interface PlacedBlob {
  readonly id: Uint8Array
  readonly offset: number
  readonly record: BlobRecord
}

type Reader = Pick<Core, 'store' | 'squeezer'>

/** The blobs of the pack that are damaged. */
export async function readPack(core: Reader, directory: PackDirectory): Promise<BadBlob[]> {
  const bad: BadBlob[] = []
  await visitPack(core, directory, (blob, _form, reason) => {
    if (reason !== undefined) bad.push({ pack: directory.pack, id: blob.id, reason })
  })
  return bad
}

type Visit = (blob: PlacedBlob, form: Uint8Array, reason: string | undefined) => void

/** Visits each blob of a pack with its stored form, and with what is wrong with it. Of a pack that was cut short, what is there. */
export async function visitPack(reader: Reader, directory: PackDirectory, visit: Visit): Promise<void> {
  const blobs = placedBlobs(directory)
  for (let first = 0; first < blobs.length; ) {
    let end = first + 1
    const start = (blobs[first] as PlacedBlob).offset
    while (end < blobs.length && endOf(blobs[end] as PlacedBlob) - start <= FETCH_BYTES) end++
    const group = blobs.slice(first, end)
    try {
      await visitGroup(reader, directory.pack, group, visit)
    } catch (error) {
      if (!isBlockError(error, 'corrupt')) throw error
      for (const blob of group) await visitAlone(reader, directory.pack, blob, visit)
    }
    first = end
  }
}

async function visitAlone(reader: Reader, pack: string, blob: PlacedBlob, visit: Visit): Promise<void> {
  try {
    await visitGroup(reader, pack, [blob], visit)
  } catch (error) {
    if (!isBlockError(error, 'corrupt')) throw error
    visit(blob, new Uint8Array(0), error.message)
  }
}

/** Neighbours, in one read. */
async function visitGroup(
  { store, squeezer }: Reader,
  pack: string,
  group: readonly PlacedBlob[],
  visit: Visit,
): Promise<void> {
  const start = (group[0] as PlacedBlob).offset
  const bytes = await readBlobs(store, pack, start, endOf(group.at(-1) as PlacedBlob))
  const pieces = new Uint32Array(group.length * EXPAND_FIELDS)
  const ids = new Uint8Array(group.length * ID_BYTES)
  let plainBytes = 0
  for (const [i, { id, offset, record }] of group.entries()) {
    pieces.set([offset - start, record.stored, record.plain, record.codec, record.crc], i * EXPAND_FIELDS)
    ids.set(id, i * ID_BYTES)
    plainBytes += record.plain
  }
  const memory = sharedMemory(bytes.length)
  memory.set(bytes)
  const outcome = await squeezer.expand(memory, pieces, ids, sharedMemory(plainBytes))
  for (const [i, blob] of group.entries()) {
    const found = outcome[i] as number
    const form = bytes.subarray(blob.offset - start, endOf(blob) - start)
    const what = `blob ${Buffer.from(blob.id).toString('hex').slice(0, 16)} at byte ${blob.offset} of ${packKey(pack)}`
    visit(blob, form, found === PIECE_GOOD ? undefined : `${what} is damaged: ${PIECE_REASONS[found] ?? ''}`)
  }
}

/** The blobs of a directory, in their order. */
export function placedBlobs(directory: PackDirectory): PlacedBlob[] {
  const blobs: PlacedBlob[] = []
  visitRecords(directory, (idAt, offset, record) => {
    blobs.push({ id: recordId(directory.records, idAt), offset, record })
  })
  return blobs
}

/** Where the blob ends in its pack. */
export function endOf({ offset, record }: PlacedBlob): number {
  return offset + record.stored
}
