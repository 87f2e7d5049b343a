// An open file of the real host whose whole pages go past the page cache (O_DIRECT) by way of aligned buffers, through io_uring, or the
// pool where there is none. What is
// no whole page goes through the page cache, by a second descriptor, as do zeros and holes: an image's own tables mostly,
// which are better cached. Linux keeps the two ways coherent, except for a page that is written by both at the same time; writes
// of the two kinds that touch the same pages therefore wait for each other.
//
//   write 8192 at 4096   -> direct          write 512 at 4608  -> page cache
//
// Requests that are longer than a buffer are made in pieces, side by side.

import fs from 'node:fs'
import { assert } from '../base/assert.ts'
import { DIRECT_PAGE, DIRECT_PIECE, DIRECT_PIECES } from '../base/limits.ts'
import { copyBytes } from '../base/bytes.ts'
import { RangeLocks, type RangeToken } from '../base/mutex.ts'
import { roundDown, roundUp } from '../base/round.ts'
import type { ExtentVisitor, Pending } from '../block/device.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import { bounceBuffers } from './bounce-buffers.ts'
import { Claim, type ClaimKind } from './claims.ts'
import type { HostFile } from './host.ts'
import { IORING_OP_READ, IORING_OP_WRITE, ioRing } from './io-ring.ts'
import { FileLanes, PoolLanes, poolLanes } from './pool-lanes.ts'

/** Each request in the ring has one of the thread's buffers. */
const ringLanes = new PoolLanes(DIRECT_PIECES)

/** The callback of fs.read and fs.write. */
type Moved = (error: NodeJS.ErrnoException | null, count: number) => void

export class DirectFile implements HostFile {
  readonly #cached: HostFile
  readonly #fd: number
  readonly #ring = ioRing()
  readonly #lanes = new FileLanes(this.#ring === undefined ? poolLanes : ringLanes)
  readonly #writes = new RangeLocks()
  readonly #claim: Claim
  #isClosed = false

  /** Takes over both: the file as it is opened for the page cache, and a descriptor of the same file with O_DIRECT. */
  constructor(cached: HostFile, fd: number) {
    this.#cached = cached
    this.#fd = fd
    this.#claim = new Claim(cached.path, fd)
    this.#ring?.open()
  }

  get path(): string {
    return this.#cached.path
  }

  get writable(): boolean {
    return this.#cached.writable
  }

  size(): number {
    return this.#cached.size()
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    if (!isWhole(offset, length)) return this.#cached.read(offset, length, into, at)
    if (this.#isClosed) throw this.#closedError('read')
    assert(at >= 0 && at + length <= into.length, 'what is read fits the buffer')
    return this.#inPieces(offset, length, (from, count) => this.#readPiece(from, count, into, at + from - offset))
  }

  readNow(offset: number, length: number, into: Uint8Array, at: number): void {
    this.#cached.readNow(offset, length, into, at)
  }

  write(offset: number, length: number, from: Uint8Array, at: number): Pending {
    if (this.#isClosed) throw this.#closedError('write')
    if (!isWhole(offset, length)) {
      return this.#alone(offset, length, () => this.#cached.write(offset, length, from, at))
    }
    assert(at >= 0 && at + length <= from.length, 'what is written is in the buffer')
    return this.#holding(offset, length, false, () =>
      this.#inPieces(offset, length, (to, count) => this.#writePiece(to, count, from, at + to - offset)),
    )
  }

  punch(offset: number, length: number): Pending {
    return this.#alone(offset, length, () => this.#cached.punch(offset, length))
  }

  zero(offset: number, length: number): Pending {
    return this.#alone(offset, length, () => this.#cached.zero(offset, length))
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.#cached.extents(offset, length, visit)
  }

  truncate(size: number): Pending {
    return this.#cached.truncate(size)
  }

  /** Covers both ways: it is one file, and the disk's own cache is emptied too. */
  sync(): Promise<void> {
    return this.#cached.sync()
  }

  /**
   * On the descriptor with O_DIRECT, which requests in the ring keep open: when this process is killed, nobody else gets the image
   * before the last of its writes has landed.
   */
  lock(claim: ClaimKind | undefined): void {
    if (this.#isClosed) throw this.#closedError('lock')
    this.#claim.change(claim)
  }

  async close(): Promise<void> {
    if (this.#isClosed) return
    this.#isClosed = true
    await this.#lanes.idle()
    this.#ring?.close()
    await this.#cached.close()
    fs.closeSync(this.#fd)
  }

  /** Runs a write through the page cache while no direct one is under way on its pages. */
  #alone(offset: number, length: number, work: () => Pending): Pending {
    const start = roundDown(offset, DIRECT_PAGE)
    return this.#holding(start, roundUp(offset + length, DIRECT_PAGE) - start, true, work)
  }

  #holding(offset: number, length: number, exclusive: boolean, work: () => Pending): Pending {
    const token = this.#writes.tryAcquire(offset, length, exclusive)
    if (token !== undefined) return this.#release(token, work)
    return this.#writes.acquire(offset, length, exclusive).then((granted) => this.#release(granted, work))
  }

  #release(token: RangeToken, work: () => Pending): Pending {
    let pending: Pending
    try {
      pending = work()
    } catch (error) {
      this.#writes.release(token)
      throw error
    }
    if (pending === undefined) this.#writes.release(token)
    else pending = pending.finally(() => this.#writes.release(token))
    return pending
  }

  #inPieces(offset: number, length: number, move: (offset: number, length: number) => Promise<void>): Pending {
    if (length <= DIRECT_PIECE) return length === 0 ? undefined : move(offset, length)
    const pieces: Promise<void>[] = []
    for (let done = 0; done < length; done += DIRECT_PIECE)
      pieces.push(move(offset + done, Math.min(DIRECT_PIECE, length - done)))
    return allOf(pieces)
  }

  #readPiece(offset: number, length: number, into: Uint8Array, at: number): Promise<void> {
    const direct = this.#piece('read', offset, length, (piece, moved) => {
      const done: Moved = (error, count) => {
        if (error === null) copyBytes(piece, 0, into, at, count)
        moved(error, count)
      }
      if (this.#ring === undefined) fs.read(this.#fd, piece, 0, length, offset, done)
      else this.#ring.submit(IORING_OP_READ, this.#fd, piece, length, offset, done)
    })
    // Fewer than asked for: the file ends there. The other way knows what that means.
    return direct.then((count) =>
      count === length ? undefined : this.#cached.read(offset + count, length - count, into, at + count),
    )
  }

  #writePiece(offset: number, length: number, from: Uint8Array, at: number): Promise<void> {
    const direct = this.#piece('write', offset, length, (piece, moved) => {
      copyBytes(from, at, piece, 0, length)
      if (this.#ring === undefined) fs.write(this.#fd, piece, 0, length, offset, moved)
      else this.#ring.submit(IORING_OP_WRITE, this.#fd, piece, length, offset, moved)
    })
    // Fewer than asked for: the disk is full, most likely, and the other way says so.
    return direct.then((count) =>
      count === length ? undefined : this.#cached.write(offset + count, length - count, from, at + count),
    )
  }

  /** One call of the kernel with a lane and an aligned buffer; resolves with the bytes that it moved. */
  #piece(
    doing: 'read' | 'write',
    offset: number,
    length: number,
    move: (piece: Uint8Array, moved: Moved) => void,
  ): Promise<number> {
    return new Promise((resolve, reject) => {
      // It may have waited for another write while the file was closed.
      if (this.#isClosed) return reject(this.#closedError(doing))
      const end = (piece: Uint8Array, error: unknown, count: number): void => {
        bounceBuffers().giveBack(piece)
        this.#lanes.leave()
        if (error === null) resolve(count)
        else reject(toBlockError(error, `${this.path}: ${doing}`, { path: this.path, offset, length }))
      }
      const begin = (piece: Uint8Array): void => {
        try {
          move(piece, (error, count) => end(piece, error, count))
        } catch (error) {
          // Node refuses arguments that cannot be right before it takes the request.
          end(piece, error, 0)
        }
      }
      this.#lanes.enter(() => bounceBuffers().lend(begin))
    })
  }

  #closedError(doing: string): BlockError {
    return new BlockError('closed', `${this.path}: ${doing} after close`, { path: this.path })
  }
}

/** True for a range that has no part of a page. */
function isWhole(offset: number, length: number): boolean {
  return ((offset | length) & (DIRECT_PAGE - 1)) === 0
}

/** Ends when the last one does, so that none uses its buffer any longer; fails with the first failure. */
async function allOf(pieces: readonly Promise<void>[]): Promise<void> {
  for (const outcome of await Promise.allSettled(pieces)) if (outcome.status === 'rejected') throw outcome.reason
}
