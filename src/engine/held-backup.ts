// A backup that a disk is restored from, as the engine has it: opened and held in its repository, made a layer, and let go at the end.

import path from 'node:path'
import { BlockError, isBlockError } from '../block/error.ts'
import { chooseDisk } from '../repository/choose-disk.ts'
import type { BackupDiskName, BackupHold, OpenDisk, Repository } from '../repository/repository.ts'
import { Wanted } from '../job/wanted.ts'
import { BackupLayer, type OpenedBackup } from './backup-layer.ts'
import type { RestoringMark } from './catalog.ts'
import type { EngineContext } from './context.ts'

/** A disk of a backup that nobody takes away. */
export interface HeldBackup extends OpenedBackup {
  readonly hold: string
  /** The repository's identity. */
  readonly repositoryId: string
  /** The disk's name in the backup, and its bytes. */
  readonly disk: string
  readonly size: number
  /** The device, for a disk that is much like it: see OpenDisk. */
  readonly besides: OpenDisk['besides']
  /** Visits where the disk may differ from a disk of another backup there. */
  differences(from: BackupDiskName, visit: (offset: number, length: number) => void): Promise<void>
}

/** Opens a disk of a backup, the only one unless named, and holds it, or takes over the hold that an earlier run left. */
export async function openHeld(
  context: EngineContext,
  { repository: location, backup, disk, hold }: Pick<RestoringMark, 'repository' | 'backup'> & HeldDisk,
): Promise<HeldBackup> {
  const repository = await context.openRepository(location)
  let held: BackupHold | undefined
  try {
    held = await (hold === undefined ? repository.hold(backup) : repository.takeOverHold(hold, backup))
    return await readHeld(repository, held, backup, disk)
  } catch (error) {
    if (hold === undefined) await held?.end()
    else held?.abandon()
    await repository.close()
    throw error
  }
}

interface HeldDisk {
  readonly disk?: string | undefined
  readonly hold?: string | undefined
}

async function readHeld(
  repository: Repository,
  held: BackupHold,
  backup: string,
  wanted: string | undefined,
): Promise<HeldBackup> {
  const reader = await repository.openBackup(backup, held)
  const { name, size, device, besides } = chooseDisk(reader, wanted)
  return {
    device,
    hold: held.id,
    repositoryId: repository.id,
    disk: name,
    size,
    besides,
    isReachable: () => repository.isReachable(),
    differences: (from, visit) => repository.differences(from, { backup, disk: name }, visit),
    close: async () => {
      held.abandon()
      await reader.close()
      await repository.close()
    },
  }
}

/** What the image over a backup names as its backing file: no path, so that no program opens the image without the backup. */
export function placeOf({ backup, disk }: Pick<RestoringMark, 'backup' | 'disk'>): string {
  return `varve-backup:${backup}/${disk}`
}

/** The lowest layer of a disk that is being restored; it opens the backup when it is first read, unless that is open already. */
export function backupLayerOf(
  context: EngineContext,
  name: string,
  mark: RestoringMark,
  opened?: HeldBackup,
): BackupLayer {
  return new BackupLayer({
    name,
    place: placeOf(mark),
    size: mark.size,
    opened,
    whenAway: mark.whenAway,
    wanted: new Wanted(context.mergePaces.restore.piece),
    report: context.report,
    open: async () => {
      const held = await openHeld(context, mark)
      if (held.size === mark.size) return held
      await held.close()
      const message = `disk ${mark.disk} of backup ${mark.backup} has ${held.size} bytes, and ${name} began with ${mark.size}`
      throw new BlockError('corrupt', message, { device: name })
    },
  })
}

/** The backup is not needed any more. What cannot be said to its repository now ends with the hold's lease. */
export async function letGoOf(
  context: EngineContext,
  { repository: location, backup, hold }: Pick<RestoringMark, 'repository' | 'backup' | 'hold'>,
): Promise<void> {
  try {
    const repository = await context.openRepository(location)
    try {
      await repository.endHold(hold, backup)
    } finally {
      await repository.close()
    }
  } catch (error) {
    if (!isBlockError(error)) throw error
    context.report(`backup ${backup} in ${path.basename(location)} stays held for a week: ${error.message}`)
  }
}
