// varve image: tools for image files that no daemon serves, with the names and options of qemu-img. One file per command in
// image/; the work is in src/image and is loaded when a command runs.

import type { Command } from 'commander'
import { addBitmapCommand } from './image/bitmap.ts'
import { addCheckCommand } from './image/check.ts'
import { addCommitCommand } from './image/commit.ts'
import { addCompareCommand } from './image/compare.ts'
import { addConvertCommand } from './image/convert.ts'
import { addCreateCommand } from './image/create.ts'
import { addDiffCommand } from './image/diff.ts'
import { addInfoCommand } from './image/info.ts'
import { addMapCommand } from './image/map.ts'
import { addMeasureCommand } from './image/measure.ts'
import { addRebaseCommand } from './image/rebase.ts'
import { addResizeCommand } from './image/resize.ts'
import { addSnapshotCommand } from './image/snapshot.ts'

/** One line per command, in alphabetical order. */
const COMMANDS: readonly ((image: Command) => void)[] = [
  addBitmapCommand,
  addCheckCommand,
  addCommitCommand,
  addCompareCommand,
  addConvertCommand,
  addCreateCommand,
  addDiffCommand,
  addInfoCommand,
  addMapCommand,
  addMeasureCommand,
  addRebaseCommand,
  addResizeCommand,
  addSnapshotCommand,
]

export function addImageCommands(program: Command): void {
  const image = program.command('image').description('tools for image files, offline; named as qemu-img names them')
  for (const add of COMMANDS) add(image)
}
