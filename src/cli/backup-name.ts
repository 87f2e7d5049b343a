// How a user names a disk of a backup: BACKUP, BACKUP:DISK when the backup has several, or with the name of the disk as an option.

import { BlockError } from '../block/error.ts'

/** What follows the backup's id, apart by colons. Ids, disks and partitions have none in their names. */
export interface BackupName {
  readonly backup: string
  readonly disk: string | undefined
  /** The number of a partition, where the command takes one. */
  readonly partition: number | undefined
}

/** Kind 'invalid-argument' for what is no such name. */
export function parseBackupName(text: string, takesPartition = false): BackupName {
  const [backup = '', disk, partition, ...more] = text.split(':')
  const isNumber = partition === undefined || /^[1-9]\d{0,3}$/.test(partition)
  if (backup === '' || disk === '' || more.length > 0 || !isNumber || (partition !== undefined && !takesPartition)) {
    const form = takesPartition ? 'BACKUP[:DISK[:PARTITION]], with the number of a partition' : 'BACKUP[:DISK]'
    throw new BlockError('invalid-argument', `${JSON.stringify(text)} names no disk of a backup: write ${form}`)
  }
  return { backup, disk, partition: partition === undefined ? undefined : Number(partition) }
}
