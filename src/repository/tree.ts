// The nodes of a disk's map: their bytes, and the arithmetic of levels. tree-builder.ts makes new trees from old ones,
// disk-map.ts looks things up in them.
//
//   level 1        [ child 0 | child 1 | ... child 63 ]        16 MiB of disk
//                      |          |
//   level 0     [ granule 0..63 ]  ...                         256 KiB: each granule shows a granule of a chunk, or zeros

import { assert } from '../base/assert.ts'
import { BlockError } from '../block/error.ts'
import {
  CHUNK_GRANULES,
  FANOUT,
  ID_BYTES,
  LEAF_BYTES,
  LEAF_HEADER_BYTES,
  LEAF_TAG,
  LEVEL_MAX,
  NODE_HEADER_BYTES,
  NODE_TAG,
  SEGMENT_BYTES,
} from './spec.ts'

/** Bytes of disk that a node of the level covers. */
export function spanOf(level: number): number {
  return LEAF_BYTES * FANOUT ** level
}

/** Largest disk that a map can describe, in bytes: 256 TiB. */
export const DISK_BYTES_MAX = spanOf(LEVEL_MAX)

/** Level of the root for a disk of `size` bytes. */
export function levelsFor(size: number): number {
  let level = 0
  while (spanOf(level) < size) level++
  return level
}

/** A node laid open for change. In a leaf a mark is the granule in the chunk plus one; above, one; nothing is zero. */
export class OpenNode {
  readonly level: number
  readonly #ids = new Uint8Array(FANOUT * ID_BYTES)
  readonly #marks = new Uint8Array(FANOUT)

  /** An empty node, or one that starts as `bytes`, which checkNode has passed. */
  constructor(level: number, bytes?: Uint8Array) {
    this.level = level
    if (bytes === undefined) return
    if (level === 0) this.#openLeaf(bytes)
    else this.#openInner(bytes)
  }

  /** Makes `count` places from `first` show the chunk, from its beginning. In a node above the leaves, count is 1. */
  set(first: number, count: number, ids: Uint8Array, at: number): void {
    assert(first + count <= FANOUT && count <= (this.level === 0 ? CHUNK_GRANULES : 1))
    this.#fill(first, count, 0, ids, at)
  }

  clear(first: number, count: number): void {
    this.#marks.fill(0, first, first + count)
    this.#ids.fill(0, first * ID_BYTES, (first + count) * ID_BYTES)
  }

  /** The id of the child, or undefined when there is none. */
  child(index: number): Uint8Array | undefined {
    if (this.#marks[index] === 0) return undefined
    return this.#ids.subarray(index * ID_BYTES, (index + 1) * ID_BYTES)
  }

  /** The node's bytes, or undefined when all of it reads as zeros. */
  encode(): Uint8Array | undefined {
    if (this.#marks.every((mark) => mark === 0)) return undefined
    return this.level === 0 ? this.#encodeLeaf() : this.#encodeInner()
  }

  #fill(first: number, count: number, inChunk: number, ids: Uint8Array, at: number): void {
    const id = ids.subarray(at, at + ID_BYTES)
    for (let i = 0; i < count; i++) {
      this.#marks[first + i] = inChunk + i + 1
      this.#ids.set(id, (first + i) * ID_BYTES)
    }
  }

  #openLeaf(bytes: Uint8Array): void {
    for (let at = LEAF_HEADER_BYTES; at < bytes.length; at += SEGMENT_BYTES) {
      this.#fill(bytes[at] as number, bytes[at + 1] as number, bytes[at + 2] as number, bytes, at + 3)
    }
  }

  #openInner(bytes: Uint8Array): void {
    for (let i = 0; i < FANOUT; i++) {
      const at = childAt(bytes, i)
      if (at >= 0) this.#fill(i, 1, 0, bytes, at)
    }
  }

  #encodeLeaf(): Uint8Array {
    const bytes = new Uint8Array(LEAF_HEADER_BYTES + FANOUT * SEGMENT_BYTES)
    let end = LEAF_HEADER_BYTES
    for (let first = 0; first < FANOUT; ) {
      const mark = this.#marks[first] as number
      let count = 1
      if (mark > 0) {
        while (this.#continues(first, count)) count++
        bytes[end] = first
        bytes[end + 1] = count
        bytes[end + 2] = mark - 1
        bytes.set(this.#ids.subarray(first * ID_BYTES, (first + 1) * ID_BYTES), end + 3)
        end += SEGMENT_BYTES
      }
      first += count
    }
    bytes[0] = LEAF_TAG
    bytes[1] = (end - LEAF_HEADER_BYTES) / SEGMENT_BYTES
    return bytes.slice(0, end)
  }

  /** True when the granule `count` after `first` shows the next granule of the same chunk. */
  #continues(first: number, count: number): boolean {
    const next = first + count
    if (next >= FANOUT || this.#marks[next] !== (this.#marks[first] as number) + count) return false
    const a = first * ID_BYTES
    const b = next * ID_BYTES
    return Buffer.compare(this.#ids.subarray(a, a + ID_BYTES), this.#ids.subarray(b, b + ID_BYTES)) === 0
  }

  #encodeInner(): Uint8Array {
    const bytes = new Uint8Array(NODE_HEADER_BYTES + FANOUT * ID_BYTES)
    let end = NODE_HEADER_BYTES
    bytes[0] = NODE_TAG
    bytes[1] = this.level
    for (let i = 0; i < FANOUT; i++) {
      const id = this.child(i)
      if (id === undefined) continue
      bytes[2 + (i >>> 3)] = (bytes[2 + (i >>> 3)] as number) | (0x80 >>> (i & 7))
      bytes.set(id, end)
      end += ID_BYTES
    }
    return bytes.slice(0, end)
  }
}

/** Where the id of child `index` is in the bytes of a node above the leaves, or -1 when there is no such child. */
export function childAt(bytes: Uint8Array, index: number): number {
  const own = 2 + (index >>> 3)
  if (((bytes[own] as number) & (0x80 >>> (index & 7))) === 0) return -1
  let before = bitCount((bytes[own] as number) & ~(0xff >>> (index & 7)))
  for (let at = 2; at < own; at++) before += bitCount(bytes[at] as number)
  return NODE_HEADER_BYTES + before * ID_BYTES
}

function bitCount(byte: number): number {
  let count = 0
  for (let rest = byte & 0xff; rest !== 0; rest &= rest - 1) count++
  return count
}

/** Throws kind 'corrupt' unless `bytes` are a well-formed node of the level; `where` names it. */
export function checkNode(bytes: Uint8Array, level: number, where: string): void {
  if (!(level === 0 ? isLeaf(bytes) : isInner(bytes, level))) {
    throw new BlockError('corrupt', `${where} is no node of level ${level} of a disk's map`)
  }
}

function isLeaf(bytes: Uint8Array): boolean {
  const count = bytes[1] as number
  if (bytes[0] !== LEAF_TAG || count === 0 || bytes.length !== LEAF_HEADER_BYTES + count * SEGMENT_BYTES) return false
  let free = 0
  for (let at = LEAF_HEADER_BYTES; at < bytes.length; at += SEGMENT_BYTES) {
    const first = bytes[at] as number
    const granules = bytes[at + 1] as number
    const inChunk = bytes[at + 2] as number
    if (first < free || granules === 0 || inChunk + granules > CHUNK_GRANULES) return false
    free = first + granules
  }
  return free <= FANOUT
}

function isInner(bytes: Uint8Array, level: number): boolean {
  if (bytes[0] !== NODE_TAG || bytes[1] !== level || bytes.length < NODE_HEADER_BYTES + ID_BYTES) return false
  let children = 0
  for (let at = 2; at < NODE_HEADER_BYTES; at++) children += bitCount(bytes[at] as number)
  return bytes.length === NODE_HEADER_BYTES + children * ID_BYTES
}
