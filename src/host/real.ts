// The real host, over Node's file system calls. Reads and writes go through the page cache and complete within the call;
// syncs go to the thread pool.

import fs from 'node:fs'
import { dirname } from 'node:path'
import { type ExtentVisitor, HOLE, type Pending, ZERO } from '../block/device.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import { describeHolders, findHolders } from './holders.ts'
import type { FileStatus, Host, HostFile, OpenOptions } from './host.ts'
import { FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE, SEEK_DATA, SEEK_HOLE, syscalls } from './syscalls.ts'

// QEMU's image locks (its block/file-posix.c): a shared lock on byte 100 + p says "I use permission p", one on 200 + p
// says "I do not share permission p". Permissions: 0 consistent read, 1 write, 3 resize.
const LOCK_USES = { read: [100], write: [100, 101, 103] } as const
const LOCK_REFUSES = { read: [201, 203], write: [201, 203] } as const
const LOCK_FIRST = 100
const LOCK_SPAN = 108

const ZEROS = Buffer.alloc(64 * 1024)

class RealFile implements HostFile {
  readonly path: string
  readonly writable: boolean
  readonly #fd: number
  readonly #isBlock: boolean
  readonly #isBackground: boolean
  #closed = false
  #claim: 'read' | 'write' | undefined

  constructor(path: string, fd: number, writable: boolean, isBlock: boolean, isBackground: boolean) {
    this.path = path
    this.writable = writable
    this.#fd = fd
    this.#isBlock = isBlock
    this.#isBackground = isBackground
  }

  size(): number {
    if (!this.#isBlock) return this.#try('size', () => fs.fstatSync(this.#fd).size)
    return this.#try('size', () => blockDeviceSize(this.path))
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    if (this.#isBackground) return this.#readLater(offset, length, into, at)
    let done = 0
    try {
      while (done < length) {
        const count = fs.readSync(this.#fd, into, at + done, length - done, offset + done)
        if (count === 0) {
          into.fill(0, at + done, at + length)
          return undefined
        }
        done += count
      }
    } catch (error) {
      throw this.#failure(error, 'read', offset, length)
    }
    return undefined
  }

  write(offset: number, length: number, from: Uint8Array, at: number): Pending {
    if (this.#isBackground) return this.#writeLater(offset, length, from, at)
    let done = 0
    try {
      while (done < length) done += fs.writeSync(this.#fd, from, at + done, length - done, offset + done)
    } catch (error) {
      throw this.#failure(error, 'write', offset, length)
    }
    return undefined
  }

  punch(offset: number, length: number): Pending {
    const end = Math.min(offset + length, this.size())
    if (offset >= end) return undefined
    if (syscalls?.fallocate(this.#fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, end - offset) === 0)
      return undefined
    return this.#writeZeros(offset, end - offset)
  }

  zero(offset: number, length: number): Pending {
    if (syscalls?.fallocate(this.#fd, FALLOC_ZERO_RANGE, offset, length) === 0) return undefined
    return this.#writeZeros(offset, length)
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    const end = offset + length
    const fileEnd = Math.min(end, this.size())
    while (offset < fileEnd) {
      const data = syscalls === undefined ? -2 : syscalls.seek(this.#fd, offset, SEEK_DATA)
      const dataStart = data === -2 ? offset : data === -1 ? fileEnd : Math.min(data, fileEnd)
      if (dataStart > offset && !visit(dataStart - offset, HOLE | ZERO)) return undefined
      if (dataStart >= fileEnd) break
      const hole = data === -2 || syscalls === undefined ? fileEnd : syscalls.seek(this.#fd, dataStart, SEEK_HOLE)
      const dataEnd = hole < 0 ? fileEnd : Math.min(hole, fileEnd)
      if (!visit(dataEnd - dataStart, 0)) return undefined
      offset = dataEnd
    }
    if (fileEnd < end) visit(end - Math.max(fileEnd, end - length), HOLE | ZERO)
    return undefined
  }

  truncate(size: number): Pending {
    this.#try('truncate', () => fs.ftruncateSync(this.#fd, size))
    return undefined
  }

  sync(): Promise<void> {
    return new Promise((resolve, reject) =>
      fs.fdatasync(this.#fd, (error) => (error === null ? resolve() : reject(this.#failure(error, 'sync')))),
    )
  }

  lock(claim: 'read' | 'write' | undefined): void {
    if (syscalls === undefined || claim === this.#claim) return
    const old = this.#claim
    this.#take(claim)
    if (claim !== undefined && this.#isContested(claim)) {
      this.#take(old)
      const who = describeHolders(findHolders(this.path))
      const message = `${this.path} is in use by ${who}${claim === 'read' ? ', which writes to it' : ''}: end that first`
      throw new BlockError('busy', message, { path: this.path })
    }
    this.#claim = claim
  }

  async close(): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    this.#try('close', () => fs.closeSync(this.#fd))
  }

  /** Takes our locks first and looks at others' after, as QEMU does: of two that race, at least one sees the other. */
  #take(claim: 'read' | 'write' | undefined): void {
    syscalls?.lockShared(this.#fd, LOCK_FIRST, LOCK_SPAN, false)
    if (claim === undefined) return
    for (const byte of [...LOCK_USES[claim], ...LOCK_REFUSES[claim]]) {
      const errno = syscalls?.lockShared(this.#fd, byte, 1, true) ?? 0
      if (errno !== 0) throw new BlockError('busy', `${this.path}: cannot lock (errno ${errno})`, { path: this.path })
    }
  }

  #isContested(claim: 'read' | 'write'): boolean {
    const usedByOthers = LOCK_REFUSES[claim].some((byte) => syscalls?.isLocked(this.#fd, byte - 100))
    return usedByOthers || LOCK_USES[claim].some((byte) => syscalls?.isLocked(this.#fd, byte + 100))
  }

  async #readLater(offset: number, length: number, into: Uint8Array, at: number): Promise<void> {
    let done = 0
    try {
      while (done < length) {
        const count = await readAsync(this.#fd, into, at + done, length - done, offset + done)
        if (count === 0) {
          into.fill(0, at + done, at + length)
          return
        }
        done += count
      }
    } catch (error) {
      throw this.#failure(error, 'read', offset, length)
    }
  }

  async #writeLater(offset: number, length: number, from: Uint8Array, at: number): Promise<void> {
    let done = 0
    try {
      while (done < length) done += await writeAsync(this.#fd, from, at + done, length - done, offset + done)
    } catch (error) {
      throw this.#failure(error, 'write', offset, length)
    }
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

  #try<T>(doing: string, call: () => T): T {
    try {
      return call()
    } catch (error) {
      throw this.#failure(error, doing)
    }
  }

  #failure(error: unknown, doing: string, offset?: number, length?: number): BlockError {
    if (this.#closed) return new BlockError('closed', `${this.path}: ${doing} after close`, { path: this.path })
    const place = offset === undefined || length === undefined ? {} : { offset, length }
    return toBlockError(error, `${this.path}: ${doing}`, { path: this.path, ...place })
  }
}

type Transfer = (fd: number, buffer: Uint8Array, at: number, length: number, offset: number) => Promise<number>

const readAsync: Transfer = (fd, buffer, at, length, offset) =>
  new Promise((resolve, reject) =>
    fs.read(fd, buffer, at, length, offset, (error, count) => (error === null ? resolve(count) : reject(error))),
  )

const writeAsync: Transfer = (fd, buffer, at, length, offset) =>
  new Promise((resolve, reject) =>
    fs.write(fd, buffer, at, length, offset, (error, count) => (error === null ? resolve(count) : reject(error))),
  )

/** A block device's length in bytes, from sysfs, which counts sectors of 512 bytes whatever the device's own. */
function blockDeviceSize(path: string): number {
  const { rdev } = fs.statSync(path)
  const major = (rdev >>> 8) & 0xfff
  const minor = (rdev & 0xff) | ((rdev >>> 12) & 0xfff00)
  return Number(fs.readFileSync(`/sys/dev/block/${major}:${minor}/size`, 'utf8')) * 512
}

const KINDS = [
  ['isFile', 'file'],
  ['isDirectory', 'folder'],
  ['isBlockDevice', 'block'],
] as const

function statusOf(stats: fs.Stats): FileStatus {
  return {
    kind: KINDS.find(([test]) => stats[test]())?.[1] ?? 'other',
    size: stats.size,
    allocated: stats.blocks * 512,
    identity: `${stats.dev}:${stats.ino}`,
    modifiedMs: stats.mtimeMs,
  }
}

const CREATE_FLAGS = {
  never: 0,
  'if-missing': fs.constants.O_CREAT,
  exclusive: fs.constants.O_CREAT | fs.constants.O_EXCL,
} as const

async function attempt<T>(path: string, doing: string, call: () => Promise<T>): Promise<T> {
  try {
    return await call()
  } catch (error) {
    throw toBlockError(error, `${path}: ${doing}`, { path })
  }
}

function isMissing(error: unknown): boolean {
  const code = (error as NodeJS.ErrnoException).code
  return code === 'ENOENT' || code === 'ENOTDIR'
}

export const realHost: Host = {
  async open(path: string, options: OpenOptions = {}): Promise<HostFile> {
    const access = options.write === true ? fs.constants.O_RDWR : fs.constants.O_RDONLY
    const flags = access | CREATE_FLAGS[options.create ?? 'never'] | fs.constants.O_NOCTTY
    const file = await attempt(path, 'open', async () => {
      const fd = fs.openSync(path, flags, options.mode ?? 0o600)
      const stats = fs.fstatSync(fd)
      const isBlock = stats.isBlockDevice()
      if (stats.isFile() || isBlock) {
        return new RealFile(path, fd, options.write === true, isBlock, options.background === true)
      }
      fs.closeSync(fd)
      throw new BlockError('invalid-argument', `${path} is neither a file nor a block device`, { path })
    })
    try {
      if (options.lock !== undefined) file.lock(options.lock)
    } catch (error) {
      await file.close()
      throw error
    }
    return file
  },

  async status(path: string): Promise<FileStatus | undefined> {
    try {
      const stats = fs.statSync(path)
      const status = statusOf(stats)
      return status.kind === 'block' ? { ...status, size: blockDeviceSize(path) } : status
    } catch (error) {
      if (isMissing(error)) return undefined
      throw toBlockError(error, `${path}: status`, { path })
    }
  },

  realPath: (path) => attempt(path, 'resolve', () => fs.promises.realpath(path)),

  async list(folder: string): Promise<string[]> {
    try {
      return (await fs.promises.readdir(folder)).sort()
    } catch (error) {
      if (isMissing(error)) return []
      throw toBlockError(error, `${folder}: list`, { path: folder })
    }
  },

  async makeFolder(folder: string): Promise<void> {
    // One by one: Node's recursive mkdir never ends where a parent exists and nothing can be made in it, as in /proc.
    const status = await realHost.status(folder)
    if (status?.kind === 'folder') return
    if (status === undefined && dirname(folder) !== folder) await realHost.makeFolder(dirname(folder))
    await attempt(folder, 'make folder', async () => {
      try {
        await fs.promises.mkdir(folder, { mode: 0o700 })
      } catch (error) {
        // Somebody else made it at this moment.
        if ((await realHost.status(folder))?.kind !== 'folder') throw error
      }
    })
  },

  rename: (from, to) => attempt(from, `rename to ${to}`, () => fs.promises.rename(from, to)),

  async unlink(path: string): Promise<void> {
    await attempt(path, 'remove', () => fs.promises.rm(path, { force: true }))
  },

  async syncFolder(folder: string): Promise<void> {
    await attempt(folder, 'sync folder', async () => {
      const handle = await fs.promises.open(folder, fs.constants.O_RDONLY | fs.constants.O_DIRECTORY)
      try {
        await handle.sync()
      } finally {
        await handle.close()
      }
    })
  },

  bootId: () => fs.readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim(),
}
