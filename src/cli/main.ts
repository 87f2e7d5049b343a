// The command line: one file per group of commands. Exit statuses are in context.ts.

import { Command, CommanderError } from 'commander'
import { sizePool } from '../host/pool-lanes.ts'
import { type GlobalOptions, reportError } from './context.ts'
import { VERSION } from './version.ts'

type AddCommands = (program: Command) => void
type Load = () => Promise<AddCommands>

const loadSnapshot: Load = async () => (await import('./snapshot.ts')).addSnapshotCommands
const loadMerge: Load = async () => (await import('./merge.ts')).addMergeCommands
const loadBackup: Load = async () => (await import('./backup.ts')).addBackupCommands

/** Where each command is, by the first word, in the order of the help. */
const GROUPS: Readonly<Record<string, Load>> = {
  serve: async () => (await import('./serve.ts')).addServeCommand,
  nbd: async () => (await import('./nbd.ts')).addNbdCommand,
  disk: async () => (await import('./disk.ts')).addDiskCommands,
  machine: async () => (await import('./machine.ts')).addMachineCommands,
  vm: async () => (await import('./vm.ts')).addVmCommands,
  snapshot: loadSnapshot,
  clone: loadSnapshot,
  bitmap: async () => (await import('./bitmap.ts')).addBitmapCommands,
  checkpoint: async () => (await import('./checkpoint.ts')).addCheckpointCommands,
  commit: loadMerge,
  stream: loadMerge,
  mirror: async () => (await import('./mirror.ts')).addMirrorCommand,
  migrate: async () => (await import('./migrate.ts')).addMigrateCommand,
  host: async () => (await import('./host.ts')).addHostCommands,
  repo: async () => (await import('./repo.ts')).addRepoCommands,
  view: async () => (await import('./view.ts')).addViewCommands,
  backup: loadBackup,
  backups: loadBackup,
  verify: loadBackup,
  restore: async () => (await import('./restore.ts')).addRestoreCommand,
  export: async () => (await import('./export.ts')).addExportCommand,
  files: async () => (await import('./files.ts')).addFilesCommand,
  job: async () => (await import('./job.ts')).addJobCommands,
  image: async () => (await import('./image.ts')).addImageCommands,
  demo: async () => (await import('./demo/command.ts')).addDemoCommand,
}

// The daemon sizes it again, for its threads of disks.
sizePool(1)

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

// Only the group that was asked for is loaded, so that a tool which needs no daemon starts at once; all of them for help.
const wanted = GROUPS[commandWord(process.argv.slice(2))]
for (const load of wanted === undefined ? new Set(Object.values(GROUPS)) : [wanted]) (await load())(program)

overrideExit(program.commands)

try {
  await program.parseAsync()
} catch (error) {
  // Commander has printed its usage error; 0 is for --help and --version.
  if (error instanceof CommanderError) process.exitCode = error.exitCode === 0 ? 0 : 2
  else process.exitCode = reportError(error, program.opts<GlobalOptions>().json === true)
}

/** The first word that is neither a global option nor the value of one; '' when there is none. */
function commandWord(args: readonly string[]): string {
  const at = args.findIndex((arg, i) => !arg.startsWith('-') && args[i - 1] !== '--home')
  return args[at] ?? ''
}

/** Of all commands and those below them: none ends the process by itself. */
function overrideExit(commands: readonly Command[]): void {
  for (const command of commands) overrideExit(command.exitOverride().commands)
}
