// varve serve: the daemon, in the foreground, until a signal ends it.

import type { Command } from 'commander'
import { sizeArgument } from './context.ts'
import { cliOf } from './daemon-context.ts'
import { VERSION } from './version.ts'

export function addServeCommand(program: Command): void {
  program
    .command('serve')
    .description('the daemon: serves the disks, runs the jobs, answers the other commands')
    .option('--scratch <size>', 'copy space of one backup', sizeArgument)
    .option('--scratch-host <size>', 'copy space of all backups together', sizeArgument)
    .action(async (options: { scratch?: number; scratchHost?: number }, command: Command) => {
      const cli = cliOf(command)
      // Loaded here alone: the other commands start in half the time without it.
      const { startDaemon } = await import('../daemon/daemon.ts')
      const daemon = await startDaemon({
        home: cli.home,
        version: VERSION,
        ...(options.scratch === undefined ? {} : { scratchBytes: options.scratch }),
        ...(options.scratchHost === undefined ? {} : { scratchHostBytes: options.scratchHost }),
      })
      let ending = false
      const end = (): void => {
        // A second signal ends the process at once; the next start recovers.
        if (ending) process.exit(1)
        ending = true
        daemon.close().then(
          () => process.exit(0),
          (error: unknown) => {
            process.stderr.write(`varve: ${error instanceof Error ? (error.stack ?? '') : String(error)}\n`)
            process.exit(1)
          },
        )
      }
      process.on('SIGINT', end)
      process.on('SIGTERM', end)
    })
}
