// Which disk of a backup is meant.

import { BlockError } from '../block/error.ts'
import type { BackupReader } from './repository.ts'

export type BackedUpDisk = BackupReader['disks'][number]

/** The disk of that name, or the only one. Kinds 'not-found', and 'invalid-argument' when there are several to choose from. */
export function chooseDisk(reader: BackupReader, wanted: string | undefined): BackedUpDisk {
  const names = reader.disks.map((disk) => disk.name)
  const name = wanted ?? (names.length === 1 ? names[0] : undefined)
  const { id } = reader.info
  if (name === undefined) {
    throw new BlockError('invalid-argument', `${id} has the disks ${names.join(', ')}: name one, as ${id}:${names[0]}`)
  }
  const disk = reader.disks.find((other) => other.name === name)
  if (disk !== undefined) return disk
  throw new BlockError('not-found', `${id} has no disk ${name}; it has ${names.join(', ')}`)
}
