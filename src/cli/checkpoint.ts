// varve checkpoint: the moments of backups that were given names, list and remove. They are made by `varve backup --checkpoint`.

import type { Command } from 'commander'
import { formatSize } from '../base/size.ts'
import { checkpointBitmap, checkpointOf } from '../engine/checkpoints.ts'
import { print, table } from './context.ts'
import { cliOf } from './daemon-context.ts'

export function addCheckpointCommands(program: Command): void {
  const checkpoint = program.command('checkpoint').description('named moments of backups, to count changes from')
  checkpoint.command('list <disk>').description('the checkpoints of a disk, and what changed since each').action(list)
  checkpoint
    .command('remove <disk> <name>')
    .description('count no longer from this moment; its backup stays')
    .action(remove)
}

async function list(disk: string, _options: unknown, command: Command): Promise<void> {
  const cli = cliOf(command)
  const { bitmaps } = await cli.api.call('showDisk', { disk }, {})
  const found = bitmaps.flatMap(({ name, since, dirtyBytes, state }) => {
    const checkpoint = checkpointOf(name)
    return checkpoint === undefined || since === undefined
      ? []
      : [{ name: checkpoint, backup: since, changedBytes: dirtyBytes, state }]
  })
  print(cli, found, () =>
    table(
      ['NAME', 'BACKUP', 'CHANGED SINCE'],
      found.map(({ name, backup, changedBytes, state }) => [
        name,
        backup,
        state === 'void' ? 'not known' : formatSize(changedBytes),
      ]),
    ),
  )
}

async function remove(disk: string, name: string, _options: unknown, command: Command): Promise<void> {
  const cli = cliOf(command)
  await cli.api.call('editBitmaps', { disk }, { edits: [{ edit: 'remove', name: checkpointBitmap(name) }] })
  print(cli, {}, () => `checkpoint ${name} removed; its backup stays`)
}
