// Loads koffi, by which JavaScript calls libc. Where it cannot be loaded, or VARVE_NO_SYSCALLS=1 forbids it, `koffi` is undefined
// and whoever wants a system call has a plain way.

import { createRequire } from 'node:module'
import { assert } from '../base/assert.ts'
import type { MappedRange } from './host.ts'

interface Callable {
  (...args: unknown[]): unknown
  async(...args: unknown[]): void
}

export interface Koffi {
  load(path: string | null): { func(prototype: string): Callable }
  /** Of a buffer or a pointer. */
  address(of: unknown): bigint
  /** The memory at a pointer, as it is. */
  view(pointer: unknown, length: number): ArrayBuffer
  errno(): number
}

function load(): Koffi | undefined {
  if (process.env['VARVE_NO_SYSCALLS'] === '1') return undefined
  try {
    return createRequire(import.meta.url)('koffi') as Koffi
  } catch {
    return undefined
  }
}

export const koffi = load()

const MMAP = 'void *mmap(void *where, size_t length, int protection, int flags, int fd, int64_t offset)'
const PROT_READ_WRITE = 3
const MAP_PRIVATE_ANONYMOUS = 0x22
const MAP_SHARED_POPULATE = 0x8001
const MAP_FAILED = 2n ** 64n - 1n

/** A part of what a descriptor offers, or memory of its own when there is none; at a page boundary, and never given back. */
export function mapMemory(by: Koffi, length: number, fd = -1, offset = 0): ArrayBuffer {
  const flags = fd < 0 ? MAP_PRIVATE_ANONYMOUS : MAP_SHARED_POPULATE
  const pointer = by.load(null).func(MMAP)(null, length, PROT_READ_WRITE, flags, fd, offset)
  if (pointer === null || by.address(pointer) === MAP_FAILED) throw new Error(`mmap fails with errno ${by.errno()}`)
  return by.view(pointer, length)
}

const MUNMAP = 'int munmap(void *where, size_t length)'
const MAP_SHARED = 1

/** A range of an open file, at a page boundary, until it is released; undefined when the system has none. */
export function mapRange(by: Koffi, fd: number, offset: number, length: number): MappedRange | undefined {
  const libc = by.load(null)
  const pointer = libc.func(MMAP)(null, length, PROT_READ_WRITE, MAP_SHARED, fd, offset)
  if (pointer === null || by.address(pointer) === MAP_FAILED) return undefined
  const release = (): void => void libc.func(MUNMAP)(pointer, length)
  return { bytes: new Uint8Array(by.view(pointer, length)), release }
}

/** Where buffers are in memory: an ArrayBuffer stays where it is, and asking koffi takes as long as a fifth of a read. */
const known = new WeakMap<ArrayBufferLike, number>()
let last: ArrayBufferLike | undefined
let lastAddress = 0

/** The address of a buffer's first byte. Needs koffi. */
export function addressOf(buffer: ArrayBufferLike): number {
  if (buffer === last) return lastAddress
  let address = known.get(buffer)
  if (address === undefined) {
    address = Number(koffi?.address(buffer))
    assert(Number.isSafeInteger(address), 'an address is below 2^53')
    known.set(buffer, address)
  }
  last = buffer
  lastAddress = address
  return address
}
