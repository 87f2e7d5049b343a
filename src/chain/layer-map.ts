// The resolved layer map: which layer of a chain holds each cluster of the disk, so that a read costs the same however
// deep the chain is. Built on demand, a page at a time, by asking every layer once; dropped where a write, zero or trim may
// have changed the answer. Bounded: over its budget it forgets the oldest page.
//
//   layers   2  . . B .        unit of the map: the smallest cluster of the layers above the base
//            1  . A A .        map    0 1 2 0   + 1, so that 0 means "not resolved yet"
//            0  a b c d

import { LAYER_MAP_BYTES, LAYER_MAP_PAGE } from '../base/limits.ts'
import { divideUp, roundDown, roundUp } from '../base/round.ts'
import { type Layer, UNALLOCATED } from '../block/device.ts'

/** One byte an entry: deeper chains are read without a map. */
const LAYERS_MAX = 254
const UNIT_MIN = 4096

export class LayerMap {
  readonly #layers: readonly Layer[]
  readonly #size: number
  readonly #unit: number
  readonly #pages = new Map<number, Uint8Array>()
  /** Counts claims and forgettings, so that an answer that took time and was overtaken by one is not kept. */
  #changes = 0

  /** `layers` from base to active. */
  constructor(layers: readonly Layer[]) {
    this.#layers = layers
    this.#size = layers.at(-1)?.size ?? 0
    this.#unit = Math.max(UNIT_MIN, Math.min(...layers.slice(1).map((layer) => layer.clusterSize)))
  }

  /** False where the map would not help: the active layer then finds its way by itself. */
  static isUseful(layers: readonly Layer[]): boolean {
    return layers.length > 1 && layers.length <= LAYERS_MAX
  }

  /**
   * The index of the highest layer that holds anything of the range, 0 when none does: what the whole range shows can be
   * read there, since nothing above it hides any of it. -1 when the map must be resolved first.
   */
  highest(offset: number, length: number): number {
    const first = Math.floor(offset / this.#unit)
    const end = divideUp(offset + length, this.#unit)
    let highest = 0
    for (let unit = first; unit < end; unit++) {
      const entry = this.#pages.get(Math.floor(unit / LAYER_MAP_PAGE))?.[unit % LAYER_MAP_PAGE] ?? 0
      if (entry === 0) return -1
      if (entry > highest) highest = entry
    }
    return highest - 1
  }

  /** Resolves what the range still lacks; a write that overtakes it may leave some of it unresolved. */
  async resolve(offset: number, length: number): Promise<void> {
    const first = Math.floor(offset / this.#unit)
    const end = divideUp(offset + length, this.#unit)
    for (let unit = first; unit < end; ) {
      const pageIndex = Math.floor(unit / LAYER_MAP_PAGE)
      const pageStart = pageIndex * LAYER_MAP_PAGE
      const pageEnd = Math.min(pageStart + LAYER_MAP_PAGE, divideUp(this.#size, this.#unit))
      const page = this.#page(pageIndex)
      if (page[unit - pageStart] === 0) {
        // A new page is resolved whole; in an old one only what a write made unknown.
        const from = page.every((entry) => entry === 0) ? pageStart : unit
        const to = from === pageStart ? pageEnd : Math.min(pageEnd, end)
        await this.#ask(page, pageStart, from, to)
      }
      unit++
    }
  }

  /** A write to the active layer completed: it holds the clusters that the range touches. */
  claim(offset: number, length: number): void {
    const active = this.#layers[this.#layers.length - 1] as Layer
    const from = roundDown(offset, active.clusterSize)
    this.#fill(from, roundUp(offset + length, active.clusterSize), this.#layers.length)
  }

  /** What the range shows may have changed hands. */
  forget(offset: number, length: number): void {
    this.#fill(offset, offset + length, 0)
  }

  #fill(from: number, to: number, entry: number): void {
    this.#changes++
    const end = Math.min(divideUp(to, this.#unit), divideUp(this.#size, this.#unit))
    for (let unit = Math.floor(from / this.#unit); unit < end; unit++) {
      const page = this.#pages.get(Math.floor(unit / LAYER_MAP_PAGE))
      if (page !== undefined) page[unit % LAYER_MAP_PAGE] = entry
    }
  }

  #page(index: number): Uint8Array {
    let page = this.#pages.get(index)
    if (page !== undefined) return page
    if ((this.#pages.size + 1) * LAYER_MAP_PAGE > LAYER_MAP_BYTES) {
      const oldest = this.#pages.keys().next().value
      if (oldest !== undefined) this.#pages.delete(oldest)
    }
    page = new Uint8Array(LAYER_MAP_PAGE)
    this.#pages.set(index, page)
    return page
  }

  /** Asks every layer, from the base up, who holds units `from` to `to`. */
  async #ask(page: Uint8Array, pageStart: number, from: number, to: number): Promise<void> {
    const found = new Uint8Array(to - from).fill(1)
    const changes = this.#changes
    const start = from * this.#unit
    const end = Math.min(to * this.#unit, this.#size)
    for (let index = 1; index < this.#layers.length; index++) {
      const layer = this.#layers[index] as Layer
      let position = start
      // Past its end a layer shows zeros, and hides what a longer one below it holds there.
      if (layer.size < end) found.fill(index + 1, Math.max(0, Math.floor(layer.size / this.#unit) - from))
      const length = Math.min(end, layer.size) - start
      if (length <= 0) continue
      const pending = layer.allocation(start, length, (piece, ownership) => {
        if (ownership !== UNALLOCATED) {
          const first = Math.floor(position / this.#unit) - from
          found.fill(index + 1, first, divideUp(position + piece, this.#unit) - from)
        }
        position += piece
        return true
      })
      if (pending !== undefined) await pending
    }
    if (changes === this.#changes) page.set(found, from - pageStart)
  }
}
