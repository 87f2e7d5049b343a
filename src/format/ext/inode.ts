// An inode of ext2, ext3 and ext4 ("Index Nodes"): what a file is, how long, when it was written, and the 60 bytes that lead to its content.
// Numbers are little-endian.

/** Of the flags: its content is mapped by extents; is in the inode itself; is encrypted. */
const EXTENTS = 0x8_0000
const INLINE = 0x1000_0000
const ENCRYPTED = 0x800

const TYPES = {
  0x1000: 'fifo',
  0x2000: 'character device',
  0x4000: 'directory',
  0x6000: 'block device',
  0x8000: 'file',
  0xa000: 'link',
  0xc000: 'socket',
} as const

export type FileType = (typeof TYPES)[keyof typeof TYPES]

export interface Inode {
  readonly number: number
  readonly type: FileType
  /** Permission bits, with those for set-user-id and its like. */
  readonly mode: number
  /** Bytes. */
  readonly size: number
  /** When its content was last changed, in milliseconds since 1970; before 1901 and after 2038 it is not exact. */
  readonly modifiedMs: number
  readonly map: 'extents' | 'lists'
  /** Why its content is not read here. */
  readonly unread: string | undefined
  readonly root: Buffer
}

const ROOT_AT = 40
const ROOT_BYTES = 60

/** Undefined for one that is not in use, or that is nothing known. */
export function decodeInode(bytes: Buffer, number: number): Inode | undefined {
  const mode = bytes.readUInt16LE(0)
  const type = TYPES[(mode & 0xf000) as keyof typeof TYPES] as FileType | undefined
  if (type === undefined || bytes.readUInt16LE(26) === 0) return undefined
  const flags = bytes.readUInt32LE(32)
  const isSized = type === 'file' || type === 'directory'
  const high = isSized ? bytes.readUInt32LE(108) : 0
  return {
    number,
    type,
    mode: mode & 0xfff,
    size: high * 0x1_0000_0000 + bytes.readUInt32LE(4),
    modifiedMs: bytes.readInt32LE(16) * 1000,
    map: (flags & EXTENTS) !== 0 ? 'extents' : 'lists',
    unread:
      (flags & ENCRYPTED) !== 0
        ? 'is encrypted'
        : (flags & INLINE) !== 0
          ? 'lies in its inode (inline_data)'
          : undefined,
    root: bytes.subarray(ROOT_AT, ROOT_AT + ROOT_BYTES),
  }
}
