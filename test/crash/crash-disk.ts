// A host whose files are flat memory, for crash states by the million. Recording, it writes down every change of a file in the order
// in which the page cache would have it, and every sync that completed. Judging, one and the same disk is put into state after
// state: changes are applied to a copy of what is durable, Varve opens and repairs it, and `revert` takes back the pages that
// were touched. One folder, no names that change: what is lost of names is the business of the simulated host of src.
//
//   write, punch, zero, truncate ---> Content (page cache) + entry of the log      sync ---> entry {file, upTo} of the log

import { copyBytes } from '../../src/base/bytes.ts'
import type { Random } from '../../src/base/random.ts'
import type { ExtentVisitor, Pending } from '../../src/block/device.ts'
import { BlockError } from '../../src/block/error.ts'
import type { FileStatus, Host, HostFile, OpenOptions } from '../../src/host/host.ts'

/** What a disk writes whole or not at all, in bytes. */
export const SECTOR = 512

const PAGE = 4096

/** One change of a file. Values: never changed once made. */
export type Change =
  | { readonly kind: 'write'; readonly file: string; readonly offset: number; readonly data: Uint8Array }
  | { readonly kind: 'punch' | 'zero'; readonly file: string; readonly offset: number; readonly length: number }
  | { readonly kind: 'truncate'; readonly file: string; readonly size: number }

/** A sync is over: the changes of the file that the log had before entry `upTo` are durable. */
export interface Synced {
  readonly kind: 'synced'
  readonly file: string
  readonly upTo: number
}

/** The bytes of a file. Beyond `size` the memory is zero. */
export class Content {
  bytes: Uint8Array
  size: number
  #isTouched: Uint8Array
  #touched: number[] = []

  constructor(from?: Content, size = 0) {
    this.size = from?.size ?? size
    this.bytes = from === undefined ? new Uint8Array(capacityFor(size)) : from.bytes.slice()
    this.#isTouched = new Uint8Array(this.bytes.length / PAGE)
  }

  apply(change: Change): void {
    if (change.kind === 'write') this.write(change.offset, change.data, 0, change.data.length)
    else if (change.kind === 'truncate') this.truncate(change.size)
    else this.clear(change.offset, change.length, change.kind === 'zero')
  }

  write(offset: number, from: Uint8Array, at: number, length: number): void {
    this.#touch(offset, offset + length)
    copyBytes(from, at, this.bytes, offset, length)
    this.size = Math.max(this.size, offset + length)
  }

  /** Makes the range zero; what lies past the end stays past the end unless the file may grow. */
  clear(offset: number, length: number, mayGrow: boolean): void {
    const end = mayGrow ? offset + length : Math.min(this.size, offset + length)
    if (end <= offset) return
    this.#touch(offset, end)
    this.bytes.fill(0, offset, end)
    this.size = Math.max(this.size, end)
  }

  truncate(size: number): void {
    if (size < this.size) {
      this.#touch(size, this.size)
      this.bytes.fill(0, size, this.size)
    } else {
      this.#touch(size, size)
    }
    this.size = size
  }

  read(offset: number, length: number, into: Uint8Array, at: number): void {
    const there = Math.max(0, Math.min(length, this.bytes.length - offset))
    copyBytes(this.bytes, offset, into, at, there)
    into.fill(0, at + there, at + length)
  }

  /** Takes back all changes since the last call: the file is `base` again, which must not have changed meanwhile. */
  revert(base: Content): void {
    for (const page of this.#touched) {
      const at = page * PAGE
      if (at < base.bytes.length) copyBytes(base.bytes, at, this.bytes, at, PAGE)
      else this.bytes.fill(0, at, at + PAGE)
      this.#isTouched[page] = 0
    }
    this.#touched = []
    this.size = base.size
  }

  #touch(offset: number, end: number): void {
    if (end > this.bytes.length) {
      const bytes = new Uint8Array(capacityFor(end))
      bytes.set(this.bytes)
      const isTouched = new Uint8Array(bytes.length / PAGE)
      isTouched.set(this.#isTouched)
      this.bytes = bytes
      this.#isTouched = isTouched
    }
    for (let page = Math.floor(offset / PAGE); page * PAGE < end; page++) {
      if (this.#isTouched[page] === 1) continue
      this.#isTouched[page] = 1
      this.#touched.push(page)
    }
  }
}

function capacityFor(size: number): number {
  return Math.max(16 * PAGE, 2 ** Math.ceil(Math.log2(Math.max(1, size))))
}

export interface DiskOptions {
  /** The files are host block devices: they never grow or shrink. */
  readonly isDevice?: boolean
  /** With it, half of the operations complete later, in an order that it chooses; else all within the call but sync. */
  readonly late?: Random
  /** Every change and every completed sync is added here. */
  readonly log?: { push(entry: Change | Synced): unknown; readonly length: number }
}

export class CrashDisk implements Host {
  readonly files = new Map<string, Content>()
  readonly isDevice: boolean
  readonly #options: DiskOptions
  readonly #open = new Set<CrashFile>()
  readonly #waiting: (() => void)[] = []

  constructor(options: DiskOptions = {}) {
    this.isDevice = options.isDevice === true
    this.#options = options
  }

  /** The process dies: its handles do nothing any more, and what it asked for and was not done never will be. */
  kill(): void {
    for (const file of this.#open) file.isOpen = false
    this.#open.clear()
    this.#waiting.length = 0
  }

  async open(path: string, options: OpenOptions = {}): Promise<HostFile> {
    let content = this.files.get(path)
    if (content === undefined && (options.create ?? 'never') === 'never')
      throw new BlockError('not-found', `${path} does not exist`, { path })
    if (content !== undefined && options.create === 'exclusive')
      throw new BlockError('exists', `${path} exists`, { path })
    content ??= new Content()
    this.files.set(path, content)
    const file = new CrashFile(this, path, content, options.write === true)
    this.#open.add(file)
    return file
  }

  async status(path: string): Promise<FileStatus | undefined> {
    const content = this.files.get(path)
    if (content === undefined) return undefined
    const { size } = content
    return {
      kind: this.isDevice ? 'block' : 'file',
      size,
      allocated: size,
      identity: path,
      modifiedMs: 0,
    }
  }

  async realPath(path: string): Promise<string> {
    return path
  }

  async list(): Promise<string[]> {
    return [...this.files.keys()].sort()
  }

  async makeFolder(): Promise<void> {}

  async rename(from: string, to: string): Promise<void> {
    throw new BlockError('unsupported', `${from} cannot become ${to}: names do not change on this disk`, { path: from })
  }

  async unlink(path: string): Promise<void> {
    this.files.delete(path)
  }

  async syncFolder(): Promise<void> {}

  bootId(): string {
    return '00000000-0000-4000-8000-000000000000'
  }

  /** For CrashFile. */
  changed(change: Change): void {
    this.#options.log?.push(change)
  }

  /** For CrashFile: makes durable what the file's log holds now. */
  async sync(file: CrashFile): Promise<void> {
    const { log, late } = this.#options
    const upTo = log?.length ?? 0
    const done = (): void => {
      if (file.isOpen) log?.push({ kind: 'synced', file: file.path, upTo })
    }
    if (late !== undefined) return this.#later(done, late)
    await Promise.resolve()
    done()
  }

  /** For CrashFile: does the work in the call, or later in an order of the scheduler's. */
  run(work: () => void): Pending {
    const { late } = this.#options
    if (late === undefined || late.chance(0.5)) {
      work()
      return undefined
    }
    return this.#later(work, late)
  }

  forget(file: CrashFile): void {
    this.#open.delete(file)
  }

  #later(work: () => void, late: Random): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#waiting.push(() => {
        try {
          work()
          resolve()
        } catch (error) {
          reject(error as Error)
        }
      })
      setImmediate(() => this.#waiting.splice(late.below(this.#waiting.length), 1)[0]?.())
    })
  }
}

class CrashFile implements HostFile {
  readonly path: string
  readonly writable: boolean
  isOpen = true
  readonly #disk: CrashDisk
  readonly #content: Content

  constructor(disk: CrashDisk, path: string, content: Content, writable: boolean) {
    this.#disk = disk
    this.path = path
    this.#content = content
    this.writable = writable
  }

  size(): number {
    return this.#content.size
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.#disk.run(() => this.#content.read(offset, length, into, at))
  }

  readNow(offset: number, length: number, into: Uint8Array, at: number): void {
    this.#content.read(offset, length, into, at)
  }

  write(offset: number, length: number, from: Uint8Array, at: number): Pending {
    return this.#change(offset + length, () => {
      this.#content.write(offset, from, at, length)
      return { kind: 'write', file: this.path, offset, data: new Uint8Array(from.subarray(at, at + length)) }
    })
  }

  punch(offset: number, length: number): Pending {
    return this.#change(0, () => {
      this.#content.clear(offset, length, false)
      return { kind: 'punch', file: this.path, offset, length }
    })
  }

  zero(offset: number, length: number): Pending {
    return this.#change(offset + length, () => {
      this.#content.clear(offset, length, true)
      return { kind: 'zero', file: this.path, offset, length }
    })
  }

  truncate(size: number): Pending {
    if (this.#disk.isDevice) throw this.#failure('invalid-argument', 'is a block device and keeps its size')
    return this.#change(0, () => {
      this.#content.truncate(size)
      return { kind: 'truncate', file: this.path, size }
    })
  }

  extents(_offset: number, length: number, visit: ExtentVisitor): Pending {
    visit(length, 0)
    return undefined
  }

  async sync(): Promise<void> {
    this.#checkOpen()
    await this.#disk.sync(this)
    this.#checkOpen()
  }

  lock(): void {
    // Nobody else is on this disk.
  }

  async close(): Promise<void> {
    this.isOpen = false
    this.#disk.forget(this)
  }

  #change(end: number, work: () => Change): Pending {
    this.#checkOpen()
    if (!this.writable) throw this.#failure('read-only', 'was opened for reading only')
    if (this.#disk.isDevice && end > this.#content.size) throw this.#failure('no-space', 'ends before the write does')
    return this.#disk.run(() => this.#disk.changed(work()))
  }

  #checkOpen(): void {
    if (!this.isOpen) throw this.#failure('closed', 'was closed')
  }

  #failure(kind: BlockError['kind'], problem: string): BlockError {
    return new BlockError(kind, `${this.path} ${problem}`, { path: this.path })
  }
}
