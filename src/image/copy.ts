// Copies what a device shows to another: only what holds something, several pieces at once, zeros left out. For images that
// nobody writes meanwhile and that are made anew when it fails; the copies of a running daemon, which go on after a crash, are
// made by job/copier.ts.
//
//   source extents -> pieces -> read -> | data | zeros | data | -> write what is data
//                                   or -> compress a cluster -> store it

import { isZero } from '../base/bytes.ts'
import { Breather } from '../base/breather.ts'
import { IMAGE_PIECE } from '../base/limits.ts'
import { roundUp } from '../base/round.ts'
import { andThen, type BlockDevice, MAY_UNMAP, type Pending, ZERO } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { type AskExtents, ExtentWalk } from './extent-walk.ts'
import { type Lane, Lanes, type LaneWork } from './lanes.ts'

/** An extent bit of `CopyOptions.extents`: what the target shows there already is right. */
export const LEFT_ALONE = 4

/** Compresses and stores whole clusters: what the target's format offers. */
export interface ClusterStore {
  /** Bytes, a power of two. */
  readonly clusterSize: number
  /** Compresses `length` bytes, a cluster or the disk's short last one, for `store` with the same lane. */
  compress(lane: number, plain: Uint8Array, length: number): Pending
  store(lane: number, offset: number, plain: Uint8Array, length: number): Pending
}

/** Sizes in bytes. */
export interface CopyOptions {
  readonly source: BlockDevice
  /** At least as large as the source. */
  readonly target: BlockDevice
  /** The unit in which the target allocates, a power of two. */
  readonly unit: number
  /** Runs of zeros from this length on are not written, a multiple of 512; with 0 everything is written, and nothing left out. */
  readonly sparse: number
  /** The target reads as zeros where nothing was written. */
  readonly targetIsZero: boolean
  /** Pieces at work at once. */
  readonly lanes: number
  /** Pieces are written in the order in which they become ready. */
  readonly outOfOrder?: boolean | undefined
  /** What is to be copied, in extent bits, ZERO or LEFT_ALONE; the source's own extents unless told. */
  readonly extents?: AskExtents | undefined
  readonly compressed?: ClusterStore | undefined
  /** Goes on over what cannot be read, as zeros; told of each such range. */
  readonly lost?: ((offset: number, length: number, error: unknown) => void) | undefined
  /** Ends the copy early, with kind 'cancelled'. */
  readonly signal?: AbortSignal | undefined
  readonly progress?: ((done: number, total: number) => void) | undefined
}

/** Smallest piece that can be read when a larger one cannot. */
const SECTOR = 512

/** Copies all of the source; what was written is flushed on return. Fails with the first error. */
export async function copyImage(options: CopyOptions): Promise<void> {
  await new Copy(options).run()
}

class Copy {
  readonly #options: CopyOptions
  readonly #pieceBytes: number
  readonly #breather = new Breather()

  constructor(options: CopyOptions) {
    this.#options = options
    const { unit, sparse, compressed } = options
    this.#pieceBytes = compressed?.clusterSize ?? Math.max(IMAGE_PIECE, unit, roundUp(sparse, unit))
  }

  async run(): Promise<void> {
    const { source, target, unit, lanes, outOfOrder, compressed } = this.#options
    const walk = new ExtentWalk({ ask: this.#ask, end: source.size, unit: compressed?.clusterSize ?? unit })
    const pieces = new Lanes(lanes, this.#pieceBytes, outOfOrder !== true)
    try {
      for (await walk.advance(); walk.length > 0; await walk.advance()) {
        const end = walk.offset + walk.length
        for (let at = walk.offset; at < end && (walk.extent & LEFT_ALONE) === 0; ) {
          const isZeros = (walk.extent & ZERO) !== 0
          const piece = Math.min(this.#pieceBytes - (at % this.#pieceBytes), end - at)
          const length = isZeros && this.#options.sparse > 0 ? end - at : piece
          const work = isZeros ? this.#zeros(at, length) : this.#data(at, length)
          if (work !== undefined) await pieces.start(work)
          at += length
          await this.#breathe(at)
        }
      }
    } finally {
      await pieces.drain()
    }
    this.#checkSignal()
    await target.flush()
    this.#options.progress?.(source.size, source.size)
  }

  /** Lets signals and timers have their turn, once in a while. */
  async #breathe(done: number): Promise<void> {
    const breath = this.#breather.pause()
    if (breath === undefined) return
    const { source, progress } = this.#options
    progress?.(done, source.size)
    await breath
    this.#checkSignal()
  }

  #checkSignal(): void {
    const { source, signal } = this.#options
    if (signal?.aborted === true) throw new BlockError('cancelled', `the copy of ${source.name} was ended early`)
  }

  readonly #ask: AskExtents = (offset, length, visit) => {
    const { source, extents, lost } = this.#options
    const ask: AskExtents = extents ?? ((...range) => source.extents(...range))
    if (lost === undefined) return ask(offset, length, visit)
    // Where nobody can say what is there, reading finds out.
    let seen = 0
    const unknown = (): void => {
      if (seen === 0) visit(Math.min(length, this.#pieceBytes), 0)
    }
    try {
      return ask(offset, length, (piece, extent) => {
        seen += piece
        return visit(piece, extent)
      })?.catch(unknown)
    } catch {
      return unknown() as undefined
    }
  }

  #zeros(offset: number, length: number): LaneWork | undefined {
    const { sparse, target, targetIsZero } = this.#options
    if (sparse === 0) {
      const fill = ({ buffer }: Lane): undefined => void buffer.fill(0, 0, length)
      return { ready: fill, finish: ({ buffer }) => target.write(offset, length, buffer, 0, 0) }
    }
    if (targetIsZero) return undefined
    return { ready: () => undefined, finish: () => target.zero(offset, length, MAY_UNMAP) }
  }

  #data(offset: number, length: number): LaneWork {
    const { compressed } = this.#options
    if (compressed !== undefined) return this.#compressedData(compressed, offset, length)
    return {
      ready: ({ buffer }) => this.#read(offset, length, buffer, 0),
      finish: ({ buffer }) => this.#store(offset, length, buffer, 0),
    }
  }

  #compressedData(store: ClusterStore, offset: number, length: number): LaneWork {
    const { sparse } = this.#options
    let isZeros = false
    return {
      ready: ({ buffer, index }) =>
        andThen(this.#read(offset, length, buffer, 0), () => {
          isZeros = sparse > 0 && isZero(buffer, 0, length)
          return isZeros ? undefined : store.compress(index, buffer, length)
        }),
      finish: ({ buffer, index }) =>
        isZeros ? this.#zeros(offset, length)?.finish({ buffer, index }) : store.store(index, offset, buffer, length),
    }
  }

  #read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    const { source, lost } = this.#options
    if (lost === undefined) return source.read(offset, length, into, at)
    try {
      return source.read(offset, length, into, at)?.catch(() => this.#salvage(offset, length, into, at))
    } catch {
      return this.#salvage(offset, length, into, at)
    }
  }

  /** Reads what can be read of a range that could not be read whole. */
  async #salvage(offset: number, length: number, into: Uint8Array, at: number): Promise<void> {
    for (let done = 0; done < length; done += SECTOR) {
      const piece = Math.min(SECTOR, length - done)
      try {
        await this.#options.source.read(offset + done, piece, into, at + done)
      } catch (error) {
        into.fill(0, at + done, at + done + piece)
        this.#options.lost?.(offset + done, piece, error)
      }
    }
  }

  /** Writes the runs of data in the buffer, and what else it takes for the runs of zeros. */
  #store(offset: number, length: number, from: Uint8Array, at: number): Pending {
    const { sparse, target, targetIsZero } = this.#options
    if (sparse === 0) return target.write(offset, length, from, at, 0)
    for (let done = 0; done < length; ) {
      const start = done
      const isZeros = this.#isHole(from, at + done, length - done)
      do done += Math.min(sparse, length - done)
      while (done < length && this.#isHole(from, at + done, length - done) === isZeros)
      let wait: Pending
      if (!isZeros) wait = target.write(offset + start, done - start, from, at + start, 0)
      else if (!targetIsZero) wait = target.zero(offset + start, done - start, MAY_UNMAP)
      if (wait !== undefined) {
        const next = done
        return wait.then(() => this.#store(offset + next, length - next, from, at + next))
      }
    }
    return undefined
  }

  #isHole(bytes: Uint8Array, at: number, length: number): boolean {
    return isZero(bytes, at, Math.min(this.#options.sparse, length))
  }
}
