// The superblock of ext2, ext3 and ext4 (Linux, Documentation/filesystems/ext4, "Super Block"): the numbers that say where all else is,
// checked against each other and against the device. Numbers are little-endian.

import type { BlockDevice } from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'

const SUPERBLOCK_AT = 1024
const SUPERBLOCK_BYTES = 1024
const MAGIC = 0xef53

/** Features without which the rest is read wrongly ("s_feature_incompat"): those known here, and those that are refused by name. */
const RECOVER = 0x4
const BIT64 = 0x80
const KNOWN: Readonly<Record<number, string>> = {
  0x2: 'filetype',
  [RECOVER]: 'needs_recovery',
  0x40: 'extents',
  [BIT64]: '64bit',
  0x100: 'mmp',
  0x200: 'flex_bg',
  0x400: 'ea_inode',
  0x2000: 'metadata_csum_seed',
  0x4000: 'large_dir',
  0x8000: 'inline_data',
  0x1_0000: 'encrypt',
  0x2_0000: 'casefold',
}
const REFUSED: Readonly<Record<number, string>> = {
  0x1: 'compression',
  0x8: 'journal_dev',
  0x10: 'meta_bg',
  0x1000: 'dirdata',
}

export interface Superblock {
  /** Bytes. */
  readonly blockSize: number
  readonly blocks: number
  readonly inodes: number
  readonly inodeSize: number
  readonly inodesPerGroup: number
  /** The block of the first group descriptor, and bytes of one. */
  readonly descriptorBlock: number
  readonly descriptorSize: number
  /** It was in use at its moment: what its journal holds is not in its place yet. */
  readonly needsRecovery: boolean
}

/** Kinds 'invalid-format' when it is none or cannot be right, 'unsupported' for features that are not read here. */
export async function readSuperblock(device: BlockDevice): Promise<Superblock> {
  const bad = (what: string): BlockError =>
    new BlockError('invalid-format', `${device.name} is no ext file system that can be read: ${what}`, {
      device: device.name,
    })
  if (device.size < SUPERBLOCK_AT + SUPERBLOCK_BYTES) throw bad('it is too small')
  const bytes = Buffer.alloc(SUPERBLOCK_BYTES)
  const pending = device.read(SUPERBLOCK_AT, SUPERBLOCK_BYTES, bytes, 0)
  if (pending !== undefined) await pending
  if (bytes.readUInt16LE(56) !== MAGIC) throw bad('it has no superblock')
  const features = bytes.readUInt32LE(96)
  refuseUnknown(device, features)
  const logBlock = bytes.readUInt32LE(24)
  if (logBlock > 6) throw bad(`its blocks would have 2^${10 + logBlock} bytes`)
  const blockSize = 1024 << logBlock
  const isWide = (features & BIT64) !== 0
  const blocks = bytes.readUInt32LE(4) + (isWide ? bytes.readUInt32LE(0x150) * 0x1_0000_0000 : 0)
  if (blocks < 1 || blocks * blockSize > device.size)
    throw bad(`its ${blocks} blocks of ${blockSize} bytes do not lie in ${device.size} bytes`)
  const inodeSize = bytes.readUInt32LE(76) === 0 ? 128 : bytes.readUInt16LE(88)
  if (inodeSize < 128 || inodeSize > blockSize || (inodeSize & (inodeSize - 1)) !== 0)
    throw bad(`its inodes would have ${inodeSize} bytes`)
  const inodes = bytes.readUInt32LE(0)
  const inodesPerGroup = bytes.readUInt32LE(40)
  if (inodesPerGroup < 1 || inodesPerGroup > blockSize * 8 || inodes < 11) throw bad('its inodes are not counted right')
  const descriptorSize = isWide ? bytes.readUInt16LE(254) : 32
  if (descriptorSize < 32 || descriptorSize > 1024 || (descriptorSize & (descriptorSize - 1)) !== 0)
    throw bad(`its group descriptors would have ${descriptorSize} bytes`)
  const descriptorBlock = bytes.readUInt32LE(20) + 1
  return {
    blockSize,
    blocks,
    inodes,
    inodeSize,
    inodesPerGroup,
    descriptorBlock,
    descriptorSize,
    needsRecovery: (features & RECOVER) !== 0,
  }
}

function refuseUnknown(device: BlockDevice, features: number): void {
  for (let bit = 0; bit < 32; bit++) {
    const feature = 2 ** bit
    if (((features >>> bit) & 1) === 0 || KNOWN[feature] !== undefined) continue
    const name = REFUSED[feature] ?? `0x${feature.toString(16)}`
    const message = `${device.name}: its ext file system has the feature ${name}, which Varve does not read`
    throw new BlockError('unsupported', message, { device: device.name })
  }
}
