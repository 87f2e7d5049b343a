// The chain of a disk as one device: reads go straight to the layer that holds the data, writes to the active layer. It
// knows nothing of guests, bitmaps or jobs; its layers change only through `replaceLayers`, under the disk's drain.

import { assert } from '../base/assert.ts'
import { type BlockDevice, type Capabilities, type ExtentVisitor, type Layer, type Pending } from '../block/device.ts'
import { LayerMap } from './layer-map.ts'
import { linkLayers } from './open.ts'

export class Chain implements BlockDevice {
  readonly name: string
  #layers: readonly Layer[]
  #active: Layer
  #map: LayerMap | undefined

  /** `layers` from base to active, at least one. */
  constructor(name: string, layers: readonly Layer[]) {
    this.name = name
    this.#layers = layers
    this.#active = lastOf(layers)
    this.#map = LayerMap.isUseful(layers) ? new LayerMap(layers) : undefined
  }

  /** From base to active. */
  get layers(): readonly Layer[] {
    return this.#layers
  }

  get active(): Layer {
    return this.#active
  }

  get size(): number {
    return this.#active.size
  }

  get can(): Capabilities {
    return this.#active.can
  }

  /** Puts other layers in place, from base to active. Nothing may be in flight. */
  replaceLayers(layers: readonly Layer[]): void {
    this.#layers = layers
    this.#active = lastOf(layers)
    linkLayers(layers)
    this.#map = LayerMap.isUseful(layers) ? new LayerMap(layers) : undefined
  }

  /** The disk as layer `index` and those below show it: the snapshot's content. */
  viewAt(index: number): Layer {
    const layer = this.#layers[index]
    assert(layer !== undefined, 'a layer of the chain')
    return layer
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    if (this.#map === undefined) return this.#active.read(offset, length, into, at)
    const index = this.#map.highest(offset, length)
    if (index < 0) return this.#resolveAndRead(offset, length, into, at)
    return this.#layerToRead(index, offset + length).read(offset, length, into, at)
  }

  write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Pending {
    const pending = this.#active.write(offset, length, from, at, flags)
    if (this.#map === undefined) return pending
    if (pending === undefined) {
      this.#map.claim(offset, length)
      return undefined
    }
    // While the write is in flight part of its clusters may be new: a reader asks the layers again.
    this.#map.forget(offset, length)
    return pending.then(() => this.#map?.claim(offset, length))
  }

  zero(offset: number, length: number, flags: number): Pending {
    return this.#forgetAround(offset, length, this.#active.zero(offset, length, flags))
  }

  trim(offset: number, length: number, flags: number): Pending {
    return this.#forgetAround(offset, length, this.#active.trim(offset, length, flags))
  }

  flush(): Pending {
    return this.#active.flush()
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.#active.extents(offset, length, visit)
  }

  /** Closes every layer, the active one first; the first failure is thrown after all were tried. */
  async close(): Promise<void> {
    let failure: unknown
    for (const layer of this.#layers.toReversed()) {
      try {
        await layer.close()
      } catch (error) {
        failure ??= error
      }
    }
    if (failure !== undefined) throw failure
  }

  async #resolveAndRead(offset: number, length: number, into: Uint8Array, at: number): Promise<void> {
    const map = this.#map
    await map?.resolve(offset, length)
    const index = map?.highest(offset, length) ?? -1
    const layer = index < 0 ? this.#active : this.#layerToRead(index, offset + length)
    const pending = layer.read(offset, length, into, at)
    if (pending !== undefined) await pending
  }

  /** A layer that ends before the range cannot be asked for it: the next one up that reaches so far shows the same. */
  #layerToRead(index: number, end: number): Layer {
    for (let i = index; ; i++) {
      const layer = this.#layers[i]
      assert(layer !== undefined, 'the active layer reaches to the end of the disk')
      if (layer.size >= end) return layer
    }
  }

  #forgetAround(offset: number, length: number, pending: Pending): Pending {
    const map = this.#map
    if (map === undefined) return pending
    map.forget(offset, length)
    return pending?.then(() => map.forget(offset, length))
  }
}

function lastOf(layers: readonly Layer[]): Layer {
  const last = layers[layers.length - 1]
  assert(last !== undefined, 'a chain has at least one layer')
  return last
}
