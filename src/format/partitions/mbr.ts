// The partition table of PCs, in sector 0, with logical partitions. Each of these has a sector of its own before it, laid out as the first
// one: entry 1 is the logical partition, counted from that sector, entry 2 leads to the next such sector, counted from the start of
// the extended partition.
//
//   sector 0    | primary 1 | extended                                        |
//                           | table, logical 5 | table, logical 6 | ...

import { LOGICAL_PARTITIONS_MAX } from '../../base/limits.ts'
import type { BlockDevice } from '../../block/device.ts'
import { type Partition, type PartitionTable, placed, readBytes } from './partition.ts'

const SECTOR = 512
const ENTRIES_AT = 446
const ENTRY_BYTES = 16
const EXTENDED = new Set([0x05, 0x0f, 0x85])
/** An MBR that only says that there is a GPT. */
const PROTECTIVE = 0xee

interface Entry {
  readonly status: number
  readonly type: number
  /** Sectors. */
  readonly start: number
  readonly count: number
}

/** Undefined when sector 0 is no such table; that of a file system without partitions may end in the same two bytes. */
export async function readMbr(disk: BlockDevice): Promise<PartitionTable | undefined> {
  const primary = await readEntries(disk, 0)
  if (primary === undefined || primary.every(({ type }) => type === 0)) return undefined
  if (primary.some(({ status }) => status !== 0 && status !== 0x80)) return undefined
  const partitions: Partition[] = []
  for (const [index, entry] of primary.entries()) {
    if (entry.type === 0 || entry.type === PROTECTIVE) continue
    partitions.push(partitionOf(disk, index + 1, 0, entry))
    if (EXTENDED.has(entry.type)) partitions.push(...(await readLogical(disk, entry)))
  }
  return { kind: 'mbr', partitions: partitions.sort((a, b) => a.number - b.number) }
}

async function readLogical(disk: BlockDevice, extended: Entry): Promise<Partition[]> {
  const found: Partition[] = []
  let sector = extended.start
  for (let number = 5; number < 5 + LOGICAL_PARTITIONS_MAX; number++) {
    const entries = await readEntries(disk, sector)
    const [logical, next] = entries ?? []
    if (logical === undefined || next === undefined) break
    if (logical.type !== 0) found.push(partitionOf(disk, number, sector, logical))
    // A list that does not go forward would never end.
    if (next.type === 0 || extended.start + next.start <= sector || next.start >= extended.count) break
    sector = extended.start + next.start
  }
  return found
}

function partitionOf(disk: BlockDevice, number: number, from: number, { type, start, count }: Entry): Partition {
  const name = type.toString(16).padStart(2, '0')
  return placed({ number, start: (from + start) * SECTOR, size: count * SECTOR, type: name, label: '' }, disk.size)
}

async function readEntries(disk: BlockDevice, sector: number): Promise<Entry[] | undefined> {
  const bytes = await readBytes(disk, sector * SECTOR, SECTOR)
  if (bytes === undefined || bytes.readUInt16LE(SECTOR - 2) !== 0xaa55) return undefined
  return Array.from({ length: 4 }, (_, index) => {
    const at = ENTRIES_AT + index * ENTRY_BYTES
    return {
      status: bytes.readUInt8(at),
      type: bytes.readUInt8(at + 4),
      start: bytes.readUInt32LE(at + 8),
      count: bytes.readUInt32LE(at + 12),
    }
  })
}
