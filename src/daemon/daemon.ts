// The daemon: one process that owns a home. Wires the real host, the catalog, NBD and the API to an engine, and ends
// cleanly on a signal.

import fs from 'node:fs'
import path from 'node:path'
import { type Logger, pino } from 'pino'
import { makeServer } from '../api/server.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import { Engine } from '../engine/engine.ts'
import { homeAt } from '../engine/home.ts'
import { SqliteCatalog } from '../engine/sqlite-catalog.ts'
import { metadataCache } from '../format/qcow2/metadata-cache.ts'
import { realHost } from '../host/real.ts'
import { loadServerTls, type ServerTlsOptions } from '../nbd/tls.ts'
import { checkSocketPath } from '../nbd/uri.ts'
import { DiskExports } from './disk-exports.ts'
import { openRepositoryAt } from './repositories.ts'

export interface DaemonOptions {
  readonly home: string
  readonly version: string
  /** Copy space of one backup and of all together, in bytes. */
  readonly scratchBytes?: number
  readonly scratchHostBytes?: number
  /** Memory for the maps of all open qcow2 images, in bytes. */
  readonly metadataCacheBytes?: number
  /** Serve all disks on TCP too. */
  readonly nbd?: NbdOptions
}

export interface NbdOptions {
  readonly address: string
  readonly port: number
  readonly tls?: ServerTlsOptions
  readonly insecure?: boolean
}

export interface Daemon {
  readonly apiSocket: string
  /** Where all disks are served on TCP, if anywhere. */
  readonly nbdPort: number | undefined
  /** Resolves when the daemon has ended. */
  close(): Promise<void>
}

/** Starts a daemon. Kind 'busy' when another one has the home. */
export async function startDaemon(options: DaemonOptions, log: Logger = pino(pino.destination(2))): Promise<Daemon> {
  const home = homeAt(options.home)
  checkSocketPath(home.apiSocket)
  for (const folder of [home.folder, path.dirname(home.lock), path.dirname(home.nbdSocket('x'))]) {
    await realHost.makeFolder(folder)
  }
  const { version, home: folder, nbd, metadataCacheBytes, ...budgets } = options
  if (metadataCacheBytes !== undefined) metadataCache.budget = metadataCacheBytes
  // Before anything is opened: credentials that cannot be used stop the start and change nothing.
  const tls = nbd?.tls === undefined ? undefined : await loadServerTls(nbd.tls)
  const exports = new DiskExports()
  let engine: Engine
  try {
    engine = await Engine.open({
      ...budgets,
      host: realHost,
      home,
      openCatalog: () => new SqliteCatalog(home.catalog),
      serve: exports.serve,
      openRepository: openRepositoryAt,
      report: (message, details) => log.warn(details ?? {}, message),
    })
  } catch (error) {
    if (error instanceof BlockError && error.kind === 'busy' && error.place.path === home.lock) {
      const message = `another varve serve has the home ${home.folder}: stop it, or name another with --home`
      throw new BlockError('busy', message, { path: home.folder }, error)
    }
    throw error
  }
  const server = await makeServer({ engine, version, home: folder })
  let nbdPort: number | undefined
  try {
    if (nbd !== undefined) {
      const { address, port, insecure = false } = nbd
      nbdPort = await exports.listen({ address, port, insecure, ...(tls === undefined ? {} : { tls }) })
    }
    // The lock on the home says that a socket file found here was left by a dead daemon.
    fs.rmSync(home.apiSocket, { force: true })
    await server.listen({ path: home.apiSocket })
    fs.chmodSync(home.apiSocket, 0o600)
  } catch (error) {
    await exports.close()
    await engine.close()
    throw toBlockError(error, `${home.apiSocket}: listen`, { path: home.apiSocket })
  }
  const disks = engine.listDisks().length
  log.info(
    { version, home: home.folder, api: home.apiSocket, ...(nbdPort === undefined ? {} : { nbdPort }), disks },
    'varve serves',
  )
  return {
    apiSocket: home.apiSocket,
    nbdPort,
    close: async () => {
      await server.close()
      await exports.close()
      await engine.close()
      fs.rmSync(home.apiSocket, { force: true })
      log.info('varve ended cleanly')
    },
  }
}
