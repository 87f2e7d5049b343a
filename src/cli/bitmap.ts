// varve bitmap: which granules of a disk changed since a moment; add, list, remove, clear, enable, disable, rename, merge,
// compare, save.

import { type Command } from 'commander'
import type { BitmapEditBody, DiskReply } from '../api/schema.ts'
import { formatSize } from '../base/size.ts'
import type { Durability } from '../dirtylog/dirty-log.ts'
import { durabilityOption, print, sizeArgument, table } from './context.ts'
import { cliOf } from './daemon-context.ts'

/** The commands that need nothing but the bitmap's name, and what is said when they are done. */
const SIMPLE = {
  remove: { about: 'forget a bitmap', done: 'removed' },
  clear: { about: 'begin anew: nothing has changed since now', done: 'cleared' },
  enable: { about: 'record what is written from now on', done: 'records' },
  disable: { about: 'record no more; what it holds stays', done: 'records no more' },
} as const

const OUTLIVES = { host: 'power loss', process: 'kill', none: 'clean stop' } as const

export function addBitmapCommands(program: Command): void {
  const bitmap = program.command('bitmap').description('which parts of a disk changed since a moment')
  bitmap
    .command('add <disk> <name>')
    .description('a new bitmap, which records from now on; a client of NBD sees it as qemu:dirty-bitmap:NAME')
    .option('-g, --granule <size>', 'how much of the disk a bit stands for; 4K unless told', sizeArgument)
    .option('--from <bitmap>', 'begin as a copy of this one')
    .option('--disabled', 'do not record')
    .addOption(durabilityOption('what it outlives; as the disk’s own bitmaps unless told'))
    .action(add)
  bitmap
    .command('list <disk>')
    .description('the bitmaps of a disk; those with a colon in their names are Varve’s own')
    .action(async (disk: string, _options: unknown, command: Command) => {
      const cli = cliOf(command)
      const { bitmaps } = await cli.api.call('showDisk', { disk }, {})
      print(cli, bitmaps, () => table(['NAME', 'GRANULE', 'DIRTY', 'STATE', 'OUTLIVES'], bitmaps.map(row)))
    })
  for (const edit of Object.keys(SIMPLE) as (keyof typeof SIMPLE)[])
    bitmap
      .command(`${edit} <disk> <name>`)
      .description(SIMPLE[edit].about)
      .action((disk: string, name: string, _options: unknown, command: Command) =>
        change(command, disk, { edit, name }, `bitmap ${name} ${SIMPLE[edit].done}`),
      )
  bitmap
    .command('rename <disk> <name> <to>')
    .description('give a bitmap another name')
    .action((disk: string, name: string, to: string, _options: unknown, command: Command) =>
      change(command, disk, { edit: 'rename', name, to }, `bitmap ${name} is now ${to}`),
    )
  bitmap
    .command('merge <disk> <name> <into>')
    .description('set in the second bitmap what the first has set')
    .action((disk: string, name: string, into: string, _options: unknown, command: Command) =>
      change(command, disk, { edit: 'merge', name, into }, `bitmap ${into} has what ${name} has`),
    )
  bitmap
    .command('compare <disk> <first> <second>')
    .description('how two bitmaps differ; exits with 1 when they do')
    .action(compare)
  bitmap
    .command('save <disk> [name]')
    .description(
      'write bitmaps into the qcow2 image now, as a clean close does; others may use them once the disk is closed',
    )
    .action(save)
}

async function save(disk: string, name: string | undefined, _options: unknown, command: Command): Promise<void> {
  const cli = cliOf(command)
  const body = name === undefined ? {} : { bitmap: name }
  const { bitmaps, layers } = await cli.api.call('saveBitmaps', { disk }, body)
  print(cli, bitmaps, () => `saved in ${layers.at(-1)?.path}; marked in use until disk ${disk} is closed cleanly`)
}

interface AddOptions {
  readonly granule?: number
  readonly from?: string
  readonly disabled?: boolean
  readonly durability?: Durability
}

function add(disk: string, name: string, options: AddOptions, command: Command): Promise<void> {
  return change(command, disk, { edit: 'add', name, ...options }, `bitmap ${name} added`)
}

async function change(command: Command, disk: string, edit: BitmapEditBody, done: string): Promise<void> {
  const cli = cliOf(command)
  const { bitmaps } = await cli.api.call('editBitmaps', { disk }, { edits: [edit] })
  print(cli, bitmaps, () => done)
}

async function compare(
  disk: string,
  first: string,
  second: string,
  _options: unknown,
  command: Command,
): Promise<void> {
  const cli = cliOf(command)
  const found = await cli.api.call('compareBitmaps', { disk, first, second }, {})
  if (found.onlyFirst + found.onlySecond > 0) process.exitCode = 1
  print(cli, found, ({ both, onlyFirst, onlySecond }) =>
    table(
      ['IN', 'DIRTY'],
      [
        ['both', formatSize(both)],
        [`${first} only`, formatSize(onlyFirst)],
        [`${second} only`, formatSize(onlySecond)],
      ],
    ),
  )
}

function row(bitmap: DiskReply['bitmaps'][number]): string[] {
  const { name, granule, dirtyBytes, state, recording, durability, distrust } = bitmap
  const known = recording ? 'recording' : 'disabled'
  const is = state === 'void' ? 'void: all counts as changed' : distrust === undefined ? known : 'not trusted'
  return [name, formatSize(granule), formatSize(dirtyBytes), is, OUTLIVES[durability]]
}
