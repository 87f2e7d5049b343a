// The few Linux calls that Node lacks: fallocate (holes), lseek with SEEK_DATA and SEEK_HOLE, open-file-description locks, and
// preadv2 that takes only what is in the page cache, and malloc_trim. By koffi, which calls libc directly. Where koffi cannot load, `syscalls` is
// undefined and callers take a plain way. Only files of this folder import this one.

import { assert } from '../base/assert.ts'
import { addressOf, type Koffi, koffi as loaded } from './koffi.ts'

export interface Syscalls {
  /** Returns 0, or the errno. */
  fallocate(fd: number, mode: number, offset: number, length: number): number
  /** The same by a thread of the pool; false when it failed, for whatever reason. */
  fallocateLater(fd: number, mode: number, offset: number, length: number): Promise<boolean>
  /** True when the file can be asked for what is in the page cache. */
  canReadCached(fd: number): boolean
  /**
   * Reads what is in the page cache, from the offset on, without waiting for the disk. Returns how many bytes that were; 0 or less says
   * nothing: they are not there, or the file ends, or the call failed.
   */
  readCached(fd: number, into: Uint8Array, at: number, length: number, offset: number): number
  /** The offset found, or -1 when there is none before the end, or -2 when the file system cannot tell. */
  seek(fd: number, offset: number, whence: typeof SEEK_DATA | typeof SEEK_HOLE): number
  /** Takes or drops a shared lock on bytes of the file. Returns 0, or the errno. */
  lockShared(fd: number, start: number, length: number, take: boolean): number
  /** True when somebody else holds any lock on the byte. */
  isLocked(fd: number, start: number): boolean
  /** Has a thread of the pool give memory that the process let go back to the system; resolves when that is done. */
  trimMemory(): Promise<void>
}

export const FALLOC_KEEP_SIZE = 1
export const FALLOC_PUNCH_HOLE = 2
export const FALLOC_ZERO_RANGE = 16
export const SEEK_DATA = 3
export const SEEK_HOLE = 4

const ENXIO = 6
const EAGAIN = 11
const RWF_NOWAIT = 8
const F_OFD_GETLK = 36
const F_OFD_SETLK = 37
const F_RDLCK = 0
const F_WRLCK = 1
const F_UNLCK = 2

/** Undefined where the C library is not GNU's. */
function trimOf(libc: ReturnType<Koffi['load']>): ReturnType<ReturnType<Koffi['load']>['func']> | undefined {
  try {
    return libc.func('int malloc_trim(size_t kept)')
  } catch {
    return undefined
  }
}

function make(koffi: Koffi): Syscalls {
  const libc = koffi.load(null)
  const fallocate = libc.func('int fallocate(int fd, int mode, int64_t offset, int64_t length)')
  const lseek = libc.func('int64_t lseek(int fd, int64_t offset, int whence)')
  const fcntl = libc.func('int fcntl(int fd, int cmd, _Inout_ void *lock)')

  const trim = trimOf(libc)
  const preadv2 = libc.func('int64_t preadv2(int fd, void *vector, int count, int64_t offset, int flags)')

  // struct iovec: where, and how many bytes; 64 bits each, the low half first on every machine that koffi knows.
  const vector = new Uint32Array(4)
  const readCached: Syscalls['readCached'] = (fd, into, at, length, offset) => {
    // The kernel writes wherever it is told to.
    assert(at >= 0 && length >= 0 && at + length <= into.length, 'the bytes read fit the buffer')
    const address = addressOf(into.buffer) + into.byteOffset + at
    vector[0] = address
    vector[1] = address / 2 ** 32
    vector[2] = length
    return preadv2(fd, vector, 1, offset, RWF_NOWAIT) as number
  }

  // struct flock on 64-bit Linux: l_type, l_whence (16 bits each), padding, l_start, l_len (64 bits), l_pid.
  const flock = (type: number, start: number, length: number): Buffer => {
    const lock = Buffer.alloc(32)
    lock.writeInt16LE(type, 0)
    lock.writeBigInt64LE(BigInt(start), 8)
    lock.writeBigInt64LE(BigInt(length), 16)
    return lock
  }

  return {
    readCached,
    canReadCached: (fd) => readCached(fd, new Uint8Array(1), 0, 1, 0) >= 0 || koffi.errno() === EAGAIN,
    fallocateLater: (fd, mode, offset, length) =>
      new Promise((resolve) =>
        fallocate.async(fd, mode, offset, length, (error: unknown, result: unknown) =>
          resolve(error === null && result === 0),
        ),
      ),
    trimMemory: () => new Promise((resolve) => (trim === undefined ? resolve() : trim.async(0, () => resolve()))),
    fallocate: (fd, mode, offset, length) => (fallocate(fd, mode, offset, length) === 0 ? 0 : koffi.errno()),
    seek: (fd, offset, whence) => {
      const found = Number(lseek(fd, offset, whence))
      return found >= 0 ? found : koffi.errno() === ENXIO ? -1 : -2
    },
    lockShared: (fd, start, length, take) =>
      fcntl(fd, F_OFD_SETLK, flock(take ? F_RDLCK : F_UNLCK, start, length)) === 0 ? 0 : koffi.errno(),
    isLocked: (fd, start) => {
      const lock = flock(F_WRLCK, start, 1)
      return fcntl(fd, F_OFD_GETLK, lock) === 0 && lock.readInt16LE(0) !== F_UNLCK
    },
  }
}

export const syscalls: Syscalls | undefined = loaded === undefined ? undefined : make(loaded)
