// Compares a disk of a backup with an image, or with a disk over NBD, byte for byte.

import path from 'node:path'
import { COPY_PIECE, DIFFERENCES_MAX } from '../base/limits.ts'
import type { BlockDevice } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { Chain } from '../chain/chain.ts'
import { type Format, openChain } from '../chain/open.ts'
import { realHost } from '../host/real.ts'
import { connectNbd } from '../nbd/client.ts'

/** Where two disks differ, by granules of 4096 bytes; so many ranges are listed, and all bytes are counted. */
export interface Differences {
  readonly ranges: readonly { readonly offset: number; readonly length: number }[]
  readonly differentBytes: number
}

const GRANULE = 4096

/** What one has more than the other differs, unless it is zeros. `progress` is told of bytes. */
export async function compareWith(
  device: BlockDevice,
  against: string,
  format: Format | undefined,
  progress: (done: number, total: number) => void,
): Promise<Differences> {
  const other = await openOther(against, format)
  try {
    return await differences(device, other, progress)
  } finally {
    await other.close()
  }
}

async function openOther(against: string, format: Format | undefined): Promise<BlockDevice> {
  if (/^nbds?(\+unix)?:/.test(against)) return connectNbd(against)
  if (format === undefined) {
    throw new BlockError('invalid-argument', `say what ${against} is: -f raw or -f qcow2; a format is never guessed`)
  }
  const file = path.resolve(against)
  return new Chain(file, await openChain({ host: realHost, path: file, format, name: file }))
}

async function differences(
  one: BlockDevice,
  two: BlockDevice,
  progress: (done: number, total: number) => void,
): Promise<Differences> {
  const ranges: { offset: number; length: number }[] = []
  let differentBytes = 0
  const size = Math.max(one.size, two.size)
  const [a, b] = [Buffer.alloc(COPY_PIECE), Buffer.alloc(COPY_PIECE)]
  for (let start = 0; start < size; start += COPY_PIECE) {
    const length = Math.min(COPY_PIECE, size - start)
    await Promise.all([readPadded(one, start, length, a), readPadded(two, start, length, b)])
    for (let at = 0; at < length; at += GRANULE) {
      const end = Math.min(at + GRANULE, length)
      if (a.compare(b, at, end, at, end) === 0) continue
      differentBytes += end - at
      const last = ranges.at(-1)
      if (last !== undefined && last.offset + last.length === start + at) last.length += end - at
      else if (ranges.length < DIFFERENCES_MAX) ranges.push({ offset: start + at, length: end - at })
    }
    progress(start + length, size)
  }
  return { ranges, differentBytes }
}

/** Past the end of a disk there are zeros. */
async function readPadded(device: BlockDevice, offset: number, length: number, into: Buffer): Promise<void> {
  const present = Math.max(0, Math.min(length, device.size - offset))
  if (present > 0) await device.read(offset, present, into, 0)
  into.fill(0, present, length)
}
