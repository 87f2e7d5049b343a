// The few Linux calls that Node lacks: fallocate (holes), lseek with SEEK_DATA and SEEK_HOLE, and open-file-description
// locks. By koffi, which calls libc directly. Where koffi cannot load, `syscalls` is undefined and callers take a plain
// way. Only host/real.ts imports this file.

import { createRequire } from 'node:module'

export interface Syscalls {
  /** Returns 0, or the errno. */
  fallocate(fd: number, mode: number, offset: number, length: number): number
  /** The offset found, or -1 when there is none before the end, or -2 when the file system cannot tell. */
  seek(fd: number, offset: number, whence: typeof SEEK_DATA | typeof SEEK_HOLE): number
  /** Takes or drops a shared lock on bytes of the file. Returns 0, or the errno. */
  lockShared(fd: number, start: number, length: number, take: boolean): number
  /** True when somebody else holds any lock on the byte. */
  isLocked(fd: number, start: number): boolean
}

export const FALLOC_KEEP_SIZE = 1
export const FALLOC_PUNCH_HOLE = 2
export const FALLOC_ZERO_RANGE = 16
export const SEEK_DATA = 3
export const SEEK_HOLE = 4

const ENXIO = 6
const F_OFD_GETLK = 36
const F_OFD_SETLK = 37
const F_RDLCK = 0
const F_WRLCK = 1
const F_UNLCK = 2

interface Koffi {
  load(path: string | null): { func(prototype: string): (...args: unknown[]) => unknown }
  errno(): number
}

function load(): Syscalls | undefined {
  let koffi: Koffi
  try {
    koffi = createRequire(import.meta.url)('koffi') as Koffi
  } catch {
    return undefined
  }
  const libc = koffi.load(null)
  const fallocate = libc.func('int fallocate(int fd, int mode, int64_t offset, int64_t length)')
  const lseek = libc.func('int64_t lseek(int fd, int64_t offset, int whence)')
  const fcntl = libc.func('int fcntl(int fd, int cmd, _Inout_ void *lock)')

  // struct flock on 64-bit Linux: l_type, l_whence (16 bits each), padding, l_start, l_len (64 bits), l_pid.
  const flock = (type: number, start: number, length: number): Buffer => {
    const lock = Buffer.alloc(32)
    lock.writeInt16LE(type, 0)
    lock.writeBigInt64LE(BigInt(start), 8)
    lock.writeBigInt64LE(BigInt(length), 16)
    return lock
  }

  return {
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

export const syscalls: Syscalls | undefined = process.env['VARVE_NO_SYSCALLS'] === '1' ? undefined : load()
