// varve serve: the daemon, in the foreground, until a signal ends it.

import type { Command } from 'commander'
import { BlockError } from '../block/error.ts'
import type { NbdOptions } from '../daemon/daemon.ts'
import { NBD_DEFAULT_PORT } from '../nbd/spec.ts'
import { metadataCacheOption, portArgument, sizeArgument } from './context.ts'
import { cliOf } from './daemon-context.ts'
import { addTlsOptions, type TlsOptions, tlsOptionsOf } from './tls-options.ts'
import { VERSION } from './version.ts'

interface ServeOptions extends TlsOptions {
  readonly shards?: number
  readonly scratch?: number
  readonly scratchHost?: number
  readonly metadataCache?: number
  readonly nbdPort?: number
  readonly nbdAddress?: string
}

export function addServeCommand(program: Command): void {
  addTlsOptions(program.command('serve'))
    .description('the daemon: serves the disks, runs the jobs, answers the other commands')
    .option('--shards <number>', 'at most so many threads for disks; one for each processor unless told', countArgument)
    .option('--scratch <size>', 'copy space of one backup', sizeArgument)
    .option('--scratch-host <size>', 'copy space of all backups together', sizeArgument)
    .addOption(metadataCacheOption())
    .option(
      '--nbd-port <number>',
      'serve all disks on this TCP port too, of loopback unless --nbd-address says so',
      portArgument,
    )
    .option('--nbd-address <address>', 'serve all disks on this address; beyond loopback only with TLS')
    .action(async (options: ServeOptions, command: Command) => {
      const cli = cliOf(command)
      // Loaded here alone: the other commands start in half the time without it.
      const { startDaemon } = await import('../daemon/daemon.ts')
      const daemon = await startDaemon({
        home: cli.home,
        version: VERSION,
        ...nbdOf(options),
        ...(options.shards === undefined ? {} : { shards: options.shards }),
        ...(options.scratch === undefined ? {} : { scratchBytes: options.scratch }),
        ...(options.scratchHost === undefined ? {} : { scratchHostBytes: options.scratchHost }),
        ...(options.metadataCache === undefined ? {} : { metadataCacheBytes: options.metadataCache }),
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

/** Where to serve on TCP; nothing unless one of its options is there. */
function nbdOf(options: ServeOptions): { nbd?: NbdOptions } {
  const tls = tlsOptionsOf(options)
  const { nbdPort, nbdAddress } = options
  if (nbdPort === undefined && nbdAddress === undefined) {
    if (tls === undefined && options.insecure !== true) return {}
    throw new BlockError('invalid-argument', 'the options of TLS are for TCP: give --nbd-port or --nbd-address too')
  }
  return {
    nbd: {
      address: nbdAddress ?? '127.0.0.1',
      port: nbdPort ?? NBD_DEFAULT_PORT,
      insecure: options.insecure === true,
      ...(tls === undefined ? {} : { tls }),
    },
  }
}

/** A number of threads. Kind 'invalid-argument' when it is none. */
function countArgument(text: string): number {
  const count = /^\d{1,3}$/.test(text) ? Number(text) : 0
  if (count > 0) return count
  throw new BlockError('invalid-argument', `${JSON.stringify(text)} is no number of threads: write 1 or more`)
}
