// Reads nodes of maps out of packs, checks them, and keeps the recent ones. Nodes of one map lie close together in
// their packs, so they are taken from larger pieces (windows) of which some are kept too.

import { equalBytes } from '../base/bytes.ts'
import { NODE_CACHE_NODES, NODE_WINDOW_BYTES, NODE_WINDOWS } from '../base/limits.ts'
import { roundDown } from '../base/round.ts'
import { BlockError } from '../block/error.ts'
import { type BlobIndex, NO_ENTRY } from './blob-index.ts'
import { packKey, readBlobs } from './pack.ts'
import { CODEC_ZSTD, ID_BYTES } from './spec.ts'
import type { ObjectStore } from './store.ts'
import { checkNode } from './tree.ts'
import type { Vault } from './vault.ts'

export class NodeReader {
  readonly #store: ObjectStore
  readonly #vault: Vault
  readonly #index: BlobIndex
  /** By entry of the index; the order is that of use, oldest first. */
  readonly #nodes = new Map<number, Uint8Array>()
  /** Packs that nodes were read from. */
  readonly packs = new Set<string>()
  readonly #windows = new Map<string, Promise<Uint8Array>>()

  constructor(store: ObjectStore, vault: Vault, index: BlobIndex) {
    this.#store = store
    this.#vault = vault
    this.#index = index
  }

  /** The node when it is in memory. */
  cached(ids: Uint8Array, at: number): Uint8Array | undefined {
    const entry = this.#index.find(ids, at)
    const found = this.#nodes.get(entry)
    if (found === undefined) return undefined
    this.#nodes.delete(entry)
    this.#nodes.set(entry, found)
    return found
  }

  /** The bytes of a node of the level, checked. Kind 'corrupt' when it is damaged or in no pack. */
  async load(ids: Uint8Array, at: number, level: number): Promise<Uint8Array> {
    const cached = this.cached(ids, at)
    const bytes = cached ?? (await this.#read(ids.slice(at, at + ID_BYTES)))
    checkNode(bytes, level, nodeName(ids.subarray(at, at + ID_BYTES)))
    return bytes
  }

  async #read(id: Uint8Array): Promise<Uint8Array> {
    const entry = this.#index.find(id, 0)
    if (entry === NO_ENTRY) {
      throw new BlockError('corrupt', `${this.#store.name}: ${nodeName(id)} is in no pack: packs are missing`)
    }
    this.packs.add(this.#index.pack(entry))
    const key = packKey(this.#index.pack(entry))
    const bytes = this.#vault.unlock(await this.#bytes(entry), id)
    if (
      (this.#index.codec(entry) & CODEC_ZSTD) !== 0 ||
      bytes === undefined ||
      !equalBytes(this.#vault.idOf(bytes), id)
    ) {
      throw new BlockError('corrupt', `${this.#store.name}: ${nodeName(id)} in ${key} is damaged`, { path: key })
    }
    this.#nodes.set(entry, bytes)
    if (this.#nodes.size > NODE_CACHE_NODES) this.#nodes.delete(this.#nodes.keys().next().value as number)
    return bytes
  }

  async #bytes(entry: number): Promise<Uint8Array> {
    const pack = this.#index.pack(entry)
    const offset = this.#index.offset(entry)
    const end = offset + this.#index.stored(entry)
    const start = roundDown(offset, NODE_WINDOW_BYTES)
    const windowEnd = Math.min(start + NODE_WINDOW_BYTES, this.#index.packEnd(entry))
    if (end > windowEnd) return readBlobs(this.#store, pack, offset, end)
    const window = await this.#window(pack, start, windowEnd)
    // A copy: a node that is kept must not keep its window.
    return window.slice(offset - start, end - start)
  }

  #window(pack: string, start: number, end: number): Promise<Uint8Array> {
    const name = `${pack}:${start}`
    const found = this.#windows.get(name)
    this.#windows.delete(name)
    const window = found ?? readBlobs(this.#store, pack, start, end)
    this.#windows.set(name, window)
    if (found === undefined) window.catch(() => this.#windows.delete(name))
    if (this.#windows.size > NODE_WINDOWS) this.#windows.delete(this.#windows.keys().next().value as string)
    return window
  }
}

function nodeName(id: Uint8Array): string {
  return `node ${Buffer.from(id).toString('hex').slice(0, 16)}`
}
