// What a device holds, by the marks that file systems and their like leave at fixed places. Only a name: whether the rest is right is
// for whoever opens it.

import type { BlockDevice } from '../block/device.ts'

interface Mark {
  readonly name: string
  /** Bytes from the start of the device. */
  readonly at: number
  readonly bytes: Uint8Array
}

const text = (name: string, at: number, mark: string): Mark => ({ name, at, bytes: Buffer.from(mark, 'latin1') })

/** The first that is found counts. */
const MARKS: readonly Mark[] = [
  text('LUKS', 0, 'LUKS\xba\xbe'),
  text('ext', 1080, '\x53\xef'),
  text('xfs', 0, 'XFSB'),
  text('btrfs', 65_600, '_BHRfS_M'),
  text('ntfs', 3, 'NTFS    '),
  text('exfat', 3, 'EXFAT   '),
  text('BitLocker', 3, '-FVE-FS-'),
  text('vfat', 82, 'FAT32   '),
  text('vfat', 54, 'FAT1'),
  ...[0, 512, 1024, 1536].map((at) => text('LVM', at, 'LABELONE')),
  text('swap', 4086, 'SWAPSPACE2'),
  text('swap', 4086, 'SWAP-SPACE'),
  text('f2fs', 1024, '\x10\x20\xf5\xf2'),
  text('squashfs', 0, 'hsqs'),
  text('erofs', 1024, '\xe2\xe1\xf5\xe0'),
  text('iso9660', 32_769, 'CD001'),
  text('Linux RAID', 4096, '\xfc\x4e\x2b\xa9'),
]

/** Undefined for what none of the marks tells. */
export async function fileSystemOf(device: BlockDevice): Promise<string | undefined> {
  const found = Buffer.alloc(16)
  for (const { name, at, bytes } of MARKS) {
    if (at + bytes.length > device.size) continue
    const pending = device.read(at, bytes.length, found, 0)
    if (pending !== undefined) await pending
    if (found.compare(bytes, 0, bytes.length, 0, bytes.length) === 0) return name
  }
  return undefined
}
