// The partitions of a disk, by its GPT or MBR. Everything that the disk says is checked before it is used: a partition that does not lie
// on the disk is listed with what is wrong with it. It writes nothing and knows no file system.
//
//   MBR    sector 0: 4 entries of 16 bytes from byte 446, and 0x55 0xAA at its end; an extended partition holds a list of logical ones
//   GPT    sector 1, and a copy in the last one: a header with the place and the checksum of an array of entries

import type { BlockDevice } from '../../block/device.ts'
import { readGpt } from './gpt.ts'
import { readMbr } from './mbr.ts'
import type { PartitionTable } from './partition.ts'

/** Undefined for a disk without a table: it may be one file system as a whole. Kind 'corrupt' for a GPT of which no copy is right. */
export async function readPartitions(disk: BlockDevice): Promise<PartitionTable | undefined> {
  return (await readGpt(disk)) ?? (await readMbr(disk))
}
