// A disk of a backup for somebody who has most of it already: what a device at hand has is hashed, and only chunks whose id that is not are
// fetched from the repository. What it reads is what the backup holds, wherever the bytes came from. It writes to neither.
//
//   at hand    | aaaa | bxbb | cccc |        hash      = id of a    other     = id of c
//   read       | aaaa | bbbb | cccc |                  at hand      fetched   at hand
//
// A chunk can be told by its hash where the backup shows all of it; of others, as small changes leave them, all is fetched.

import type { BlockDevice, Pending } from '../block/device.ts'
import { isBlockError } from '../block/error.ts'
import { Filter } from '../block/filter.ts'
import { ID_BYTES } from './spec.ts'
import { PLAIN_FIELDS, sharedMemory, type Squeezer } from './squeezer.ts'

/** A chunk of which a disk shows all, at an offset of the disk. */
export interface WholeChunk {
  readonly offset: number
  /** Bytes of the chunk. */
  readonly length: number
  readonly id: Uint8Array
}

export interface LocalFirstOptions {
  /** The disk of the backup. */
  readonly device: BlockDevice
  /** What has most of it, at the same offsets; at least as large, and nobody writes to it while it is read here. */
  readonly local: BlockDevice
  /** The whole chunks in a range of the backup's disk, in order. */
  readonly wholeChunks: (offset: number, length: number) => Promise<WholeChunk[]>
  readonly squeezer: Squeezer
}

export class LocalFirst extends Filter {
  readonly #options: LocalFirstOptions
  readonly #free: Uint8Array<SharedArrayBuffer>[] = []
  /** Bytes that were read from the backup, as they were not at hand. */
  fetchedBytes = 0

  constructor(options: LocalFirstOptions) {
    super(options.device)
    this.#options = options
  }

  override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.#read(offset, length, into, at)
  }

  async #read(offset: number, length: number, into: Uint8Array, at: number): Promise<void> {
    let end = offset
    for (const { offset: start, length: bytes } of await this.#found(offset, length, into, at)) {
      await this.#fetch(end, start, into, at + end - offset)
      end = start + bytes
    }
    await this.#fetch(end, offset + length, into, at + end - offset)
  }

  async #fetch(from: number, to: number, into: Uint8Array, at: number): Promise<void> {
    if (from === to) return
    this.fetchedBytes += to - from
    const pending = this.inner.read(from, to - from, into, at)
    if (pending !== undefined) await pending
  }

  /** Reads what is at hand into the buffer; returns the chunks that were there. */
  async #found(offset: number, length: number, into: Uint8Array, at: number): Promise<WholeChunk[]> {
    const chunks = await this.#chunksOf(offset, length)
    if (chunks.length === 0) return []
    const pending = this.#options.local.read(offset, length, into, at)
    if (pending !== undefined) await pending
    const memory = this.#memory(length)
    memory.set(into.subarray(at, at + length))
    const pieces = new Uint32Array(chunks.length * PLAIN_FIELDS)
    for (const [i, chunk] of chunks.entries()) pieces.set([chunk.offset - offset, chunk.length], i * PLAIN_FIELDS)
    const ids = await this.#options.squeezer.hash(memory, pieces)
    this.#free.push(memory)
    return chunks.filter(({ id }, i) => Buffer.compare(ids.subarray(i * ID_BYTES, (i + 1) * ID_BYTES), id) === 0)
  }

  /** What of the backup's map cannot be read is left to the reading of the backup, which knows where it may have gone. */
  async #chunksOf(offset: number, length: number): Promise<WholeChunk[]> {
    try {
      return await this.#options.wholeChunks(offset, length)
    } catch (error) {
      if (isBlockError(error, 'corrupt')) return []
      throw error
    }
  }

  #memory(length: number): Uint8Array<SharedArrayBuffer> {
    const free = this.#free.pop()
    return free !== undefined && free.length >= length ? free : sharedMemory(length)
  }
}
