// What Varve asks of the operating system, as an interface: files, folders, syncs, locks and the boot id. The real one is
// real.ts; simulated.ts keeps unsynced writes apart and crashes. Nothing else in Varve opens a path.
//
// Invariant: what is not synced may be lost or torn in any combination by a crash of the host; what was written survives
// the death of the process. A name (create, rename, unlink) is durable after `syncFolder` of its folder.

import type { ExtentVisitor, Pending } from '../block/device.ts'

export interface OpenOptions {
  /** Open for writing too. */
  readonly write?: boolean
  /** 'never' (the default): the file must exist; 'if-missing'; 'exclusive': it must not exist. */
  readonly create?: 'never' | 'if-missing' | 'exclusive'
  /** Permission bits of a created file; 0o600 unless told. */
  readonly mode?: number
  /**
   * Claim on the image, seen by other processes and compatible with QEMU's own: 'write' refuses every other user,
   * 'read' refuses writers. Without it no lock is taken. A conflict is a BlockError of kind 'busy'.
   */
  readonly lock?: 'read' | 'write'
  /**
   * For a file that no guest waits for: reads and writes take a thread of the pool, so that one which the kernel holds up
   * (a cold page, too many dirty ones) does not hold up the event loop.
   */
  readonly background?: boolean
  /** Whole pages of 4 KiB go past the page cache. Kind 'unsupported' where the file system does not do that. */
  readonly direct?: boolean
  /** Ranges of it may be asked for as memory; its blocks are allocated. */
  readonly mapped?: boolean
}

/** Offsets and lengths in bytes. Requests fail with BlockErrors that name the path. */
/** A range of a file as memory. */
export interface MappedRange {
  /** What is stored here is written at once, as by `write`, for `sync` to make durable. Not to be touched after `release`. */
  readonly bytes: Uint8Array
  release(): void
}

export interface HostFile {
  readonly path: string
  readonly writable: boolean
  /** The length of the file now, in bytes. */
  size(): number
  /** Reads exactly `length` bytes; what lies past the end of the file reads as zeros. */
  read(offset: number, length: number, into: Uint8Array, at: number): Pending
  /** As `read`, within the call whatever that takes: for small pieces of what is mostly in the page cache. */
  readNow(offset: number, length: number, into: Uint8Array, at: number): void
  /** Writes exactly `length` bytes, growing the file where needed. */
  write(offset: number, length: number, from: Uint8Array, at: number): Pending
  /** Makes the range read as zeros without growing the file; deallocates whole blocks where the file system can. */
  punch(offset: number, length: number): Pending
  /** Makes the range read as zeros and keeps its blocks allocated where the file system can; may grow the file. */
  zero(offset: number, length: number): Pending
  /** Visits the range as data (0) and holes (HOLE | ZERO). All data where the file system cannot tell. */
  extents(offset: number, length: number, visit: ExtentVisitor): Pending
  truncate(size: number): Pending
  /**
   * A range as memory, from a multiple of 4096 on and within the file; undefined where that is not to be had. The file must have been opened
   * as `mapped`.
   */
  map?(offset: number, length: number): MappedRange | undefined
  /** Every write completed before the call is on stable storage, with the file's length. */
  sync(): Promise<void>
  /** Changes the claim taken at open; undefined gives it back. Kind 'busy' on a conflict; the old claim then stays. */
  lock(claim: 'read' | 'write' | undefined): void
  close(): Promise<void>
}

export interface FileStatus {
  readonly kind: 'file' | 'folder' | 'block' | 'other'
  /** Bytes. */
  readonly size: number
  /** Bytes that the file takes on the disk. */
  readonly allocated: number
  /** Tells one file from another on this host: device and inode. */
  readonly identity: string
  /** Last modification, milliseconds since 1970. */
  readonly modifiedMs: number
}

export interface Host {
  open(path: string, options?: OpenOptions): Promise<HostFile>
  /** Undefined when there is nothing at the path. */
  status(path: string): Promise<FileStatus | undefined>
  /** The path with symbolic links resolved; kind 'not-found' when it does not exist. */
  realPath(path: string): Promise<string>
  /** Names in a folder, sorted; empty when the folder does not exist. */
  list(folder: string): Promise<string[]>
  /** Makes a folder and those above it that are missing. */
  makeFolder(folder: string): Promise<void>
  rename(from: string, to: string): Promise<void>
  /** No error when there is nothing at the path. */
  unlink(path: string): Promise<void>
  /** Makes the names in a folder durable. */
  syncFolder(folder: string): Promise<void>
  /** Long work is over: memory that the process let go is to be given back to the system, soon and behind the scenes. */
  giveBackMemory?(): void
  /** Changes whenever the host starts: what was written before and not synced may be lost. */
  bootId(): string
}
