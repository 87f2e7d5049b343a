// The content of the load's blocks: who wrote it and when, and a pattern made from that, so that any block shows whether it
// is whole and which write it is.
//
//   0 'VARVELOD'   8 block u32   12 zero   16 sequence u64   24 pattern of block and sequence, to the end

import { getUint32, getUint64, setUint32, setUint64 } from '../../base/bytes.ts'

export const LOAD_BLOCK = 4096

const MAGIC = Buffer.from('VARVELOD')
const HEADER_BYTES = 24

/** Fills a block with the stamp of write number `sequence` to load block `index`. */
export function fillBlock(block: Uint8Array, index: number, sequence: number): void {
  block.set(MAGIC, 0)
  setUint32(block, 8, index)
  setUint32(block, 12, 0)
  setUint64(block, 16, sequence)
  let state = (Math.imul(index + 1, 0x9e37_79b9) ^ Math.imul(sequence + 1, 0x85eb_ca6b)) | 0
  for (let at = HEADER_BYTES; at < LOAD_BLOCK; at += 4) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) | 0
    setUint32(block, at, state >>> 0)
  }
}

const expected = Buffer.alloc(LOAD_BLOCK)

/** The sequence in the block at `at`, or -1 when it is not a whole stamp of load block `index`. */
export function readStamp(bytes: Uint8Array, at: number, index: number): number {
  if (getUint32(bytes, at + 8) !== index) return -1
  const sequence = getUint64(bytes, at + 16)
  if (sequence < 0) return -1
  fillBlock(expected, index, sequence)
  return expected.compare(bytes, at, at + LOAD_BLOCK) === 0 ? sequence : -1
}
