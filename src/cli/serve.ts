// varve serve: the daemon, in the foreground, until a signal ends it.

import type { Command } from 'commander'
import { API_DEFAULT_PORT } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import type { ApiOptions, NbdOptions } from '../daemon/daemon.ts'
import { NBD_DEFAULT_PORT } from '../nbd/spec.ts'
import { metadataCacheOption, portArgument, sizeArgument } from './context.ts'
import { cliOf } from './daemon-context.ts'
import { addTlsOptions, type TlsOptions, tlsOptionsOf } from './tls-options.ts'
import { VERSION } from './version.ts'

interface ServeOptions extends TlsOptions {
  readonly shards?: number
  readonly scratch?: number
  readonly scratchHost?: number
  readonly scratchMemory?: number
  readonly metadataCache?: number
  readonly nbdPort?: number
  readonly nbdAddress?: string
  readonly apiPort?: number
  readonly apiAddress?: string
}

export function addServeCommand(program: Command): void {
  addTlsOptions(program.command('serve'))
    .description('the daemon: serves the disks, runs the jobs, answers the other commands')
    .option('--shards <number>', 'at most so many threads for disks; one for each processor unless told', countArgument)
    .option('--scratch <size>', 'copy space of one backup', sizeArgument)
    .option('--scratch-host <size>', 'copy space of all backups together', sizeArgument)
    .option('--scratch-memory <size>', 'how much of that is memory at most, before it goes to files', sizeArgument)
    .addOption(metadataCacheOption())
    .option(
      '--nbd-port <number>',
      'serve all disks on this TCP port too, of loopback unless --nbd-address says so',
      portArgument,
    )
    .option('--nbd-address <address>', 'serve all disks on this address; beyond loopback only with TLS')
    .option(
      '--api-port <number>',
      'answer the API on this TCP port too, by TLS and with the token in api.token of the home: for migrations from other hosts',
      portArgument,
    )
    .option('--api-address <address>', 'on this address; loopback unless told')
    .action(async (options: ServeOptions, command: Command) => {
      const cli = cliOf(command)
      // Loaded here alone: the other commands start in half the time without it.
      const { startDaemon } = await import('../daemon/daemon.ts')
      const daemon = await startDaemon({
        home: cli.home,
        version: VERSION,
        ...nbdOf(options),
        ...apiOf(options),
        ...(options.shards === undefined ? {} : { shards: options.shards }),
        ...(options.scratch === undefined ? {} : { scratchBytes: options.scratch }),
        ...(options.scratchHost === undefined ? {} : { scratchHostBytes: options.scratchHost }),
        ...(options.scratchMemory === undefined ? {} : { scratchMemoryBytes: options.scratchMemory }),
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
    const isForApi = options.apiPort !== undefined || options.apiAddress !== undefined
    if (options.insecure !== true && (tls === undefined || isForApi)) return {}
    const message = 'the options of TLS are for TCP: give --nbd-port, --nbd-address, --api-port or --api-address too'
    throw new BlockError('invalid-argument', message)
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

/** Where to answer the API on TCP; nothing unless one of its options is there. Kind 'permission' without TLS. */
function apiOf(options: ServeOptions): { api?: ApiOptions } {
  const { apiPort, apiAddress } = options
  if (apiPort === undefined && apiAddress === undefined) return {}
  const tls = tlsOptionsOf(options)
  if (tls === undefined)
    throw new BlockError('permission', 'the API on TCP needs TLS: give --tls-certificates or --tls-psk')
  return { api: { address: apiAddress ?? '127.0.0.1', port: apiPort ?? API_DEFAULT_PORT, tls } }
}

/** A number of threads. Kind 'invalid-argument' when it is none. */
function countArgument(text: string): number {
  const count = /^\d{1,3}$/.test(text) ? Number(text) : 0
  if (count > 0) return count
  throw new BlockError('invalid-argument', `${JSON.stringify(text)} is no number of threads: write 1 or more`)
}
