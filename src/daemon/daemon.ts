// The daemon: one process that owns a home. Wires the real host, the catalog, NBD and the API to an engine, and ends
// cleanly on a signal.

import fs from 'node:fs'
import path from 'node:path'
import { type Logger, pino } from 'pino'
import { makeServer } from '../api/server.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import { Engine } from '../engine/engine.ts'
import { homeAt } from '../engine/home.ts'
import type { ServeDisk } from '../engine/context.ts'
import { SqliteCatalog } from '../engine/sqlite-catalog.ts'
import { realHost } from '../host/real.ts'
import { NbdServer } from '../nbd/server.ts'
import { checkSocketPath, formatNbdUri } from '../nbd/uri.ts'
import { openRepositoryAt } from './repositories.ts'

export interface DaemonOptions {
  readonly home: string
  readonly version: string
  /** Copy space of one backup and of all together, in bytes. */
  readonly scratchBytes?: number
  readonly scratchHostBytes?: number
}

export interface Daemon {
  readonly apiSocket: string
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
  const { version, home: folder, ...budgets } = options
  let engine: Engine
  try {
    engine = await Engine.open({
      ...budgets,
      host: realHost,
      home,
      openCatalog: () => new SqliteCatalog(home.catalog),
      serve: serveOverNbd,
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
  try {
    // The lock on the home says that a socket file found here was left by a dead daemon.
    fs.rmSync(home.apiSocket, { force: true })
    await server.listen({ path: home.apiSocket })
    fs.chmodSync(home.apiSocket, 0o600)
  } catch (error) {
    await engine.close()
    throw toBlockError(error, `${home.apiSocket}: listen`, { path: home.apiSocket })
  }
  log.info({ version, home: home.folder, api: home.apiSocket, disks: engine.listDisks().length }, 'varve serves')
  return {
    apiSocket: home.apiSocket,
    close: async () => {
      await server.close()
      await engine.close()
      fs.rmSync(home.apiSocket, { force: true })
      log.info('varve ended cleanly')
    },
  }
}

/** Each disk has a Unix socket of its own, whose one export has the disk's name. */
const serveOverNbd: ServeDisk = async (disk, socket) => {
  const served = { name: disk.name, device: disk }
  const server = new NbdServer({
    find: (name) => (name === disk.name || name === '' ? served : undefined),
    list: () => [served],
  })
  await server.listenUnix(socket, { mode: 0o660 })
  return {
    uri: formatNbdUri({ transport: 'unix', path: socket, name: disk.name }),
    close: () => server.close(),
  }
}
