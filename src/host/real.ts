// The real host: opens files, and works on folders and names, over Node's file system calls. What an open file does is in
// real-file.ts.

import fs from 'node:fs'
import { dirname } from 'node:path'
import { DIRECT_PAGE } from '../base/limits.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import { bounceBuffers } from './bounce-buffers.ts'
import { DirectFile } from './direct-file.ts'
import type { FileStatus, Host, HostFile, OpenOptions } from './host.ts'
import { blockDeviceSize, type FileWay, RealFile } from './real-file.ts'
import { giveBackMemory } from './spare-memory.ts'
import { syscalls } from './syscalls.ts'

/** File systems that are in memory, by the number that statfs tells. */
const MEMORY_FILE_SYSTEMS: ReadonlySet<number> = new Set([0x01021994 /* tmpfs */, 0x858458f6 /* ramfs */])

/**
 * File systems that write into the blocks that a file has, so that a store into mapped memory finds room. Others take new ones, and where there is
 * none left the process is killed for it.
 */
const MAPPABLE_FILE_SYSTEMS: ReadonlySet<number> = new Set([
  0xef53 /* ext4 */, 0x58465342 /* XFS */, 0x01021994 /* tmpfs */,
])

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

async function openFile(path: string, options: OpenOptions): Promise<HostFile> {
  const writable = options.write === true
  const access = writable ? fs.constants.O_RDWR : fs.constants.O_RDONLY
  const flags = access | CREATE_FLAGS[options.create ?? 'never'] | fs.constants.O_NOCTTY
  const fd = await openDescriptor(path, flags, options.mode ?? 0o600)
  try {
    const stats = fs.fstatSync(fd)
    const isBlock = stats.isBlockDevice()
    if (!stats.isFile() && !isBlock) {
      throw new BlockError('invalid-argument', `${path} is neither a file nor a block device`, { path })
    }
    const way = options.background === true ? 'background' : await wayOf(path, fd, isBlock)
    const direct = options.direct === true ? await openDirect(path, fd, access) : undefined
    const isMappable = options.mapped === true && !isBlock && (await isOn(MAPPABLE_FILE_SYSTEMS, path))
    const file = new RealFile({ path, fd, writable, isBlock, way, isMappable })
    return direct === undefined ? file : new DirectFile(file, direct)
  } catch (error) {
    fs.closeSync(fd)
    throw error
  }
}

/** A second descriptor of the same file, whatever its name leads to by now. */
async function openDirect(path: string, fd: number, access: number): Promise<number> {
  try {
    const direct = await openDescriptor(`/proc/self/fd/${fd}`, access | fs.constants.O_DIRECT, 0)
    return await probed(direct)
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    if (code !== 'EINVAL' && code !== 'EOPNOTSUPP') throw error
    const message = `${path}: its file system does not read and write past the page cache (O_DIRECT); use --cache writeback`
    throw new BlockError('unsupported', message, { path }, error)
  }
}

/** Some file systems open a file so and then refuse to read it. */
async function probed(direct: number): Promise<number> {
  try {
    await new Promise<void>((resolve, reject) =>
      bounceBuffers().lend((piece) =>
        fs.read(direct, piece, 0, DIRECT_PAGE, 0, (error) => {
          bounceBuffers().giveBack(piece)
          if (error === null) resolve()
          else reject(error)
        }),
      ),
    )
    return direct
  } catch (error) {
    fs.closeSync(direct)
    throw error
  }
}

/** A descriptor that keeps a file's content while its name goes; undefined where there is none to be had, which costs only time. */
async function heldOpen(path: string): Promise<number | undefined> {
  const { O_RDONLY, O_NOFOLLOW, O_NONBLOCK } = fs.constants
  return openDescriptor(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK, 0).catch(() => undefined)
}

/** In the pool, since a server that does not answer holds up whoever opens a file of it. */
function openDescriptor(path: string, flags: number, mode: number): Promise<number> {
  return new Promise((resolve, reject) =>
    fs.open(path, flags, mode, (error, fd) => (error === null ? resolve(fd) : reject(error))),
  )
}

async function wayOf(path: string, fd: number, isBlock: boolean): Promise<FileWay> {
  // A block device's node is in memory, but not the device.
  if (!isBlock && (await isOn(MEMORY_FILE_SYSTEMS, path))) return 'memory'
  return syscalls?.canReadCached(fd) === true ? 'cached' : 'judged'
}

async function isOn(fileSystems: ReadonlySet<number>, path: string): Promise<boolean> {
  return fileSystems.has((await fs.promises.statfs(path)).type)
}

export const realHost: Host = {
  giveBackMemory,
  async open(path: string, options: OpenOptions = {}): Promise<HostFile> {
    const file = await attempt(path, 'open', () => openFile(path, options))
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
    const fd = await heldOpen(path)
    try {
      await attempt(path, 'remove', () => fs.promises.rm(path, { force: true }))
    } finally {
      // What the file held is freed by this close, in the pool: for a large file that takes a while, and nobody waits for it.
      if (fd !== undefined) fs.close(fd, () => undefined)
    }
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
