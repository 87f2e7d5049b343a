// An open file of the real host. What the page cache answers at once is done within the call; what might wait for a disk or a
// server goes to Node's thread pool, so that it holds up neither the event loop nor the other disks of the thread. How that is told
// depends on the file:
//
//   memory      in memory (tmpfs): always within the call
//   cached      the kernel says whether it has the bytes (preadv2 with RWF_NOWAIT): reads within the call as far as it has
//               them, and the rest in the pool; writes as below
//   judged      by the clock: within the call while that is quick (pace.ts)
//   background  nobody waits for it: always in the pool
//
// What a job copies goes to the pool whatever the file, which its buffers tell (copyPool).
//
// Which of them a file is, and opening it, is the affair of real.ts.

import fs from 'node:fs'
import { COPY_POOLED_MIN } from '../base/limits.ts'
import { type ExtentVisitor, HOLE, type Pending, ZERO } from '../block/device.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import { copyPool } from '../block/pool.ts'
import { Claim, type ClaimKind } from './claims.ts'
import { GroupedSync } from './grouped-sync.ts'
import type { HostFile, MappedRange } from './host.ts'
import { koffi, mapRange } from './koffi.ts'
import { Pace } from './pace.ts'
import { FileLanes, poolLanes } from './pool-lanes.ts'
import { FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE, SEEK_DATA, SEEK_HOLE, syscalls } from './syscalls.ts'

export type FileWay = 'memory' | 'cached' | 'judged' | 'background'

/** An open descriptor, which the file takes over. */
export interface OpenedFile {
  readonly path: string
  readonly fd: number
  readonly writable: boolean
  readonly isBlock: boolean
  readonly way: FileWay
  /** A store into memory that is mapped to it cannot fail. */
  readonly isMappable?: boolean
}

/** fs.read and fs.write. */
type Transfer = (
  fd: number,
  buffer: Uint8Array,
  at: number,
  length: number,
  offset: number,
  done: (error: NodeJS.ErrnoException | null, count: number) => void,
) => void

const ZEROS = Buffer.alloc(64 * 1024)

export class RealFile implements HostFile {
  readonly path: string
  readonly writable: boolean
  readonly #fd: number
  readonly #isBlock: boolean
  readonly #isMappable: boolean
  readonly #way: FileWay
  readonly #readPace: Pace
  readonly #writePace: Pace
  readonly #lanes = new FileLanes()
  readonly #claim: Claim
  /**
   * The run of data that was found last: to find where one ends takes a look at each page of it in memory. Taking data for what has
   * become a hole elsewhere is no harm.
   */
  #dataStart = 0
  #dataEnd = 0
  readonly #syncs = new GroupedSync(() => poolLanes.sync(() => this.#syncNow()))
  #isClosed = false

  constructor({ path, fd, writable, isBlock, way, isMappable = false }: OpenedFile) {
    this.#isMappable = isMappable
    this.path = path
    this.writable = writable
    this.#fd = fd
    this.#isBlock = isBlock
    this.#way = way
    this.#claim = new Claim(path, fd)
    this.#readPace = new Pace(way === 'memory')
    // Where the kernel knows what it has in memory, it has written there as soon as it may.
    this.#writePace = new Pace(way === 'memory' || way === 'cached')
  }

  size(): number {
    if (this.#isClosed) throw this.#closedError('size')
    if (!this.#isBlock) return this.#try('size', () => fs.fstatSync(this.#fd).size)
    return this.#try('size', () => blockDeviceSize(this.path))
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    if (this.#isClosed) throw this.#closedError('read')
    if (isCopy(into, length)) return this.#transfer(fs.read, offset, length, into, at)
    if (this.#way === 'cached') {
      const found = syscalls?.readCached(this.#fd, into, at, length, offset) ?? 0
      if (found === length) return undefined
      const done = Math.max(found, 0)
      return this.#transfer(fs.read, offset + done, length - done, into, at + done)
    }
    if (!this.#readPace.isQuick) return this.#transfer(fs.read, offset, length, into, at)
    if (this.#way === 'memory') return this.#readInCall(offset, length, into, at)
    const began = performance.now()
    this.#readInCall(offset, length, into, at)
    this.#readPace.tookInCall(began, performance.now(), length)
    return undefined
  }

  readNow(offset: number, length: number, into: Uint8Array, at: number): void {
    if (this.#isClosed) throw this.#closedError('read')
    this.#readInCall(offset, length, into, at)
  }

  write(offset: number, length: number, from: Uint8Array, at: number): Pending {
    if (this.#isClosed) throw this.#closedError('write')
    if (isCopy(from, length)) return this.#transfer(fs.write, offset, length, from, at)
    if (!this.#writePace.isQuick) return this.#transfer(fs.write, offset, length, from, at)
    if (this.#way === 'memory') return this.#writeNow(offset, length, from, at)
    const began = performance.now()
    this.#writeNow(offset, length, from, at)
    this.#writePace.tookInCall(began, performance.now(), length)
    return undefined
  }

  punch(offset: number, length: number): Pending {
    const end = Math.min(offset + length, this.size())
    if (offset >= end) return undefined
    return this.#allocate(FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, end - offset)
  }

  zero(offset: number, length: number): Pending {
    if (this.#isClosed) throw this.#closedError('zero')
    return this.#allocate(FALLOC_ZERO_RANGE, offset, length)
  }

  /** Within the call: what is asked of the file system are its maps, which it has in memory. */
  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    const end = offset + length
    const fileEnd = Math.min(end, this.size())
    while (offset < fileEnd) {
      if (offset < this.#dataStart || offset >= this.#dataEnd) this.#findData(offset)
      const dataStart = Math.min(Math.max(offset, this.#dataStart), fileEnd)
      if (dataStart > offset && !visit(dataStart - offset, HOLE | ZERO)) return undefined
      if (dataStart >= fileEnd) break
      const dataEnd = Math.min(this.#dataEnd, fileEnd)
      if (!visit(dataEnd - dataStart, 0)) return undefined
      offset = dataEnd
    }
    if (fileEnd < end) visit(end - Math.max(fileEnd, end - length), HOLE | ZERO)
    return undefined
  }

  /** Finds the run of data at an offset, or the next one after it. */
  #findData(offset: number): void {
    const data = syscalls === undefined ? -2 : syscalls.seek(this.#fd, offset, SEEK_DATA)
    if (data >= this.#dataStart && data < this.#dataEnd) return
    const hole = data < 0 || syscalls === undefined ? -1 : syscalls.seek(this.#fd, data, SEEK_HOLE)
    // A file system that cannot tell: all of it is data. And where none is left, the next run begins nowhere.
    this.#dataStart = data === -2 ? offset : data === -1 ? Infinity : data
    this.#dataEnd = hole < 0 ? Infinity : hole
  }

  #forgetData(): void {
    this.#dataStart = this.#dataEnd = 0
  }

  truncate(size: number): Pending {
    if (this.#isClosed) throw this.#closedError('truncate')
    this.#forgetData()
    if (this.#writePace.isQuick) {
      this.#try('truncate', () => fs.ftruncateSync(this.#fd, size))
      return undefined
    }
    return this.#inLane((resolve, reject) =>
      fs.ftruncate(this.#fd, size, (error) =>
        error === null ? resolve() : reject(toBlockError(error, `${this.path}: truncate`, { path: this.path })),
      ),
    )
  }

  async sync(): Promise<void> {
    if (this.#isClosed) throw this.#closedError('sync')
    await this.#syncs.run()
  }

  lock(claim: ClaimKind | undefined): void {
    if (this.#isClosed) throw this.#closedError('lock')
    this.#claim.change(claim)
  }

  /** What was asked before is finished first: a descriptor's number may at once be another file's. */
  async close(): Promise<void> {
    if (this.#isClosed) return
    this.#isClosed = true
    await this.#syncs.idle()
    await this.#lanes.idle()
    this.#try('close', () => fs.closeSync(this.#fd))
  }

  #readInCall(offset: number, length: number, into: Uint8Array, at: number): undefined {
    let done = 0
    try {
      while (done < length) {
        const count = fs.readSync(this.#fd, into, at + done, length - done, offset + done)
        // What lies past the end reads as zeros.
        if (count === 0) into.fill(0, at + done, at + length)
        done = count === 0 ? length : done + count
      }
    } catch (error) {
      throw this.#failure(error, 'read', offset, length)
    }
  }

  #writeNow(offset: number, length: number, from: Uint8Array, at: number): undefined {
    let done = 0
    try {
      while (done < length) done += fs.writeSync(this.#fd, from, at + done, length - done, offset + done)
    } catch (error) {
      throw this.#failure(error, 'write', offset, length)
    }
  }

  /** Reads or writes all of the range in the pool. */
  #transfer(call: Transfer, offset: number, length: number, buffer: Uint8Array, at: number): Promise<void> {
    const isRead = call === fs.read
    const pace = isRead ? this.#readPace : this.#writePace
    const isJudged = this.#way !== 'background' && !isCopy(buffer, length)
    return this.#inLane((resolve, reject) => {
      const began = performance.now()
      let done = 0
      const next = (): void => call(this.#fd, buffer, at + done, length - done, offset + done, transferred)
      const transferred = (error: NodeJS.ErrnoException | null, count: number): void => {
        if (error !== null) return reject(this.#failure(error, isRead ? 'read' : 'write', offset, length))
        done += count
        if (count === 0 && isRead) buffer.fill(0, at + done, at + length)
        else if (done < length) return next()
        if (isJudged) pace.tookInPool(began, performance.now(), length)
        resolve()
      }
      next()
    })
  }

  /** Runs work in a lane of the pool; it ends with a call of `resolve` or `reject`. */
  #inLane(work: (resolve: () => void, reject: (error: Error) => void) => void): Promise<void> {
    return new Promise((resolve, reject) => {
      const done = (): void => {
        this.#lanes.leave()
        resolve()
      }
      const failed = (error: Error): void => {
        this.#lanes.leave()
        reject(error)
      }
      this.#lanes.enter(() => {
        try {
          work(done, failed)
        } catch (error) {
          // Node refuses arguments that cannot be right before it takes the request.
          failed(error as Error)
        }
      })
    })
  }

  map(offset: number, length: number): MappedRange | undefined {
    if (!this.#isMappable || this.#isClosed || koffi === undefined) return undefined
    return mapRange(koffi, this.#fd, offset, length)
  }

  /** fallocate; where the file system lacks it, zeros are written, which reads the same. */
  #allocate(mode: number, offset: number, length: number): Pending {
    this.#forgetData()
    if (syscalls === undefined) return this.#writeZeros(offset, length)
    if (!this.#writePace.isQuick) return this.#allocateLater(mode, offset, length)
    const began = performance.now()
    const errno = syscalls.fallocate(this.#fd, mode, offset, length)
    if (this.#way !== 'memory') this.#writePace.tookInCall(began, performance.now(), length)
    return errno === 0 ? undefined : this.#writeZeros(offset, length)
  }

  async #allocateLater(mode: number, offset: number, length: number): Promise<void> {
    let isDone = false
    await this.#inLane((resolve) => {
      void syscalls?.fallocateLater(this.#fd, mode, offset, length).then((done) => {
        isDone = done
        resolve()
      })
    })
    this.#forgetData()
    if (!isDone) await this.#writeZeros(offset, length)
  }

  #writeZeros(offset: number, length: number): Pending {
    let done = 0
    while (done < length) {
      const piece = Math.min(ZEROS.length, length - done)
      const pending = this.write(offset + done, piece, ZEROS, 0)
      done += piece
      if (pending !== undefined) return pending.then(() => this.#writeZeros(offset + done, length - done))
    }
    return undefined
  }

  #syncNow(): Promise<void> {
    return new Promise((resolve, reject) =>
      fs.fdatasync(this.#fd, (error) => (error === null ? resolve() : reject(this.#failure(error, 'sync')))),
    )
  }

  #try<T>(doing: string, call: () => T): T {
    try {
      return call()
    } catch (error) {
      throw this.#failure(error, doing)
    }
  }

  #closedError(doing: string): BlockError {
    return new BlockError('closed', `${this.path}: ${doing} after close`, { path: this.path })
  }

  #failure(error: unknown, doing: string, offset?: number, length?: number): BlockError {
    const place = offset === undefined || length === undefined ? {} : { offset, length }
    return toBlockError(error, `${this.path}: ${doing}`, { path: this.path, ...place })
  }
}

/** True for a request of a job, unless it is too small to be worth a thread's attention. */
function isCopy(buffer: Uint8Array, length: number): boolean {
  return length >= COPY_POOLED_MIN && copyPool.lent(buffer)
}

/** A block device's length in bytes, from sysfs, which counts sectors of 512 bytes whatever the device's own. */
export function blockDeviceSize(path: string): number {
  const { rdev } = fs.statSync(path)
  const major = (rdev >>> 8) & 0xfff
  const minor = (rdev & 0xff) | ((rdev >>> 12) & 0xfff00)
  return Number(fs.readFileSync(`/sys/dev/block/${major}:${minor}/size`, 'utf8')) * 512
}
