// The raw format: a host file or host block device whose bytes are the disk's. It owns everything within its size, even
// holes, and has no header, so nothing below it ever shows. Its size may be any number of bytes.

import path from 'node:path'
import { Breather } from '../../base/breather.ts'
import { COPY_PIECE } from '../../base/limits.ts'
import {
  type Access,
  type BlockDevice,
  type Capabilities,
  type Layer,
  OWNED_DATA,
  OWNED_ZERO,
  type OwnershipVisitor,
  type Pending,
  ZERO,
} from '../../block/device.ts'
import { BlockError, isBlockError } from '../../block/error.ts'
import { FileDevice, READ_ONLY_FILE } from '../../file/file-device.ts'
import type { Host, HostFile } from '../../host/host.ts'

/** Smallest piece that a hole is told from data at. */
const PAGE = 4096

/**
 * Opens the image at `path` with access 'read', whether or not it could be written. Kinds: 'not-found', 'permission',
 * 'busy' when another program writes to it.
 */
export async function openRaw(host: Host, imagePath: string, options: { readonly name: string }): Promise<RawImage> {
  const file = await openWritableOrNot(host, imagePath)
  const status = await host.status(imagePath)
  return new RawImage(file, options.name, status?.kind === 'block')
}

async function openWritableOrNot(host: Host, imagePath: string): Promise<HostFile> {
  try {
    return await host.open(imagePath, { write: true, lock: 'read' })
  } catch (error) {
    if (!isBlockError(error, 'permission') && !isBlockError(error, 'read-only')) throw error
    return host.open(imagePath, { lock: 'read' })
  }
}

/**
 * Makes an image of `size` bytes of zeros where nothing may be; it and its name are durable on return. It is a hole unless it is
 * preallocated: its space set aside ('falloc') or written ('full').
 */
export async function createRaw(
  host: Host,
  imagePath: string,
  size: number,
  preallocation: 'off' | 'metadata' | 'falloc' | 'full' = 'off',
): Promise<void> {
  const invalid = (what: string): BlockError =>
    new BlockError('invalid-argument', `${imagePath}: ${what}`, { path: imagePath })
  if (!Number.isSafeInteger(size) || size < 0) throw invalid(`a disk cannot have ${size} bytes`)
  if (preallocation === 'metadata') throw invalid('a raw image has no metadata to preallocate; use falloc or full')
  const file = await host.open(imagePath, { write: true, create: 'exclusive' })
  try {
    try {
      await file.truncate(size)
      if (preallocation !== 'off') await preallocate(file, 0, size, preallocation)
      await file.sync()
    } finally {
      await file.close()
    }
  } catch (error) {
    await host.unlink(imagePath)
    throw error
  }
  await host.syncFolder(path.dirname(imagePath))
}

/** Gives a range that is a hole its space. */
async function preallocate(file: HostFile, offset: number, end: number, how: 'falloc' | 'full'): Promise<void> {
  const breather = new Breather()
  const zeros = new Uint8Array(COPY_PIECE)
  for (; offset < end; offset += COPY_PIECE) {
    const length = Math.min(COPY_PIECE, end - offset)
    if (how === 'falloc') await file.zero(offset, length)
    else await file.write(offset, length, zeros, 0)
    await breather.pause()
  }
}

interface ResizeOptions {
  readonly shrink?: boolean
  readonly preallocation?: 'off' | 'falloc' | 'full'
}

export class RawImage extends FileDevice implements Layer {
  readonly format = 'raw'
  readonly clusterSize = PAGE
  readonly backingReference = undefined
  backing: BlockDevice | undefined
  readonly #isBlockDevice: boolean
  #access: Access = 'read'

  constructor(file: HostFile, name: string, isBlockDevice: boolean) {
    super(file, name)
    this.#isBlockDevice = isBlockDevice
  }

  get path(): string {
    return this.file.path
  }

  get access(): Access {
    return this.#access
  }

  override get can(): Capabilities {
    return this.#access === 'write' ? super.can : READ_ONLY_FILE
  }

  override flush(): Pending {
    return this.#access === 'write' ? super.flush() : undefined
  }

  allocation(offset: number, length: number, visit: OwnershipVisitor): Pending {
    return this.file.extents(offset, length, (piece, extent) =>
      visit(piece, (extent & ZERO) === 0 ? OWNED_DATA : OWNED_ZERO),
    )
  }

  async setAccess(access: Access): Promise<void> {
    if (access === this.#access) return
    if (access === 'write') {
      if (!this.file.writable) {
        const message = `${this.path} may not be written by this user; change its owner, mode or mount`
        throw new BlockError('permission', message, { path: this.path })
      }
      this.file.lock('write')
    } else {
      await this.file.sync()
      this.file.lock('read')
    }
    this.#access = access
  }

  grow(size: number): Promise<void> {
    return this.resize(size)
  }

  /** Grows, with the space for what is added set aside or not; with `shrink` also shrinks: what is past the new end is lost. */
  async resize(size: number, options: ResizeOptions = {}): Promise<void> {
    const { shrink = false, preallocation = 'off' } = options
    if (this.#access !== 'write') throw new BlockError('read-only', `${this.name} is read-only`, { path: this.path })
    if (!Number.isSafeInteger(size) || size < (shrink ? 0 : this.bytes)) {
      const message = `${this.name} cannot ${shrink ? 'go' : 'grow'} from ${this.bytes} to ${size} bytes`
      throw new BlockError('invalid-argument', message, { path: this.path })
    }
    if (this.#isBlockDevice) {
      if (size > this.file.size()) {
        const message = `${this.path} is a block device of ${this.file.size()} bytes; make it larger first`
        throw new BlockError('unsupported', message, { path: this.path })
      }
    } else await this.file.truncate(size)
    if (preallocation !== 'off') await this.#preallocateFrom(this.bytes, size, preallocation)
    await this.file.sync()
    this.bytes = size
  }

  /** Where the space cannot be had, the image keeps its size. */
  async #preallocateFrom(before: number, size: number, how: 'falloc' | 'full'): Promise<void> {
    try {
      await preallocate(this.file, before, size, how)
    } catch (error) {
      await this.file.truncate(before)
      throw error
    }
  }

  setBackingReference(): Promise<void> {
    const message = `${this.path} is a raw image, which cannot name a backing file; use qcow2`
    return Promise.reject(new BlockError('unsupported', message, { path: this.path }))
  }

  override async close(): Promise<void> {
    try {
      if (this.#access === 'write') await this.file.sync()
    } finally {
      this.#access = 'read'
      await this.file.close()
    }
  }
}
