// The header of a qcow2 image that is to be made: what was asked for, what may not be together, and where the first tables lie.
//
//   | header | refcount table | refcount blocks | L1 table |        each a whole number of clusters

import { setUint64, utf8 } from '../../base/bytes.ts'
import { QCOW2_L1_MAX } from '../../base/limits.ts'
import { divideUp, isPowerOfTwo } from '../../base/round.ts'
import { BlockError } from '../../block/error.ts'
import { withBacking } from './backing.ts'
import { featureNameTable } from './features.ts'
import { encodeHeader, type Header, type HeaderExtension, l1EntriesFor, mapShape } from './header.ts'
import type { Preallocation } from './preallocate.ts'
import * as spec from './spec.ts'

/** As qemu-img names them, and with its defaults unless told. */
export interface CreateOptions {
  /** Bytes of the disk. */
  readonly size: number
  /** Bytes, a power of two from 512 to 2 MiB; 64 KiB unless told. */
  readonly clusterSize?: number
  /** Of the format; 3 unless told. */
  readonly version?: 2 | 3
  /** Width of a refcount: 1, 2, 4, 8, 16, 32 or 64; 16 unless told. */
  readonly refcountBits?: number
  /** Of compressed clusters; zlib unless told. */
  readonly compression?: 'zlib' | 'zstd'
  /** Lets every writer leave refcounts behind until it closes the image, as Varve always does; on unless told, where it can be. */
  readonly lazyRefcounts?: boolean
  /** Maps by subclusters, 32 to a cluster of at least 16 KiB; not unless told. */
  readonly extendedL2?: boolean
  /** Name of an external data file, relative to the image's folder, which is made with the image; none unless told. */
  readonly dataFile?: string
  /** The data file is at all times what the disk reads as; not unless told. */
  readonly dataFileRaw?: boolean
  /**
   * What the image gets before it is written: the whole map, with places for all data ('metadata'), and those reserved on the
   * host ('falloc') or filled with zeros ('full'); nothing unless told.
   */
  readonly preallocation?: Preallocation
  readonly backing?: { readonly name: string; readonly format: string }
}

const DEFAULT_CLUSTER_SIZE = 64 * 1024
const DEFAULT_REFCOUNT_BITS = 16

/** What cannot be, each with what to say about it. The first that holds is said. */
const REFUSALS: readonly (readonly [what: string, isRefused: (options: CreateOptions) => boolean])[] = [
  [
    'a cluster size is a power of two from 512 bytes to 2 MiB',
    ({ clusterSize = DEFAULT_CLUSTER_SIZE }) =>
      !isPowerOfTwo(clusterSize) ||
      clusterSize < 2 ** spec.MIN_CLUSTER_BITS ||
      clusterSize > 2 ** spec.MAX_CLUSTER_BITS,
  ],
  ['a disk cannot have that size', ({ size }) => !Number.isSafeInteger(size) || size < 0],
  [
    'refcounts have 1, 2, 4, 8, 16, 32 or 64 bits',
    ({ refcountBits = DEFAULT_REFCOUNT_BITS }) => !isPowerOfTwo(refcountBits) || refcountBits > 64,
  ],
  ['version 2 has refcounts of 16 bits', (o) => o.version === 2 && (o.refcountBits ?? DEFAULT_REFCOUNT_BITS) !== 16],
  ['version 2 has no lazy refcounts', ({ version, lazyRefcounts }) => version === 2 && lazyRefcounts === true],
  ['version 2 compresses with zlib alone', ({ version, compression }) => version === 2 && compression === 'zstd'],
  ['version 2 has no extended L2 entries', ({ version, extendedL2 }) => version === 2 && extendedL2 === true],
  ['version 2 has no external data file', ({ version, dataFile }) => version === 2 && dataFile !== undefined],
  [
    'extended L2 entries need clusters of 16 KiB or more',
    ({ extendedL2, clusterSize = DEFAULT_CLUSTER_SIZE }) =>
      extendedL2 === true && clusterSize < 2 ** spec.MIN_CLUSTER_BITS_EXTL2,
  ],
  ['a raw data file needs the name of a data file', (o) => o.dataFileRaw === true && o.dataFile === undefined],
  ['a raw data file excludes a backing file', (o) => o.dataFileRaw === true && o.backing !== undefined],
  [
    'an image with a backing file can be preallocated with extended L2 entries alone',
    (o) => o.backing !== undefined && (o.preallocation ?? 'off') !== 'off' && o.extendedL2 !== true,
  ],
]

/** Kind 'invalid-argument' for what cannot be made, with the reason. */
export function newHeader(imagePath: string, options: CreateOptions): Header {
  const invalid = (what: string): BlockError =>
    new BlockError('invalid-argument', `${imagePath}: ${what}`, { path: imagePath })
  const refusal = REFUSALS.find(([, isRefused]) => isRefused(options))
  if (refusal !== undefined) throw invalid(refusal[0])
  const { size, clusterSize = DEFAULT_CLUSTER_SIZE, version = 3, compression = 'zlib', dataFile, backing } = options
  const clusterBits = Math.log2(clusterSize)
  const incompatible = incompatibleOf(options)
  const shape = mapShape(clusterBits, incompatible)
  const refcountOrder = Math.log2(options.refcountBits ?? DEFAULT_REFCOUNT_BITS)
  const l1Size = Math.max(1, l1EntriesFor(size, clusterSize, shape.l2EntrySize))
  if (l1Size * spec.ENTRY_SIZE > QCOW2_L1_MAX)
    throw invalid(`a disk of ${size} bytes needs clusters of more than ${clusterSize} bytes`)
  const header: Header = {
    version,
    size,
    clusterBits,
    clusterSize,
    ...placesOf(divideUp(l1Size * spec.ENTRY_SIZE, clusterSize), clusterSize, refcountOrder),
    l1Size,
    refcountTableOffset: clusterSize,
    refcountOrder,
    snapshotCount: 0,
    snapshotsOffset: 0,
    compression,
    incompatible,
    ...shape,
    dataFile: dataFile === undefined ? undefined : { name: dataFile, isRaw: options.dataFileRaw === true },
    compatible: compatibleOf(options),
    autoclear: new Uint8Array(8).with(7, options.dataFileRaw === true ? spec.AUTOCLEAR_DATA_FILE_RAW : 0),
    moreFields: moreFieldsOf(version, compression),
    extensions: version === 2 ? [] : newExtensions(clusterSize, dataFile),
    bitmaps: undefined,
    backing: undefined,
    backingNameOffset: 0,
  }
  if (encodeHeader(header).length > clusterSize)
    throw invalid(`the data file name ${JSON.stringify(dataFile)} does not fit the header; use a shorter one`)
  return backing === undefined ? header : withBacking(header, backing.name, backing.format, imagePath)
}

function incompatibleOf({ extendedL2, dataFile, compression }: CreateOptions): number {
  return (
    (extendedL2 === true ? spec.INCOMPAT_EXTL2 : 0) |
    (dataFile === undefined ? 0 : spec.INCOMPAT_DATA_FILE) |
    (compression === 'zstd' ? spec.INCOMPAT_COMPRESSION : 0)
  )
}

function compatibleOf({ version, lazyRefcounts = true }: CreateOptions): Uint8Array {
  const bytes = new Uint8Array(8)
  if (version !== 2 && lazyRefcounts) setUint64(bytes, 0, spec.COMPAT_LAZY_REFCOUNTS)
  return bytes
}

/** The compression type and its padding. */
function moreFieldsOf(version: 2 | 3, compression: 'zlib' | 'zstd'): Uint8Array {
  if (version === 2) return new Uint8Array(0)
  const type = compression === 'zstd' ? spec.COMPRESSION_TYPE_ZSTD : spec.COMPRESSION_TYPE_ZLIB
  return new Uint8Array(spec.HEADER_LENGTH - spec.HEADER_LENGTH_V3).with(0, type)
}

/** Room for the refcounts of header, refcount table, refcount blocks and L1 table: as much as counts all of them. */
function placesOf(
  l1Clusters: number,
  clusterSize: number,
  refcountOrder: number,
): Pick<Header, 'l1Offset' | 'refcountTableClusters'> {
  const perBlock = (clusterSize * 8) / 2 ** refcountOrder
  let blocks = 1
  let tableClusters = 1
  const total = (): number => 1 + tableClusters + blocks + l1Clusters
  while (blocks < divideUp(total(), perBlock)) {
    blocks = divideUp(total(), perBlock)
    tableClusters = divideUp(blocks * spec.ENTRY_SIZE, clusterSize)
  }
  return { l1Offset: (1 + tableClusters + blocks) * clusterSize, refcountTableClusters: tableClusters }
}

function newExtensions(clusterSize: number, dataFile: string | undefined): HeaderExtension[] {
  const extensions: HeaderExtension[] = []
  if (dataFile !== undefined) extensions.push({ type: spec.EXT_DATA_FILE, data: utf8.encode(dataFile) })
  // In a smaller cluster it would leave no room for the name of a backing file.
  if (clusterSize > 4096) extensions.push({ type: spec.EXT_FEATURE_TABLE, data: featureNameTable() })
  return extensions
}
