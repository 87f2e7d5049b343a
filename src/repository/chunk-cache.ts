// Plain bytes of chunks, in memory that threads share and that is used again and again: to the garbage collector new buffers for each
// read are so much work that a restore takes twice as long. Memory comes in slabs. A slab takes in what is read until it is full; the
// one whose chunks were not asked for the longest is the next to be emptied, unless somebody holds it.
//
//   slab   | chunks of one read | chunks of the next | ... | left over |
//
// What is in a slab is the affair of the reader, which fills it.

import { assert } from '../base/assert.ts'
import { CHUNK_CACHE_BYTES, CHUNK_SLAB_BYTES } from '../base/limits.ts'
import { sharedMemory } from './squeezer.ts'

/** Memory that many chunks share. */
export interface Slab {
  readonly memory: Uint8Array<SharedArrayBuffer>
  /** Bytes that were given out. */
  used: number
  /** Who counts on its content at the moment. */
  holders: number
  /** When a chunk of it was asked for last, as a number that grows. */
  lastUse: number
  readonly entries: number[]
}

interface Held {
  readonly bytes: Uint8Array
  readonly slab: Slab
}

export class ChunkCache {
  /** By entry of the index. */
  readonly #chunks = new Map<number, Held>()
  readonly #slabs: Slab[] = []
  #filling: Slab | undefined
  #uses = 0
  #most = CHUNK_CACHE_BYTES

  /** Bytes that are kept, when that is more than usual. */
  keep(bytes: number): void {
    this.#most = Math.max(CHUNK_CACHE_BYTES, bytes)
  }

  /** The chunk when it is in memory: good until the next await, and as long as its slab is held. */
  find(entry: number): Uint8Array | undefined {
    const held = this.#chunks.get(entry)
    if (held === undefined) return undefined
    held.slab.lastUse = ++this.#uses
    return held.bytes
  }

  /** Holds the slab of a chunk that is in memory. */
  hold(entry: number): Slab | undefined {
    const slab = this.#chunks.get(entry)?.slab
    if (slab !== undefined) slab.holders++
    return slab
  }

  release(slab: Slab): void {
    assert(slab.holders > 0, 'a slab is released by who held it')
    slab.holders--
  }

  /** Room for so many bytes, in a slab that is held from now on. */
  take(bytes: number): { readonly slab: Slab; readonly into: Uint8Array<SharedArrayBuffer> } {
    assert(bytes <= CHUNK_SLAB_BYTES, 'one read fits into one slab')
    let slab = this.#filling
    if (slab === undefined || slab.used + bytes > CHUNK_SLAB_BYTES) this.#filling = slab = this.#empty()
    const into = slab.memory.subarray(slab.used, slab.used + bytes)
    slab.used += bytes
    slab.holders++
    return { slab, into }
  }

  /** From now on a chunk is found, at this place of its slab. */
  add(entry: number, slab: Slab, bytes: Uint8Array): void {
    if (this.#chunks.has(entry)) return
    this.#chunks.set(entry, { bytes, slab })
    slab.entries.push(entry)
    slab.lastUse = ++this.#uses
  }

  /** Emptied ones first; a new one while there may be more, or all are held. */
  #empty(): Slab {
    while (this.#slabs.length * CHUNK_SLAB_BYTES >= this.#most) {
      const oldest = this.#oldest()
      if (oldest === undefined) break
      for (const entry of oldest.entries) this.#chunks.delete(entry)
      oldest.entries.length = 0
      oldest.used = 0
      if (this.#slabs.length * CHUNK_SLAB_BYTES <= this.#most) return oldest
      this.#slabs.splice(this.#slabs.indexOf(oldest), 1)
    }
    const fresh = { memory: sharedMemory(CHUNK_SLAB_BYTES), used: 0, holders: 0, lastUse: 0, entries: [] }
    this.#slabs.push(fresh)
    return fresh
  }

  #oldest(): Slab | undefined {
    let oldest: Slab | undefined
    for (const slab of this.#slabs) {
      if (slab.holders === 0 && (oldest === undefined || slab.lastUse < oldest.lastUse)) oldest = slab
    }
    return oldest
  }
}
