// The command line: one file per group of commands. Exit statuses are in context.ts.

import { Command, CommanderError, Option } from 'commander'
import { FORMATS, type Format } from '../chain/open.ts'
import { addBackupCommands } from './backup.ts'
import { type GlobalOptions, portArgument, reportError } from './context.ts'
import { addDiskCommands } from './disk.ts'
import { addImageCommands } from './image.ts'
import { addJobCommands } from './job.ts'
import { addServeCommand } from './serve.ts'
import { addSnapshotCommands } from './snapshot.ts'
import { VERSION } from './version.ts'

const program = new Command('varve')
  .description('Live snapshots, live merge and live backup for virtual-machine disks')
  .version(VERSION)
  .option('--json', 'print results as JSON')
  .option('--home <folder>', 'where the daemon keeps its state (or VARVE_HOME)')
  .exitOverride()
  .configureHelp({ showGlobalOptions: true })
  .configureOutput({
    // One line, as every other error: commander puts its suggestion on a second.
    outputError: (text, write) =>
      write(
        `${text
          .trim()
          .replace(/^error: /, 'varve: ')
          .replaceAll('\n', ' ')}\n`,
      ),
  })

addServeCommand(program)
program
  .command('nbd <image>')
  .description('serve one image over NBD, without a daemon')
  .addOption(new Option('-f, --format <format>', 'format of the image').choices(FORMATS).makeOptionMandatory())
  .option('--socket <path>', 'listen on a Unix socket')
  .option('--port <number>', 'listen on this port of the loopback address', portArgument)
  .option('--read-only', 'refuse writes')
  .option('--export-name <name>', 'name of the export', '')
  .action(async (image: string, options: NbdOptions) => {
    const { serveImage } = await import('./nbd.ts')
    await serveImage({ image, ...options })
  })
addDiskCommands(program)
addSnapshotCommands(program)
addBackupCommands(program)
addJobCommands(program)
addImageCommands(program)
program
  .command('demo')
  .description('the main job on a real image, from snapshot to proved restore')
  .option('--keep <folder>', 'leave all files in this folder')
  .action(async (options: { keep?: string }, command: Command) => {
    const { runDemo } = await import('./demo/demo.ts')
    const { json } = command.optsWithGlobals<GlobalOptions>()
    process.exitCode = await runDemo({ ...options, json: json === true })
  })

interface NbdOptions {
  readonly format: Format
  readonly socket?: string
  readonly port?: number
  readonly readOnly?: boolean
  readonly exportName: string
}

for (const command of [...program.commands, ...program.commands.flatMap((group) => group.commands)])
  command.exitOverride()

try {
  await program.parseAsync()
} catch (error) {
  // Commander has printed its usage error; 0 is for --help and --version.
  if (error instanceof CommanderError) process.exitCode = error.exitCode === 0 ? 0 : 2
  else process.exitCode = reportError(error, program.opts<GlobalOptions>().json === true)
}
