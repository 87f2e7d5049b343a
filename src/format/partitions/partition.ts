// What a partition is, and what both kinds of table need to read one: bytes of a disk that may be shorter than it says, and a place that is checked.

import type { BlockDevice } from '../../block/device.ts'

export interface Partition {
  /** As Linux numbers them: logical ones from 5. */
  readonly number: number
  /** Bytes. */
  readonly start: number
  readonly size: number
  /** What the table calls its content: a GUID, or two hexadecimal digits. */
  readonly type: string
  /** Of GPT; '' where there is none. */
  readonly label: string
  /** Why it cannot be opened. */
  readonly problem?: string
}

export interface PartitionTable {
  readonly kind: 'gpt' | 'mbr'
  readonly partitions: readonly Partition[]
}

/** A partition, with what is wrong with its place on a disk of so many bytes. */
export function placed(partition: Omit<Partition, 'problem'>, diskSize: number): Partition {
  const { start, size } = partition
  if (!Number.isSafeInteger(start) || !Number.isSafeInteger(size) || size <= 0)
    return { ...partition, problem: 'has no possible place' }
  if (start + size <= diskSize) return partition
  return { ...partition, problem: `does not lie on the disk: it would end at ${start + size} of ${diskSize} bytes` }
}

/** So many bytes from an offset; undefined when the disk ends before. */
export async function readBytes(disk: BlockDevice, offset: number, length: number): Promise<Buffer | undefined> {
  if (!Number.isSafeInteger(offset) || offset < 0 || offset + length > disk.size) return undefined
  const bytes = Buffer.alloc(length)
  const pending = disk.read(offset, length, bytes, 0)
  if (pending !== undefined) await pending
  return bytes
}
