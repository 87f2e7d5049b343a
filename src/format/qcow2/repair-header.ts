// Repairs what keeps a qcow2 image from being opened at all: a refcount table that cannot be where the header says, too many
// snapshots, a bitmap directory that cannot be. Works on the bytes of the first cluster; whether the header is then right,
// its reader says (header.ts).

import { getUint32, getUint64, setUint32, setUint64 } from '../../base/bytes.ts'
import {
  QCOW2_BITMAPS_MAX,
  QCOW2_DIRECTORY_MAX,
  QCOW2_REFCOUNT_TABLE_MAX,
  QCOW2_SNAPSHOTS_MAX,
} from '../../base/limits.ts'
import { roundUp } from '../../base/round.ts'
import * as spec from './spec.ts'

/**
 * Mends the header in `bytes`, which has version 2 or 3 and a possible cluster size. Gives what was done, a sentence each.
 * `spareCluster` is the offset of a cluster of zeros, to which a refcount table that is lost can be led; undefined for none.
 */
export function mendHeader(bytes: Uint8Array, fileSize: number, spareCluster: number | undefined): string[] {
  const done: string[] = []
  const { HEADER } = spec
  const clusterSize = bytes.length
  if (spareCluster !== undefined && !isRefcountTablePossible(bytes, clusterSize, fileSize)) {
    setUint64(bytes, HEADER.refcount_table_offset, spareCluster)
    setUint32(bytes, HEADER.refcount_table_clusters, 1)
    done.push('the refcount table cannot be where the header says')
  }
  if (getUint32(bytes, HEADER.nb_snapshots) > QCOW2_SNAPSHOTS_MAX) {
    setUint32(bytes, HEADER.nb_snapshots, QCOW2_SNAPSHOTS_MAX)
    done.push(`the header has more than ${QCOW2_SNAPSHOTS_MAX} snapshots`)
  }
  const at = findExtension(bytes, spec.EXT_BITMAPS)
  if (at !== undefined && !isDirectoryPossible(bytes, at, fileSize)) {
    dropBitmaps(bytes)
    done.push('the bitmap directory cannot be where the header says: the bitmaps are gone')
  }
  return done
}

/** Takes the bitmaps' extension out of the header in `bytes`, and clears its autoclear bit. */
export function dropBitmaps(bytes: Uint8Array): void {
  const at = findExtension(bytes, spec.EXT_BITMAPS)
  if (at === undefined) return
  const end = endOfExtensions(bytes)
  const next = at + 8 + roundUp(getUint32(bytes, at + 4), 8)
  bytes.copyWithin(at, Math.min(next, end), end)
  bytes.fill(0, end - (Math.min(next, end) - at), end)
  const autoclear = spec.HEADER.autoclear_features + 7
  if (getUint32(bytes, spec.HEADER.version) > 2)
    bytes[autoclear] = (bytes[autoclear] as number) & ~spec.AUTOCLEAR_BITMAPS
}

function isRefcountTablePossible(bytes: Uint8Array, clusterSize: number, fileSize: number): boolean {
  const { HEADER } = spec
  const offset = getUint64(bytes, HEADER.refcount_table_offset)
  const length = getUint32(bytes, HEADER.refcount_table_clusters) * clusterSize
  const isSized = length > 0 && length <= roundUp(QCOW2_REFCOUNT_TABLE_MAX, clusterSize)
  const isPlaced = offset >= clusterSize && offset % clusterSize === 0 && offset + length <= fileSize
  const l1 = getUint64(bytes, HEADER.l1_table_offset)
  const l1End = l1 + roundUp(getUint32(bytes, HEADER.l1_size) * spec.ENTRY_SIZE, clusterSize)
  return isSized && isPlaced && (offset >= l1End || offset + length <= l1)
}

function isDirectoryPossible(bytes: Uint8Array, at: number, fileSize: number): boolean {
  if (getUint32(bytes, at + 4) !== 24) return false
  const count = getUint32(bytes, at + 8)
  const size = getUint64(bytes, at + 16)
  const offset = getUint64(bytes, at + 24)
  const isSized = count > 0 && count <= QCOW2_BITMAPS_MAX && size > 0 && size <= QCOW2_DIRECTORY_MAX
  return isSized && offset > 0 && offset % bytes.length === 0 && offset + size <= fileSize
}

function* extensions(bytes: Uint8Array): Generator<{ readonly at: number; readonly end: number }> {
  const version = getUint32(bytes, spec.HEADER.version)
  const nameOffset = getUint64(bytes, spec.HEADER.backing_file_offset)
  const limit = nameOffset > 0 && nameOffset < bytes.length ? nameOffset : bytes.length
  let at = version === 2 ? spec.HEADER_LENGTH_V2 : getUint32(bytes, spec.HEADER.header_length)
  while (at + 8 <= limit && getUint32(bytes, at) !== spec.EXT_END) {
    const end = Math.min(limit, at + 8 + roundUp(getUint32(bytes, at + 4), 8))
    yield { at, end }
    at = end
  }
}

function findExtension(bytes: Uint8Array, type: number): number | undefined {
  for (const { at } of extensions(bytes)) if (getUint32(bytes, at) === type) return at
  return undefined
}

function endOfExtensions(bytes: Uint8Array): number {
  let last = 0
  for (const { end } of extensions(bytes)) last = end
  return last
}
