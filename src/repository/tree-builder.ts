// Makes the map of a disk from that of its parent (or from nothing) and a list of changes in ascending order. One node of each
// level is open at a time; a node that the changes leave behind is saved, and its id goes to the node above.
//
//   change at offset ----> open leaf ----saved, id----> open node of level 1 ----> ... ----> root

import { assert } from '../base/assert.ts'
import { roundUp } from '../base/round.ts'
import { FANOUT, GRANULE_BYTES } from './spec.ts'
import { levelsFor, OpenNode, spanOf } from './tree.ts'

/** Where the builder takes old nodes from and puts new ones. */
export interface NodeStore {
  /** The bytes of a node of the level, checked. */
  load(ids: Uint8Array, at: number, level: number): Promise<Uint8Array>
  /** Stores a node unless there is one of the same bytes; returns its id. */
  save(bytes: Uint8Array): Uint8Array
}

/** A map: the id of its root (undefined when all reads as zeros) and the size of its disk in bytes. */
export interface TreeRoot {
  readonly root: Uint8Array | undefined
  readonly size: number
}

interface Level {
  /** Which node of its level, counted over the disk. */
  readonly number: number
  readonly node: OpenNode
}

export class TreeBuilder {
  readonly #nodes: NodeStore
  readonly #size: number
  readonly #top: number
  readonly #open: (Level | undefined)[]
  readonly #shrinks: boolean

  private constructor(size: number, nodes: NodeStore, shrinks: boolean, root: OpenNode) {
    this.#size = size
    this.#nodes = nodes
    this.#top = root.level
    this.#shrinks = shrinks
    this.#open = Array.from({ length: this.#top + 1 }, () => undefined)
    this.#open[this.#top] = { number: 0, node: root }
  }

  /** A builder for a disk of `size` bytes that starts as the parent, cut or followed by zeros, or as zeros. */
  static async begin(size: number, nodes: NodeStore, parent?: TreeRoot): Promise<TreeBuilder> {
    const top = levelsFor(size)
    let id = parent?.root
    let level = parent === undefined ? top : levelsFor(parent.size)
    // A disk that shrank may need fewer levels, one that grew may need more: the old root's first child, or a new root.
    for (; id !== undefined && level > top; level--) {
      id = new OpenNode(level, await nodes.load(id, 0, level)).child(0)
    }
    let root: OpenNode | undefined
    for (; id !== undefined && level < top; level++) {
      root = new OpenNode(level + 1)
      root.set(0, 1, id, 0)
      if (root.level < top) id = nodes.save(root.encode() as Uint8Array)
    }
    root ??= new OpenNode(top, id === undefined ? undefined : await nodes.load(id, 0, top))
    return new TreeBuilder(size, nodes, parent !== undefined && parent.size > size, root)
  }

  /** Makes `length` bytes from `offset` show the chunk whose id is at `ids[at]`. */
  async set(offset: number, length: number, ids: Uint8Array, at: number): Promise<void> {
    const leaf = await this.#seek(0, offset)
    leaf.set((offset / GRANULE_BYTES) % FANOUT, Math.ceil(length / GRANULE_BYTES), ids, at)
  }

  /** Makes the range read as zeros. */
  async clear(offset: number, length: number): Promise<void> {
    const end = Math.min(roundUp(offset + length, GRANULE_BYTES), spanOf(this.#top))
    for (let at = offset; at < end; ) {
      // The largest child that lies in the range as a whole: an empty terabyte is a few of them.
      let level = 0
      let unit = GRANULE_BYTES
      while (level < this.#top && at % spanOf(level) === 0 && at + spanOf(level) <= end) unit = spanOf(level++)
      const node = await this.#seek(level, at)
      const first = Math.floor(at / unit) % FANOUT
      const count = Math.min(FANOUT - first, Math.floor((end - at) / unit))
      node.clear(first, count)
      at += count * unit
    }
  }

  /** The id of the new root, or undefined when all reads as zeros. */
  async finish(): Promise<Uint8Array | undefined> {
    const start = roundUp(this.#size, GRANULE_BYTES)
    if (this.#shrinks) await this.clear(start, spanOf(this.#top) - start)
    for (let level = 0; level < this.#top; level++) this.#close(level)
    const bytes = (this.#open[this.#top] as Level).node.encode()
    return bytes === undefined ? undefined : this.#nodes.save(bytes)
  }

  /** Opens the node of the level that holds `offset`, and closes what is open below it or elsewhere. */
  async #seek(level: number, offset: number): Promise<OpenNode> {
    assert(offset < spanOf(this.#top))
    for (let k = 0; k < this.#top; k++) {
      if (k < level || this.#open[k]?.number !== Math.floor(offset / spanOf(k))) this.#close(k)
    }
    for (let k = this.#top - 1; k >= level; k--) {
      if (this.#open[k] !== undefined) continue
      const number = Math.floor(offset / spanOf(k))
      const id = (this.#open[k + 1] as Level).node.child(number % FANOUT)
      this.#open[k] = { number, node: new OpenNode(k, id && (await this.#nodes.load(id, 0, k))) }
    }
    return (this.#open[level] as Level).node
  }

  #close(level: number): void {
    const open = this.#open[level]
    if (open === undefined) return
    this.#open[level] = undefined
    const above = (this.#open[level + 1] as Level).node
    const bytes = open.node.encode()
    const index = open.number % FANOUT
    if (bytes === undefined) above.clear(index, 1)
    else above.set(index, 1, this.#nodes.save(bytes), 0)
  }
}
