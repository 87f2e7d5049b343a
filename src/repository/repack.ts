// Copies what is needed of packs into new ones, as it is stored: nothing is decompressed or unlocked. Each blob's checksum is
// looked at on the way, and a pack with damage in what is needed is left as it is.

import zlib from 'node:zlib'
import { FETCH_BYTES } from '../base/limits.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import type { Core } from './core.ts'
import type { LiveSet } from './live-set.ts'
import { packKey, readBlobs, readDirectory } from './pack.ts'
import { endOf, type PlacedBlob, placedBlobs } from './pack-reader.ts'
import type { PackWriter } from './pack-writer.ts'

/** Packs that need not be any more, the bytes that were copied, and packs that are damaged. */
export interface Repacked {
  readonly packs: readonly string[]
  readonly bytes: number
  readonly damaged: readonly string[]
}

/** All copies are durable and indexed when it resolves. */
export async function repack(
  core: Pick<Core, 'store' | 'vault'>,
  live: LiveSet,
  into: PackWriter,
  packs: readonly string[],
  packDone: () => void,
): Promise<Repacked> {
  const done: string[] = []
  const damaged: string[] = []
  let bytes = 0
  for (const pack of packs) {
    try {
      bytes += await copyPack(core, live, into, pack)
      done.push(pack)
    } catch (error) {
      if (!isBlockError(error, 'corrupt') && !isBlockError(error, 'not-found')) throw error
      damaged.push(pack)
    }
    packDone()
  }
  await into.finish()
  return { packs: done, bytes, damaged }
}

async function copyPack(
  { store, vault }: Pick<Core, 'store' | 'vault'>,
  live: LiveSet,
  into: PackWriter,
  pack: string,
): Promise<number> {
  const needed = placedBlobs(await readDirectory(store, vault, pack)).filter(({ id }) => {
    const entry = live.blobs.find(id, 0)
    return entry >= 0 && live.has(entry) && live.blobs.pack(entry) === pack
  })
  let bytes = 0
  for (let first = 0; first < needed.length; ) {
    let last = first
    const start = (needed[first] as PlacedBlob).offset
    while (last + 1 < needed.length && endOf(needed[last + 1] as PlacedBlob) - start <= FETCH_BYTES) last++
    const piece = await readBlobs(store, pack, start, endOf(needed[last] as PlacedBlob))
    for (const { id, offset, record } of needed.slice(first, last + 1)) {
      const form = piece.subarray(offset - start, offset - start + record.stored)
      if (zlib.crc32(form) !== record.crc) {
        const key = packKey(pack)
        throw new BlockError('corrupt', `${store.name}: a blob at ${offset} of ${key} is damaged`, {
          path: key,
          offset,
        })
      }
      into.add(id, form, record)
      bytes += record.stored
    }
    first = last + 1
    const room = into.room()
    if (room !== undefined) await room
  }
  return bytes
}
