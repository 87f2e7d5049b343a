// The target of a stream: a layer, written only where it owns nothing. What it owns is newer than what lies below, whoever
// wrote it, so a copy never goes over it. The caller keeps other writes of the range away meanwhile.
//
//   copy     B B B B         target before   . . T .         after   B B T B

import { type Layer, UNALLOCATED } from '../block/device.ts'
import { pool } from '../block/pool.ts'
import type { CopyTarget } from './copier.ts'

export interface UnownedTargetOptions {
  readonly layer: Layer
  /** How the layer is written: by itself, or through the chain whose active layer it is. */
  readonly device: CopyTarget
  /** Whether zeros must be written down: something else may show through where the layer owns nothing. */
  readonly keepsZeros: boolean
}

export class UnownedTarget implements CopyTarget {
  readonly #layer: Layer
  readonly #device: CopyTarget
  readonly #keepsZeros: boolean

  constructor({ layer, device, keepsZeros }: UnownedTargetOptions) {
    this.#layer = layer
    this.#device = device
    this.#keepsZeros = keepsZeros
  }

  async write(offset: number, length: number, from: Uint8Array, at: number, flags: number): Promise<void> {
    for (const [start, end] of await this.#unowned(offset, length)) {
      const written = this.#device.write(start, end - start, from, at + start - offset, flags)
      if (written !== undefined) await written
    }
  }

  async zero(offset: number, length: number, flags: number): Promise<void> {
    if (!this.#keepsZeros) return
    for (const [start, end] of await this.#unowned(offset, length)) {
      const zeroed = this.#device.zero(start, end - start, flags)
      if (zeroed !== undefined) await zeroed
      // An image that cannot say "zeros" (version 2 of qcow2) owns nothing there where zeros show through now.
      for (const [left, leftEnd] of await this.#unowned(start, end - start))
        await this.#writeZeros(left, leftEnd - left)
    }
  }

  async #writeZeros(offset: number, length: number): Promise<void> {
    const zeros = pool.take(length)
    try {
      zeros.fill(0, 0, length)
      const written = this.#device.write(offset, length, zeros, 0, 0)
      if (written !== undefined) await written
    } finally {
      pool.give(zeros)
    }
  }

  /** The parts of a range that the layer does not own, from start to end. */
  async #unowned(offset: number, length: number): Promise<[start: number, end: number][]> {
    const found: [start: number, end: number][] = []
    let position = offset
    const pending = this.#layer.allocation(offset, length, (piece, ownership) => {
      if (ownership === UNALLOCATED) found.push([position, position + piece])
      position += piece
      return true
    })
    if (pending !== undefined) await pending
    return found
  }
}
