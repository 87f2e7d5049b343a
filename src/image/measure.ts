// How large an image file would get: with the data that a source has, and with every block written. The counts are those of
// `qemu-img measure`: the metadata is always that of the full image, so `required` is never too small.

import { utf8 } from '../base/bytes.ts'
import { divideUp, roundUp } from '../base/round.ts'
import { type BlockDevice, type Layer, ZERO } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { Format } from '../chain/open.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { ENTRY_SIZE } from '../format/qcow2/spec.ts'
import type { ImageSettings } from './create-options.ts'

/** Bytes of the file. */
export interface Measured {
  readonly required: number
  readonly 'fully-allocated': number
  /** Of the persistent bitmaps that the source has, in addition; absent where there can be none. */
  readonly bitmaps?: number
}

const SECTOR = 512
const DEFAULT_CLUSTER_SIZE = 64 * 1024
const EXTENDED_ENTRY_SIZE = 16

/** Fixed part of a bitmap's entry in the directory, in bytes. */
const BITMAP_ENTRY = 24

/**
 * What copying the persistent bitmaps of an image would take in another, in bytes: each with its table, and the directory.
 * Inconsistent ones are not copied. Undefined for an image that cannot have any.
 */
export function bitmapBytes(image: Layer, settings: ImageSettings): number | undefined {
  if (!(image instanceof Qcow2Image) || image.header.version === 2) return undefined
  const { clusterSize = DEFAULT_CLUSTER_SIZE } = settings
  let bytes = 0
  let directory = 0
  for (const { name, granularity, isConsistent } of image.bitmaps) {
    if (!isConsistent) continue
    const clusters = divideUp(divideUp(divideUp(image.size, granularity), 8), clusterSize)
    bytes += clusters * clusterSize + roundUp(clusters * ENTRY_SIZE, clusterSize)
    directory += roundUp(BITMAP_ENTRY + utf8.encode(name).length, 8)
  }
  return bytes + roundUp(directory, clusterSize)
}

/** For a disk of `size` bytes; with the data of `source` when there is one. Kind 'invalid-argument' for sizes that cannot be. */
export async function measure(
  format: Format,
  settings: ImageSettings,
  size: number,
  source?: BlockDevice,
): Promise<Measured> {
  if (format === 'raw') return { required: roundUp(size, SECTOR), 'fully-allocated': roundUp(size, SECTOR) }
  const { clusterSize = DEFAULT_CLUSTER_SIZE, preallocation = 'off' } = settings
  const diskBytes = roundUp(size, clusterSize)
  const full = diskBytes + metadataBytes(diskBytes, settings)
  if (!Number.isSafeInteger(full)) throw new BlockError('invalid-argument', `a disk of ${size} bytes cannot be`)
  if (preallocation === 'falloc' || preallocation === 'full') return { required: full, 'fully-allocated': full }
  // With a backing file nobody knows how much of the source it has.
  const isShared = settings.backingName !== undefined
  const dataBytes = source === undefined ? 0 : isShared ? diskBytes : await clustersWithData(source, clusterSize)
  return { required: full - diskBytes + dataBytes, 'fully-allocated': full }
}

/** Bytes of the clusters that hold anything but known zeros. */
async function clustersWithData(source: BlockDevice, clusterSize: number): Promise<number> {
  let bytes = 0
  let offset = 0
  /** End of the last cluster that was counted. */
  let counted = 0
  await source.extents(0, source.size, (length, extent) => {
    const end = roundUp(offset + length, clusterSize)
    const start = Math.max(counted, offset - (offset % clusterSize))
    if ((extent & ZERO) === 0 && end > start) {
      bytes += end - start
      counted = end
    }
    offset += length
    return true
  })
  return bytes
}

/** Header, L1 and L2 tables, refcount table and blocks of a full image, in bytes. */
function metadataBytes(diskBytes: number, settings: ImageSettings): number {
  const { clusterSize = DEFAULT_CLUSTER_SIZE, refcountBits = 16, extendedL2 = false } = settings
  const entry = extendedL2 ? EXTENDED_ENTRY_SIZE : ENTRY_SIZE
  const l2Bytes = roundUp((diskBytes / clusterSize) * entry, clusterSize)
  const l1Bytes = roundUp((l2Bytes / clusterSize) * ENTRY_SIZE, clusterSize)
  const counted = (clusterSize + l2Bytes + l1Bytes + diskBytes) / clusterSize
  // The clusters of the refcount structure are counted in it themselves.
  const perBlock = (clusterSize * 8) / refcountBits
  let own = 0
  for (;;) {
    const blocks = divideUp(counted + own, perBlock)
    const table = divideUp(blocks * ENTRY_SIZE, clusterSize)
    if (blocks + table === own) break
    own = blocks + table
  }
  return clusterSize + l2Bytes + l1Bytes + own * clusterSize
}
