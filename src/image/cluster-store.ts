// Lets a copy write compressed clusters: one compressor per lane, whose result waits there for its turn to be stored.

import type { Pending } from '../block/device.ts'
import { ClusterCompressor } from '../format/qcow2/cluster-compressor.ts'
import type { Qcow2Image } from '../format/qcow2/image.ts'
import type { ClusterStore } from './copy.ts'

export class Qcow2ClusterStore implements ClusterStore {
  readonly clusterSize: number
  readonly #image: Qcow2Image
  /** By lane: not every lane is used. */
  readonly #compressors = new Map<number, ClusterCompressor>()
  readonly #packed: (Uint8Array | undefined)[] = []

  constructor(image: Qcow2Image) {
    this.#image = image
    this.clusterSize = image.header.clusterSize
  }

  async compress(lane: number, plain: Uint8Array, length: number): Promise<void> {
    let compressor = this.#compressors.get(lane)
    if (compressor === undefined) {
      compressor = new ClusterCompressor(this.#image.header.compression, this.clusterSize)
      this.#compressors.set(lane, compressor)
    }
    plain.fill(0, length, this.clusterSize)
    this.#packed[lane] = await compressor.compress(plain)
  }

  store(lane: number, offset: number, plain: Uint8Array, length: number): Pending {
    return this.#image.writeCompressed(offset, this.#packed[lane], plain, 0, length)
  }

  close(): void {
    for (const compressor of this.#compressors.values()) compressor.close()
  }
}
