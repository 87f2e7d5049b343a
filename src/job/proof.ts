// A proof of a bitmap: granules that it calls unchanged, chosen at random, are read from the disk's moment and compared with the earlier
// backup. Where they differ the bitmap has lost a write, and whatever was made by it may be wrong. What follows from that is the caller's.

import { randomInt } from 'node:crypto'
import { PROOF_PIECE } from '../base/limits.ts'
import { Random } from '../base/random.ts'
import { divideUp } from '../base/round.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import type { BlockDevice } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { copyPool } from '../block/pool.ts'
import { differences, readPadded } from './compared-target.ts'
import type { CopySource } from './copier.ts'
import type { Job } from './job.ts'

/** How a proof is asked for. */
export interface ProofWish {
  /** Part of the unchanged granules that is read, above 0 and up to 100. */
  readonly percent: number
  /** Which ones: the same seed chooses the same. */
  readonly seed: number
}

/** A proof of so many percent, if one is asked for, at places that are chosen now. Kind 'invalid-argument' for what is no percentage. */
export function newProof(percent: number | undefined): { readonly proof?: ProofWish } {
  if (percent === undefined) return {}
  if (percent > 0 && percent <= 100) return { proof: { percent, seed: randomInt(2 ** 32) } }
  throw new BlockError('invalid-argument', `a proof reads more than 0 and up to 100 percent, not ${percent}`)
}

/** What a proof found, in bytes of the disk. */
export interface ProofResult extends ProofWish {
  readonly readBytes: number
  readonly differentBytes: number
  /** Where the first difference begins; undefined without one. */
  readonly firstAt: number | undefined
}

/** The granules to read: each one that is not set in `changed`, with the same chance. */
export function chooseUnchanged(changed: Bitmap, { percent, seed }: ProofWish): Bitmap {
  const chosen = new Bitmap(changed.size, changed.granule)
  if (percent >= 100) chosen.setAll()
  else {
    const random = new Random(seed)
    const scale = Math.log1p(-percent / 100)
    // The gaps between those that are chosen, not a throw for each: a small part of a large disk is chosen at once.
    const gap = (): number => Math.floor(Math.log1p(-random.next() / 0x1_0000_0000) / scale)
    for (let index = gap(); index < chosen.length; index += 1 + gap()) chosen.setGranules(index, index + 1)
  }
  chosen.andNot(changed)
  return chosen
}

export interface ProofOptions {
  readonly job: Job
  /** The moment, of which `chosen` can be read. */
  readonly view: CopySource
  readonly before: BlockDevice
  readonly chosen: Bitmap
  readonly wish: ProofWish
  /** Called with each range that was looked at. */
  readonly proved: (offset: number, length: number) => void
}

/** Reads what was chosen and compares. */
export async function prove({ job, view, before, chosen, wish, proved }: ProofOptions): Promise<ProofResult> {
  let readBytes = 0
  let differentBytes = 0
  let firstAt: number | undefined
  for (let first = chosen.nextSet(0); first < chosen.length; ) {
    const offset = first * chosen.granule
    const most = Math.min(chosen.length, divideUp(offset + PROOF_PIECE, chosen.granule))
    const end = Math.min(chosen.nextClear(first, most) * chosen.granule, chosen.size, offset + PROOF_PIECE)
    const length = end - offset
    await job.pausePoint(length)
    const [now, old] = [copyPool.take(length), copyPool.take(length)]
    try {
      const pending = view.read(offset, length, now, 0)
      if (pending !== undefined) await pending
      await readPadded(before, offset, length, old)
      for (const [start, stop] of differences(now, 0, old, length)) {
        firstAt ??= offset + start
        differentBytes += stop - start
      }
    } finally {
      copyPool.give(now)
      copyPool.give(old)
    }
    readBytes += length
    proved(offset, length)
    first = chosen.nextSet(Math.ceil(end / chosen.granule))
  }
  return { ...wish, readBytes, differentBytes, firstAt }
}
