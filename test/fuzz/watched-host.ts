// A host in memory that watches what is asked of it: every operation counts against a budget, nothing may be read far from the
// file or written beyond all reason. What breaks a rule throws a Violation, which no code under test knows or catches as an
// operating error. A file that outgrows its limit fails as on a full disk.

import assert from 'node:assert/strict'
import path from 'node:path'
import type { ExtentVisitor, Pending } from '../../src/block/device.ts'
import { BlockError } from '../../src/block/error.ts'
import type { FileStatus, Host, HostFile, OpenOptions } from '../../src/host/host.ts'

/** Where no image of a few megabytes is ever written, in bytes. */
const REASON = 2 ** 40

/** A rule was broken: the code under test is wrong. */
export class Violation extends Error {
  override readonly name = 'Violation'
}

export interface Watch {
  /** Operations on files, all together. */
  readonly operations: number
  /** Bytes that a file may have. */
  readonly fileBytes: number
  /** How far past its end a file may be read: one request may touch a cluster that is cut. */
  readonly slack: number
}

class Content {
  bytes: Buffer
  size: number

  constructor(bytes: Buffer) {
    this.bytes = bytes
    this.size = bytes.length
  }
}

export class WatchedHost implements Host {
  readonly #files = new Map<string, Content>()
  readonly #watch: Watch
  /** Set to false where entries may lead past the end, as after a crash. */
  watchesReads = true
  /** A broken rule, also when somebody caught it. */
  violation: Violation | undefined
  operations = 0

  constructor(watch: Watch) {
    this.#watch = watch
  }

  put(name: string, bytes: Buffer): void {
    this.#files.set(name, new Content(bytes))
  }

  bytesOf(name: string): Buffer {
    const { bytes, size } = this.#content(name)
    return Buffer.from(bytes.subarray(0, size))
  }

  async open(name: string, options: OpenOptions = {}): Promise<HostFile> {
    if (options.create !== undefined && options.create !== 'never' && !this.#files.has(name))
      this.put(name, Buffer.alloc(0))
    return new WatchedFile(this, name, this.#content(name), options.write === true)
  }

  async status(name: string): Promise<FileStatus | undefined> {
    const content = this.#files.get(name)
    if (content === undefined) return undefined
    return { kind: 'file', size: content.size, allocated: content.size, identity: name, modifiedMs: 0 }
  }

  async realPath(name: string): Promise<string> {
    this.#content(name)
    return name
  }

  async list(folder: string): Promise<string[]> {
    return [...this.#files.keys()].filter((name) => path.dirname(name) === folder).map((name) => path.basename(name))
  }

  async makeFolder(): Promise<void> {}

  async rename(from: string, to: string): Promise<void> {
    this.#files.set(to, this.#content(from))
    this.#files.delete(from)
  }

  async unlink(name: string): Promise<void> {
    this.#files.delete(name)
  }

  async syncFolder(): Promise<void> {}

  bootId(): string {
    return 'fuzz'
  }

  /** Counts an operation. */
  begin(): void {
    if (++this.operations > this.#watch.operations) this.fail(`more than ${this.#watch.operations} operations`)
  }

  checkRange(doing: string, offset: number, length: number, end: number): void {
    const isRange = Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0
    if (!isRange || offset + length > end) this.fail(`${doing} of ${length} bytes at ${offset}; ${end} is the end`)
  }

  checkRead(content: Content, offset: number, length: number): void {
    const { slack } = this.#watch
    this.checkRange('read', offset, length, this.watchesReads ? content.size + slack : Number.MAX_SAFE_INTEGER)
  }

  get fileBytes(): number {
    return this.#watch.fileBytes
  }

  fail(what: string): never {
    this.violation ??= new Violation(what)
    throw this.violation
  }

  #content(name: string): Content {
    const content = this.#files.get(name)
    if (content === undefined) throw new BlockError('not-found', `${name} does not exist`, { path: name })
    return content
  }
}

/** Everything is done within the call, but for syncs. */
class WatchedFile implements HostFile {
  readonly path: string
  readonly writable: boolean
  readonly #host: WatchedHost
  readonly #content: Content
  #isOpen = true

  constructor(host: WatchedHost, name: string, content: Content, writable: boolean) {
    this.#host = host
    this.path = name
    this.#content = content
    this.writable = writable
  }

  size(): number {
    this.#begin()
    return this.#content.size
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    this.#begin()
    this.#host.checkRead(this.#content, offset, length)
    assert.ok(at >= 0 && at + length <= into.length, 'the buffer holds what is read')
    const { bytes, size } = this.#content
    const held = Math.max(0, Math.min(length, size - offset))
    into.set(bytes.subarray(offset, offset + held), at)
    into.fill(0, at + held, at + length)
    return undefined
  }

  readNow(offset: number, length: number, into: Uint8Array, at: number): void {
    void this.read(offset, length, into, at)
  }

  write(offset: number, length: number, from: Uint8Array, at: number): Pending {
    assert.ok(at >= 0 && at + length <= from.length, 'the buffer holds what is written')
    this.#beginChange('write', offset, length)
    this.#grow(offset + length)
    this.#content.bytes.set(from.subarray(at, at + length), offset)
    return undefined
  }

  punch(offset: number, length: number): Pending {
    this.#beginChange('punch', offset, length)
    this.#content.bytes.fill(0, offset, Math.min(this.#content.size, offset + length))
    return undefined
  }

  zero(offset: number, length: number): Pending {
    this.#beginChange('zero', offset, length)
    this.#grow(offset + length)
    this.#content.bytes.fill(0, offset, offset + length)
    return undefined
  }

  extents(_offset: number, length: number, visit: ExtentVisitor): Pending {
    this.#begin()
    visit(length, 0)
    return undefined
  }

  truncate(size: number): Pending {
    this.#beginChange('truncate', size, 0)
    if (size < this.#content.size) this.#content.bytes.fill(0, size)
    else this.#grow(size)
    this.#content.size = size
    return undefined
  }

  async sync(): Promise<void> {
    this.#begin()
  }

  lock(): void {}

  async close(): Promise<void> {
    this.#isOpen = false
  }

  #begin(): void {
    this.#host.begin()
    if (!this.#isOpen) this.#host.fail('used after close')
  }

  #beginChange(doing: string, offset: number, length: number): void {
    this.#begin()
    if (!this.writable) this.#host.fail(`${doing} of a file that was opened for reading`)
    this.#host.checkRange(doing, offset, length, REASON)
    if (doing !== 'punch' && offset + length > this.#host.fileBytes)
      throw new BlockError('no-space', `${this.path}: the watched host is full`, { path: this.path })
  }

  #grow(size: number): void {
    const content = this.#content
    if (size > content.bytes.length) {
      const bytes = Buffer.alloc(Math.max(size, Math.min(this.#host.fileBytes, content.bytes.length * 2)))
      bytes.set(content.bytes)
      content.bytes = bytes
    }
    content.size = Math.max(content.size, size)
  }
}
