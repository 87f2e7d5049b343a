// Makes a new, empty qcow2 image of version 3: header, refcount table, refcount blocks and L1 table, one after the other.
// The clusters of the guest's data are allocated as it writes (writer.ts).
//
//   | header | refcount table | refcount blocks | L1 table |        each a whole number of clusters

import path from 'node:path'
import { setUint16, setUint64, utf8 } from '../../base/bytes.ts'
import { QCOW2_L1_MAX } from '../../base/limits.ts'
import { divideUp, isPowerOfTwo, roundUp } from '../../base/round.ts'
import { BlockError } from '../../block/error.ts'
import type { Host, HostFile } from '../../host/host.ts'
import { dataFilePath } from './data-file.ts'
import { featureNameTable } from './features.ts'
import { encodeHeader, type Header, type HeaderExtension, l1EntriesFor, mapShape, placeBackingName } from './header.ts'
import * as spec from './spec.ts'

export interface CreateOptions {
  /** Bytes of the disk. */
  readonly size: number
  /** Bytes, a power of two from 512 to 2 MiB; 64 KiB unless told. */
  readonly clusterSize?: number
  /** Of the format; 3 unless told. */
  readonly version?: 2 | 3
  /** Maps by subclusters, 32 to a cluster of at least 16 KiB; not unless told. */
  readonly extendedL2?: boolean
  /** Name of an external data file, relative to the image's folder, which is made with the image; none unless told. */
  readonly dataFile?: string
  /** The data file is at all times what the disk reads as; not unless told. */
  readonly dataFileRaw?: boolean
  /** Of clusters that are written compressed; zlib unless told. */
  readonly compression?: 'zlib' | 'zstd'
  readonly backing?: { readonly name: string; readonly format: string }
}

const DEFAULT_CLUSTER_SIZE = 64 * 1024

/**
 * Makes an image at `path`, where nothing may be; it and its name are durable on return.
 * Kinds: 'exists', 'invalid-argument' (a size or cluster size that cannot be), and those of the host.
 */
export async function createQcow2(host: Host, imagePath: string, options: CreateOptions): Promise<void> {
  const header = newHeader(imagePath, options)
  const makeImage = (): Promise<void> => makeFile(host, imagePath, (file) => writeImage(file, header))
  if (options.dataFile === undefined) return makeImage()
  // The image leads to its data file, so that comes first.
  const dataPath = dataFilePath(imagePath, options.dataFile)
  await makeFile(host, dataPath, async (data) => {
    await data.truncate(header.size)
    await data.sync()
  })
  try {
    await makeImage()
  } catch (error) {
    await host.unlink(dataPath)
    throw error
  }
}

/** Makes a file, where none may be, which is durable with its name on return, and gone when `fill` fails. */
async function makeFile(host: Host, filePath: string, fill: (file: HostFile) => Promise<void>): Promise<void> {
  const file = await host.open(filePath, { write: true, create: 'exclusive' })
  try {
    try {
      await fill(file)
    } finally {
      await file.close()
    }
  } catch (error) {
    await host.unlink(filePath)
    throw error
  }
  await host.syncFolder(path.dirname(filePath))
}

function newHeader(imagePath: string, options: CreateOptions): Header {
  const {
    size,
    clusterSize = DEFAULT_CLUSTER_SIZE,
    version = 3,
    extendedL2 = false,
    compression = 'zlib',
    dataFile,
    dataFileRaw = false,
    backing,
  } = options
  const invalid = (what: string): BlockError =>
    new BlockError('invalid-argument', `${imagePath}: ${what}`, { path: imagePath })
  const bits = Math.log2(clusterSize)
  if (!isPowerOfTwo(clusterSize) || bits < spec.MIN_CLUSTER_BITS || bits > spec.MAX_CLUSTER_BITS)
    throw invalid(`a cluster size is a power of two from 512 bytes to 2 MiB, not ${clusterSize}`)
  if (extendedL2 && version === 2) throw invalid('extended L2 entries need version 3')
  if (extendedL2 && bits < spec.MIN_CLUSTER_BITS_EXTL2)
    throw invalid(`extended L2 entries need clusters of 16 KiB or more, not ${clusterSize} bytes`)
  if (!Number.isSafeInteger(size) || size < 0) throw invalid(`a disk cannot have ${size} bytes`)
  if (dataFileRaw && (dataFile === undefined || backing !== undefined))
    throw invalid('a raw data file needs a name and excludes a backing file')
  if (compression === 'zstd' && version === 2) throw invalid('zstd compression needs version 3')
  const incompatible = incompatibleBits(options)
  const shape = mapShape(bits, incompatible)
  const l1Size = Math.max(1, l1EntriesFor(size, clusterSize, shape.l2EntrySize))
  if (l1Size * spec.ENTRY_SIZE > QCOW2_L1_MAX)
    throw invalid(`a disk of ${size} bytes needs clusters of more than ${clusterSize} bytes`)

  const perBlock = clusterSize / 2
  const l1Clusters = divideUp(l1Size * spec.ENTRY_SIZE, clusterSize)
  let blocks = 1
  let tableClusters = 1
  const total = (): number => 1 + tableClusters + blocks + l1Clusters
  while (blocks < divideUp(total(), perBlock)) {
    blocks = divideUp(total(), perBlock)
    tableClusters = divideUp(blocks * spec.ENTRY_SIZE, clusterSize)
  }
  const compatible = new Uint8Array(8)
  if (version === 3) setUint64(compatible, 0, spec.COMPAT_LAZY_REFCOUNTS)
  const header: Header = {
    version,
    size,
    clusterBits: bits,
    clusterSize,
    l1Offset: (1 + tableClusters + blocks) * clusterSize,
    l1Size,
    refcountTableOffset: clusterSize,
    refcountTableClusters: tableClusters,
    refcountOrder: spec.DEFAULT_REFCOUNT_ORDER,
    snapshotCount: 0,
    snapshotsOffset: 0,
    compression,
    incompatible,
    ...shape,
    dataFile: dataFile === undefined ? undefined : { name: dataFile, isRaw: dataFileRaw },
    compatible,
    autoclear: dataFileRaw ? Uint8Array.of(0, 0, 0, 0, 0, 0, 0, spec.AUTOCLEAR_DATA_FILE_RAW) : new Uint8Array(8),
    moreFields: version === 2 ? new Uint8Array(0) : newFields(compression),
    extensions: version === 2 ? [] : newExtensions(clusterSize, dataFile),
    bitmaps: undefined,
    backing: undefined,
    backingNameOffset: 0,
  }
  if (encodeHeader(header).length > clusterSize)
    throw invalid(`the data file name ${JSON.stringify(dataFile)} does not fit the header; use a shorter one`)
  return backing === undefined ? header : withBacking(header, backing.name, backing.format, imagePath)
}

function incompatibleBits({ extendedL2, dataFile, compression }: CreateOptions): number {
  const map = extendedL2 === true ? spec.INCOMPAT_EXTL2 : 0
  const data = dataFile === undefined ? 0 : spec.INCOMPAT_DATA_FILE
  return map | data | (compression === 'zstd' ? spec.INCOMPAT_COMPRESSION : 0)
}

/** The fields after those of version 3: the compression type in the first byte. */
function newFields(compression: 'zlib' | 'zstd'): Uint8Array {
  const fields = new Uint8Array(spec.HEADER_LENGTH - spec.HEADER_LENGTH_V3)
  fields[0] = compression === 'zstd' ? spec.COMPRESSION_TYPE_ZSTD : spec.COMPRESSION_TYPE_ZLIB
  return fields
}

function newExtensions(clusterSize: number, dataFile: string | undefined): HeaderExtension[] {
  const extensions: HeaderExtension[] = []
  if (dataFile !== undefined) extensions.push({ type: spec.EXT_DATA_FILE, data: utf8.encode(dataFile) })
  // In a smaller cluster it would leave no room for the name of a backing file.
  if (clusterSize > 4096) extensions.push({ type: spec.EXT_FEATURE_TABLE, data: featureNameTable() })
  return extensions
}

/** The header with another backing reference, its name placed beside the old one; kind 'invalid-argument' when it does not fit. */
function withBacking(header: Header, name: string, format: string, imagePath: string): Header {
  const length = utf8.encode(name).length
  const isPossible = length > 0 && length <= spec.MAX_BACKING_NAME && !name.includes('\0')
  const changed: Header = { ...header, backing: { name, format } }
  const extensionsEnd = Math.max(encodeHeader(header).length, encodeHeader(changed).length)
  const offset = isPossible ? placeBackingName(header, extensionsEnd, length) : -1
  if (offset < 0) {
    const message = `${imagePath}: the backing file name ${JSON.stringify(name)} does not fit the header; use a shorter one`
    throw new BlockError('invalid-argument', message, { path: imagePath })
  }
  return { ...changed, backingNameOffset: offset }
}

/** Names another backing file in the header of the image in `file`, durably. Kind as for `withBacking`. */
export async function rewriteBacking(file: HostFile, header: Header, name: string, format: string): Promise<void> {
  const changed = withBacking(header, name, format, file.path)
  // First the name, beside the old one, then the fields that lead to it: a crash leaves one or the other.
  const nameBytes = utf8.encode(name)
  await file.write(changed.backingNameOffset, nameBytes.length, nameBytes, 0)
  await file.sync()
  const bytes = encodeHeader(changed)
  await file.write(0, bytes.length, bytes, 0)
  await file.sync()
  header.backing = changed.backing
  header.backingNameOffset = changed.backingNameOffset
}

/** Makes the header name no backing file, durably. */
export async function removeBacking(file: HostFile, header: Header): Promise<void> {
  // The two fields are neighbours in one sector. The format may stay behind: without a file it means nothing.
  const fields = new Uint8Array(spec.HEADER.cluster_bits - spec.HEADER.backing_file_offset)
  await file.write(spec.HEADER.backing_file_offset, fields.length, fields, 0)
  await file.sync()
  header.backing = undefined
  header.backingNameOffset = 0
}

async function writeImage(file: HostFile, header: Header): Promise<void> {
  const { clusterSize } = header
  const clusters = header.l1Offset / clusterSize + divideUp(header.l1Size * spec.ENTRY_SIZE, clusterSize)
  await file.truncate(clusters * clusterSize)
  const blocksOffset = header.refcountTableOffset + header.refcountTableClusters * clusterSize
  const blocks = (header.l1Offset - blocksOffset) / clusterSize
  const table = new Uint8Array(blocks * spec.ENTRY_SIZE)
  for (let i = 0; i < blocks; i++) setUint64(table, i * spec.ENTRY_SIZE, blocksOffset + i * clusterSize)
  await file.write(header.refcountTableOffset, table.length, table, 0)
  const counts = new Uint8Array(roundUp(clusters * 2, clusterSize))
  for (let i = 0; i < clusters; i++) setUint16(counts, i * 2, 1)
  await file.write(blocksOffset, counts.length, counts, 0)
  if (header.backing !== undefined) {
    const name = utf8.encode(header.backing.name)
    await file.write(header.backingNameOffset, name.length, name, 0)
  }
  const bytes = encodeHeader(header)
  await file.write(0, bytes.length, bytes, 0)
  await file.sync()
}
