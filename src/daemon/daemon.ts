// The daemon: one process that owns a home. Wires the real host, the catalog, NBD and the API to an engine, and ends
// cleanly on a signal.

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { type Logger, pino } from 'pino'
import { Door } from '../api/door.ts'
import { ApiPeers } from '../api/peers.ts'
import { makeServer } from '../api/server.ts'
import type { FindSocket } from '../api/tunnel.ts'
import { BlockError, toBlockError } from '../block/error.ts'
import { type Home, homeAt } from '../engine/home.ts'
import { SqliteCatalog } from '../engine/sqlite-catalog.ts'
import { sizePool } from '../host/pool-lanes.ts'
import { realHost } from '../host/real.ts'
import { NbdServer } from '../nbd/server.ts'
import { loadServerTls, type ServerTlsOptions } from '../nbd/tls.ts'
import { checkSocketPath } from '../nbd/uri.ts'
import { Shards } from '../shard/shards.ts'

export interface DaemonOptions {
  readonly home: string
  readonly version: string
  /** Copy space of one backup and of all together, and how much of that is memory at most, in bytes. */
  readonly scratchBytes?: number
  readonly scratchHostBytes?: number
  readonly scratchMemoryBytes?: number
  /** Memory for the maps of all open qcow2 images, in bytes. */
  readonly metadataCacheBytes?: number
  /** At most so many threads for disks. */
  readonly shards?: number
  /** Serve all disks on TCP too. */
  readonly nbd?: NbdOptions
  /** Answer the API on TCP too, always with TLS, to whoever has the token of the home. */
  readonly api?: ApiOptions
}

export interface ApiOptions {
  readonly address: string
  readonly port: number
  readonly tls: ServerTlsOptions
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
  /** Where the API is answered on TCP, if anywhere. */
  readonly apiPort: number | undefined
  /** Resolves when the daemon has ended. */
  close(): Promise<void>
}

/** Starts a daemon. Kind 'busy' when another one has the home. */
export async function startDaemon(options: DaemonOptions, log: Logger = pino(pino.destination(2))): Promise<Daemon> {
  const { version, home: folder, nbd, api, shards = os.availableParallelism(), ...budgets } = options
  sizePool(shards)
  const home = homeAt(folder)
  checkSocketPath(home.apiSocket)
  for (const folder of [
    home.folder,
    path.dirname(home.lock),
    path.dirname(home.nbdSocket('x')),
    path.dirname(home.viewSocket('x')),
    path.dirname(home.incomingSocket('x')),
    path.dirname(home.qemuSocket('x')),
    path.dirname(home.outgoingSocket('x')),
  ]) {
    await realHost.makeFolder(folder)
  }
  // Before anything is opened: credentials that cannot be used stop the start and change nothing.
  const tls = nbd?.tls === undefined ? undefined : await loadServerTls(nbd.tls)
  const apiTls = api === undefined ? undefined : await loadServerTls(api.tls)
  const peers = new ApiPeers((token) => home.outgoingSocket(token))
  const engine = await openEngine(home, { shards, peers, ...budgets }, log)
  const door = new Door()
  const findSocket: FindSocket = async (to, isDistant) =>
    to.kind === 'incoming' ? engine.incomingSocket(to.token, isDistant) : engine.viewSocket(to.view, to.disk)
  const server = await makeServer({ engine, version, home: folder, door, findSocket })
  const gate = makeGate(engine, home)
  let nbdPort: number | undefined
  let apiPort: number | undefined
  try {
    if (nbd !== undefined) {
      const { address, port, insecure = false } = nbd
      nbdPort = await gate.listenTcp(address, port, { insecure, ...(tls === undefined ? {} : { tls }) })
    }
    // The lock on the home says that a socket file found here was left by a dead daemon.
    fs.rmSync(home.apiSocket, { force: true })
    await server.listen({ path: home.apiSocket })
    fs.chmodSync(home.apiSocket, 0o600)
    if (api !== undefined && apiTls !== undefined)
      apiPort = await door.listen(server.server, { ...api, tls: apiTls, tokenFile: home.tokenFile })
  } catch (error) {
    await server.close()
    await gate.close()
    peers.close()
    await engine.close()
    throw toBlockError(error, `${home.apiSocket}: listen`, { path: home.apiSocket })
  }
  const disks = (await engine.listDisks()).length
  const ports = { ...(nbdPort === undefined ? {} : { nbdPort }), ...(apiPort === undefined ? {} : { apiPort }) }
  log.info({ version, home: home.folder, api: home.apiSocket, ...ports, disks }, 'varve serves')
  return {
    apiSocket: home.apiSocket,
    nbdPort,
    apiPort,
    close: async () => {
      door.close()
      await server.close()
      await gate.close()
      await engine.close()
      peers.close()
      fs.rmSync(home.apiSocket, { force: true })
      log.info('varve ended cleanly')
    },
  }
}

type Budgets = Pick<
  DaemonOptions,
  'scratchBytes' | 'scratchHostBytes' | 'scratchMemoryBytes' | 'metadataCacheBytes'
> & {
  readonly shards: number
  readonly peers: ApiPeers
}

async function openEngine(home: Home, { shards, ...budgets }: Budgets, log: Logger): Promise<Shards> {
  try {
    return await Shards.open({
      ...budgets,
      count: shards,
      host: realHost,
      home,
      openCatalog: () => new SqliteCatalog(home.catalog),
      report: (message, details) => log.warn(details ?? {}, message),
    })
  } catch (error) {
    if (!(error instanceof BlockError) || error.kind !== 'busy' || error.place.path !== home.lock) throw error
    const message = `another varve serve has the home ${home.folder}: stop it, or name another with --home`
    throw new BlockError('busy', message, { path: home.folder }, error)
  }
}

/** The NBD server for TCP: disks live in other threads, so that their clients are only passed on. */
function makeGate(engine: Shards, home: Home): NbdServer {
  return new NbdServer({
    find: () => undefined,
    list: () => engine.exportNames.map((name) => ({ name })),
    route: (name, enters) => {
      if (!engine.exportNames.includes(name)) return undefined
      const refused = engine.guests.refusal(name)
      if (refused !== undefined) return { refused }
      return { socket: home.nbdSocket(name), after: enters ? engine.guests.enters(name) : undefined }
    },
  })
}
