// Two disks side by side: finds where they may differ, reads only there, and shows both contents to whoever compares, in the
// order of the disks. What both say is zeros is not read, nor what both take from one and the same file.
//
//   a       |data A1 |hole    |base   |data A2|          base: one image file under both
//   b       |data B1 |data B2 |base   |hole   |end       past its end a disk is zeros
//   shown   |A1 B1   |0  B2   |       |A2 0   |

import { Breather } from '../base/breather.ts'
import { IMAGE_LANES, IMAGE_PIECE } from '../base/limits.ts'
import { andThen, type BlockDevice, type ExtentVisitor, HOLE, type Pending, ZERO } from '../block/device.ts'
import type { Chain } from '../chain/chain.ts'
import { type AskExtents, ExtentWalk } from './extent-walk.ts'
import { Lanes, type LaneWork } from './lanes.ts'
import { findEntry } from './map.ts'
import { openImage, type OpenImageOptions } from './open-image.ts'

/** Opens both, runs `use` with them, and closes them. Kinds as for `openImage`, and what `use` throws. */
export async function withPair<T>(
  first: OpenImageOptions,
  second: OpenImageOptions,
  use: (a: Chain, b: Chain) => Promise<T>,
): Promise<T> {
  const a = await openImage(first)
  try {
    const b = await openImage(second)
    try {
      return await use(a, b)
    } finally {
      await b.close()
    }
  } finally {
    await a.close()
  }
}

/** What is to be compared: `length` bytes from `aAt` and from `bAt`, which stand at `offset` of both disks. */
export interface PairPiece {
  readonly offset: number
  readonly length: number
  readonly bytes: Uint8Array
  readonly aAt: number
  readonly bAt: number
}

export interface PairOptions {
  readonly a: Chain
  readonly b: Chain
  /** Sees the pieces that may differ, in order; returns false to stop. */
  readonly compare: (piece: PairPiece) => boolean
  /** Sees every range with the extent bits of both, in order, before it is read; returns false to stop. */
  readonly look?: ((offset: number, length: number, a: number, b: number) => boolean) | undefined
  readonly progress?: ((done: number, total: number) => void) | undefined
}

/** An extent bit of ours: both disks take the range from one file. */
const SHARED = 4

export async function comparePair(options: PairOptions): Promise<void> {
  await new Pair(options).run()
}

class Pair {
  readonly #options: PairOptions
  readonly #end: number
  readonly #lanes = new Lanes(IMAGE_LANES, 2 * IMAGE_PIECE)
  readonly #breather = new Breather()
  #isStopped = false

  constructor(options: PairOptions) {
    this.#options = options
    this.#end = Math.max(options.a.size, options.b.size)
  }

  async run(): Promise<void> {
    const { a, b, progress } = this.#options
    const end = this.#end
    const walks = [
      new ExtentWalk({ ask: padded(a), end }),
      new ExtentWalk({ ask: padded(b), end }),
      new ExtentWalk({ ask: sharedBy(a, b) ?? nothingShared, end }),
    ] as const
    try {
      for (let at = 0; at < end && !this.#isStopped; ) {
        for (const walk of walks) while (walk.offset + walk.length <= at) await walk.advance()
        const stop = Math.min(...walks.map((walk) => walk.offset + walk.length))
        await this.#range(at, stop, walks[0].extent, walks[1].extent, walks[2].extent === SHARED)
        at = stop
      }
    } finally {
      await this.#lanes.drain()
    }
    progress?.(end, end)
  }

  async #range(start: number, end: number, a: number, b: number, isShared: boolean): Promise<void> {
    if (this.#options.look?.(start, end - start, a, b) === false) this.#isStopped = true
    if (isShared || (a & b & ZERO) !== 0) return
    for (let at = start; at < end && !this.#isStopped; ) {
      const length = Math.min(IMAGE_PIECE - (at % IMAGE_PIECE), end - at)
      await this.#lanes.start(this.#piece(at, length, (a & ZERO) !== 0, (b & ZERO) !== 0))
      at += length
      const breath = this.#breather.pause()
      if (breath !== undefined) {
        this.#options.progress?.(at, this.#end)
        await breath
      }
    }
  }

  #piece(offset: number, length: number, isZeroA: boolean, isZeroB: boolean): LaneWork {
    const { a, b, compare } = this.#options
    const read = (device: BlockDevice, isZero: boolean, into: Uint8Array, at: number): Pending =>
      isZero ? void into.fill(0, at, at + length) : device.read(offset, length, into, at)
    return {
      ready: ({ buffer }) => andThen(read(a, isZeroA, buffer, 0), () => read(b, isZeroB, buffer, IMAGE_PIECE)),
      finish: ({ buffer }) => {
        if (!this.#isStopped && !compare({ offset, length, bytes: buffer, aAt: 0, bAt: IMAGE_PIECE }))
          this.#isStopped = true
        return undefined
      },
    }
  }
}

/** The device's extents, and zeros past its end. */
function padded(device: BlockDevice): AskExtents {
  return (offset, length, visit) => {
    const inside = Math.max(0, Math.min(length, device.size - offset))
    if (inside === 0) return void visit(length, HOLE | ZERO)
    let isStopped = false
    const visitOnce: ExtentVisitor = (piece, extent) => {
      isStopped ||= !visit(piece, extent)
      return !isStopped
    }
    return andThen(device.extents(offset, inside, visitOnce), () => {
      if (!isStopped && inside < length) visit(length - inside, HOLE | ZERO)
      return undefined
    })
  }
}

const nothingShared: AskExtents = (_offset, length, visit) => void visit(length, 0)

/** Where both take their data from one file, which then is the same data; undefined when they have no file in common. */
function sharedBy(a: Chain, b: Chain): AskExtents | undefined {
  const paths = new Set(a.layers.map((layer) => layer.path))
  if (!b.layers.some((layer) => paths.has(layer.path))) return undefined
  const [layersA, layersB] = [a.layers.toReversed(), b.layers.toReversed()]
  return async (offset, length, visit) => {
    const end = offset + length
    const shared = Math.min(end, a.size, b.size)
    for (let at = offset; at < shared; ) {
      const inA = await findEntry(layersA, at, shared - at)
      const inB = await findEntry(layersB, at, inA.length)
      const isSame = layersA[inA.depth]?.path === layersB[inB.depth]?.path
      if (!visit(inB.length, isSame ? SHARED : 0)) return
      at += inB.length
    }
    if (shared < end) visit(end - Math.max(offset, shared), 0)
  }
}
