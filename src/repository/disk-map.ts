// Where the content of one disk of a backup is: finds the leaf for an offset, from memory at once where it can.

import { roundDown } from '../base/round.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { FANOUT, ID_BYTES } from './spec.ts'
import type { NodeReader } from './node-reader.ts'
import { checkNode, childAt, levelsFor, spanOf } from './tree.ts'

/** A range of the disk, and the leaf that describes it; without one it reads as zeros. */
export interface MapPiece {
  readonly start: number
  readonly end: number
  readonly leaf: Uint8Array | undefined
}

export class DiskMap {
  readonly size: number
  readonly #root: Uint8Array | undefined
  readonly #top: number
  readonly #nodes: NodeReader
  #last: MapPiece = { start: 0, end: 0, leaf: undefined }

  constructor(size: number, root: Uint8Array | undefined, nodes: NodeReader) {
    this.size = size
    this.#root = root
    this.#top = levelsFor(size)
    this.#nodes = nodes
  }

  /** The leaf that covers `offset`; an empty subtree is one piece. Kind 'corrupt' when a node is damaged. */
  at(offset: number): MapPiece | Promise<MapPiece> {
    if (offset >= this.#last.start && offset < this.#last.end) return this.#last
    let ids = this.#root
    let idAt = 0
    for (let level = this.#top; ; level--) {
      if (ids === undefined || idAt < 0) return this.#found(offset, idAt < 0 ? level : this.#top, undefined)
      const node = this.#nodes.cached(ids, idAt)
      if (node === undefined) return this.#load(offset, ids.slice(idAt, idAt + ID_BYTES), level)
      checkNode(node, level, 'a cached node')
      if (level === 0) return this.#found(offset, 0, node)
      idAt = childAt(node, Math.floor(offset / spanOf(level - 1)) % FANOUT)
      ids = node
    }
  }

  async #load(offset: number, id: Uint8Array, from: number): Promise<MapPiece> {
    let level = from
    try {
      let node = await this.#nodes.load(id, 0, level)
      while (level > 0) {
        level--
        const at = childAt(node, Math.floor(offset / spanOf(level)) % FANOUT)
        if (at < 0) return this.#found(offset, level, undefined)
        node = await this.#nodes.load(node, at, level)
      }
      return this.#found(offset, 0, node)
    } catch (error) {
      if (!isBlockError(error)) throw error
      // The whole of what the node covers is out of reach: whoever verifies must know how much that is.
      const { start, end } = this.#pieceAt(offset, level)
      throw new BlockError(error.kind, error.message, { ...error.place, offset: start, length: end - start }, error)
    }
  }

  #pieceAt(offset: number, level: number): { start: number; end: number } {
    const start = roundDown(offset, spanOf(level))
    return { start, end: Math.min(start + spanOf(level), this.size) }
  }

  #found(offset: number, level: number, leaf: Uint8Array | undefined): MapPiece {
    this.#last = { ...this.#pieceAt(offset, level), leaf }
    return this.#last
  }
}
