// Decompresses a cluster: raw deflate or zstd. What follows the compressed stream in its last sector belongs to others and is
// left alone. Compressing is cluster-compressor.ts.

import zlib from 'node:zlib'
import { BlockError } from '../../block/error.ts'

/** Decompresses `input` to exactly `clusterSize` bytes; kind 'corrupt' when that cannot be. */
export function decompress(
  type: 'zlib' | 'zstd',
  input: Uint8Array,
  clusterSize: number,
  place: { readonly path: string; readonly offset: number },
): Uint8Array {
  let output: Uint8Array
  try {
    output = type === 'zlib' ? inflate(input, clusterSize) : unzstd(input, clusterSize)
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error)
    throw new BlockError('corrupt', `${place.path}: the compressed cluster at ${place.offset}: ${why}`, place, error)
  }
  if (output.length === clusterSize) return output
  const message = `${place.path}: the compressed cluster at ${place.offset} has only ${output.length} bytes`
  throw new BlockError('corrupt', message, place)
}

function inflate(input: Uint8Array, clusterSize: number): Uint8Array {
  // A stream may be cut after a cluster's worth of data: the flush mode accepts an end without the final block.
  return zlib.inflateRawSync(input, { finishFlush: zlib.constants.Z_SYNC_FLUSH, maxOutputLength: clusterSize })
}

function unzstd(input: Uint8Array, clusterSize: number): Uint8Array {
  return zlib.zstdDecompressSync(input.subarray(0, zstdFrameLength(input)), { maxOutputLength: clusterSize })
}

const ZSTD_MAGIC = 0xfd2f_b528
const ZSTD_RLE = 1
const DICTIONARY_BYTES = [0, 1, 2, 4] as const
const CONTENT_SIZE_BYTES = [0, 2, 4, 8] as const

/** Length of the zstd frame at the start of `input` (RFC 8878, section 3.1.1), found by walking its blocks. */
function zstdFrameLength(input: Uint8Array): number {
  const bytes = Buffer.from(input.buffer, input.byteOffset, input.length)
  if (bytes.readUInt32LE(0) !== ZSTD_MAGIC) throw new Error('no zstd frame')
  const descriptor = bytes.readUInt8(4)
  const isSingleSegment = (descriptor & 0x20) !== 0
  const sizeFlag = (descriptor >>> 6) as 0 | 1 | 2 | 3
  const contentSize = sizeFlag === 0 && isSingleSegment ? 1 : CONTENT_SIZE_BYTES[sizeFlag]
  let at = 5 + (isSingleSegment ? 0 : 1) + DICTIONARY_BYTES[(descriptor & 3) as 0 | 1 | 2 | 3] + contentSize
  for (let isLast = false; !isLast; ) {
    const block = bytes.readUIntLE(at, 3)
    isLast = (block & 1) !== 0
    at += 3 + (((block >>> 1) & 3) === ZSTD_RLE ? 1 : block >>> 3)
  }
  return at + ((descriptor & 4) !== 0 ? 4 : 0)
}
