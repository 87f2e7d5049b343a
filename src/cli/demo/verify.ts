// Compares a restored disk with what it must hold: the load's blocks with the journal, all else with the original image.

import { equalBytes } from '../../base/bytes.ts'
import type { BlockDevice } from '../../block/device.ts'
import { realHost } from '../../host/real.ts'
import type { DemoImage } from './image.ts'
import type { Marks } from './load.ts'
import { LOAD_BLOCK, readStamp } from './stamp.ts'

const PIECE = 1024 * 1024
const DIFFERENCES_TOLD = 5

/** What a backup must show of each load block: a write between these two. */
export interface Bounds {
  /** Acknowledged before the moment was asked for. */
  readonly oldest: Marks
  /** Issued before the moment was answered. */
  readonly newest: Marks
}

/** What differs, in words; empty when the whole disk is as it must be. */
export async function findDifferences(
  restored: Pick<BlockDevice, 'size' | 'read'>,
  original: Pick<DemoImage, 'path' | 'size' | 'blocks'>,
  bounds: Bounds,
): Promise<string[]> {
  const loadBlockAt = new Map<number, number>()
  original.blocks.forEach((offset, index) => loadBlockAt.set(offset, index))
  const file = await realHost.open(original.path)
  const found: string[] = []
  const wanted = Buffer.alloc(PIECE)
  const got = Buffer.alloc(PIECE)
  try {
    if (restored.size !== original.size) return [`its size is ${restored.size}, not ${original.size}`]
    for (let start = 0; start < original.size && found.length < DIFFERENCES_TOLD; start += PIECE) {
      await file.read(start, PIECE, wanted, 0)
      await restored.read(start, PIECE, got, 0)
      const isSame = equalBytes(wanted, got)
      for (let at = 0; at < PIECE; at += LOAD_BLOCK) {
        const index = loadBlockAt.get(start + at)
        // A load block that equals the original holds write 0, which the journal may not allow.
        if (isSame && index === undefined) continue
        const difference = compareBlock(wanted, got, at, index, bounds)
        if (difference !== undefined) found.push(`at ${start + at}: ${difference}`)
      }
    }
  } finally {
    await file.close()
  }
  return found
}

function compareBlock(
  wanted: Buffer,
  got: Buffer,
  at: number,
  index: number | undefined,
  bounds: Bounds,
): string | undefined {
  if (index === undefined) {
    const isSame = equalBytes(wanted.subarray(at, at + LOAD_BLOCK), got.subarray(at, at + LOAD_BLOCK))
    return isSame ? undefined : 'a block that nobody wrote has changed'
  }
  const found = readStamp(got, at, index)
  const oldest = bounds.oldest[index] as number
  const newest = bounds.newest[index] as number
  if (found >= oldest && found <= newest) return undefined
  return found < 0 ? 'no whole stamp' : `write ${found}; it must be between ${oldest} and ${newest}`
}
