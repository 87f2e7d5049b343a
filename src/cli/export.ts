// `varve export`: serves a disk of a backup over NBD, at once, without a daemon and without restoring anything. For reading only, or
// with an overlay that takes writes and is thrown away at the end.

import os from 'node:os'
import type { Command } from 'commander'
import { chooseDisk } from '../repository/choose-disk.ts'
import { openRepositoryAt } from '../shard/repositories.ts'
import { parseBackupName } from './backup-name.ts'
import { addListenOptions, type ListenOptions, serveUntilStopped } from './nbd-listen.ts'
import { repoOption, type RepositoryFlags, withKeys } from './repository.ts'
import { openThrowAwayOverlay } from './throw-away-overlay.ts'

interface ExportOptions extends ListenOptions, RepositoryFlags {
  readonly repo: string
  readonly writable?: boolean
  readonly overlayFolder: string
}

export function addExportCommand(program: Command): void {
  addListenOptions(withKeys(program.command('export <backup[:disk]>').addOption(repoOption())))
    .description('serve a disk of a backup over NBD, at once')
    .option('--writable', 'take writes, and forget them at the end')
    .option('--overlay-folder <folder>', 'where what is written is kept meanwhile', os.tmpdir())
    .action(serveBackup)
}

async function serveBackup(named: string, options: ExportOptions): Promise<void> {
  const { backup, disk: wanted } = parseBackupName(named)
  await serveUntilStopped(options, async (atEnd) => {
    const repository = await openRepositoryAt(options.repo, options)
    atEnd(() => repository.close())
    const reader = await repository.openBackup(backup)
    atEnd(() => reader.close())
    const { name, device } = chooseDisk(reader, wanted)
    const description = `disk ${name} of backup ${backup}`
    if (options.writable !== true) return { description, device, readOnly: true }
    const overlay = await openThrowAwayOverlay(device, options.overlayFolder)
    atEnd(() => overlay.close())
    return { description, device: overlay }
  })
}
