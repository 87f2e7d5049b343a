// The GUID partition table: a header in sector 1 and a copy in the last sector, each with checksums of itself and of its array of entries
// (UEFI specification, "GUID Partition Table"). The first copy that is right counts. Sectors have 512 or 4096 bytes.

import zlib from 'node:zlib'
import { GPT_ENTRIES_BYTES_MAX } from '../../base/limits.ts'
import { roundDown } from '../../base/round.ts'
import type { BlockDevice } from '../../block/device.ts'
import { BlockError } from '../../block/error.ts'
import { type Partition, type PartitionTable, placed, readBytes } from './partition.ts'

const SECTOR_SIZES = [512, 4096] as const
const HEADER_BYTES = 92
const ENTRY_BYTES_MIN = 128
const UNUSED = '00000000-0000-0000-0000-000000000000'

/** Undefined when there is none. Kind 'corrupt' when there is one, and no copy of it is right. */
export async function readGpt(disk: BlockDevice): Promise<PartitionTable | undefined> {
  let seen = 0
  for (const sector of SECTOR_SIZES) {
    for (const at of [sector, roundDown(disk.size, sector) - sector]) {
      const header = await readBytes(disk, at, sector)
      if (header?.toString('latin1', 0, 8) !== 'EFI PART') continue
      seen++
      const entries = await readEntries(disk, header, at / sector, sector)
      if (entries !== undefined) return { kind: 'gpt', partitions: partitionsOf(disk, entries, sector) }
    }
  }
  if (seen === 0) return undefined
  throw new BlockError('corrupt', `${disk.name} has a GPT, of which no copy has the right checksum`, {
    device: disk.name,
  })
}

interface Entries {
  readonly bytes: Buffer
  readonly size: number
}

/** The array of entries; undefined when it or its header is not right. */
async function readEntries(
  disk: BlockDevice,
  header: Buffer,
  place: number,
  sector: number,
): Promise<Entries | undefined> {
  const length = header.readUInt32LE(12)
  if (length < HEADER_BYTES || length > sector || uint64(header, 24) !== place) return undefined
  const blank = Buffer.from(header.subarray(0, length))
  blank.writeUInt32LE(0, 16)
  if (zlib.crc32(blank) !== header.readUInt32LE(16)) return undefined
  const count = header.readUInt32LE(80)
  const size = header.readUInt32LE(84)
  if (size < ENTRY_BYTES_MIN || size % 8 !== 0 || count * size > GPT_ENTRIES_BYTES_MAX) return undefined
  const bytes = await readBytes(disk, uint64(header, 72) * sector, count * size)
  if (bytes === undefined || zlib.crc32(bytes) !== header.readUInt32LE(88)) return undefined
  return { bytes, size }
}

function partitionsOf(disk: BlockDevice, { bytes, size }: Entries, sector: number): Partition[] {
  const found: Partition[] = []
  for (let at = 0, number = 1; at < bytes.length; at += size, number++) {
    const type = guid(bytes, at)
    if (type === UNUSED) continue
    const start = uint64(bytes, at + 32)
    const length = uint64(bytes, at + 40) - start + 1
    const label = bytes.toString('utf16le', at + 56, at + 128).replace(/\0.*$/s, '')
    found.push(placed({ number, start: start * sector, size: length * sector, type, label }, disk.size))
  }
  return found
}

/** Not a safe integer when it is too large to be a place. */
function uint64(bytes: Buffer, at: number): number {
  return bytes.readUInt32LE(at + 4) * 0x1_0000_0000 + bytes.readUInt32LE(at)
}

/** As text: the first three of its parts are stored with the lowest byte first. */
function guid(bytes: Buffer, at: number): string {
  const hex = (from: number, to: number): string => bytes.toString('hex', at + from, at + to)
  const little = (from: number, to: number): string =>
    Buffer.from(bytes.subarray(at + from, at + to))
      .reverse()
      .toString('hex')
  return `${little(0, 4)}-${little(4, 6)}-${little(6, 8)}-${hex(8, 10)}-${hex(10, 16)}`
}
