// A whole engine on a simulated host: catalog, images, dirty logs and repository in memory, guests that write to the disks
// directly. `fork` is what a crash at this moment leaves, as a new lab; the old one goes on undisturbed.

import type { Random } from '../../src/base/random.ts'
import type { BlockDevice } from '../../src/block/device.ts'
import { guard } from '../../src/block/guard.ts'
import type { Disk } from '../../src/chain/disk.ts'
import type { ViewServing } from '../../src/engine/context.ts'
import { MemoryCatalog } from '../../src/engine/catalog.ts'
import type { EngineOptions } from '../../src/engine/engine-options.ts'
import { Engine } from '../../src/engine/engine.ts'
import { homeAt } from '../../src/engine/home.ts'
import { noPeers, type Peers } from '../../src/engine/peers.ts'
import { SimulatedHost, type Keep } from '../../src/host/simulated.ts'
import { initRepository, openRepository, type Repository } from '../../src/repository/repository.ts'
import { InlineSqueezer } from '../../src/repository/squeezer.ts'
import { DirectoryStore } from '../../src/repository/stores/directory.ts'

const MERGE_PACE = { piece: 16_384, lanes: 2, settleBytes: 65_536, settleMs: Infinity }

/** Backups of small disks keep parts all the same. */
const PART_PACE = { everyMs: 0, everyBytes: 131_072, lastBytes: 4096 }

export const LAB_REPOSITORY = '/repository'

/** Those of the engine's options that a test changes. */
type LabLimits = Pick<EngineOptions, 'scratchBytes' | 'partPace'>

export class Lab {
  readonly host: SimulatedHost
  readonly catalog: MemoryCatalog
  readonly reports: string[] = []
  /** Other labs, to migrate disks to. */
  peers: Peers = noPeers
  readonly #disks = new Map<string, Disk>()
  readonly #views = new Map<string, { readonly device: BlockDevice; readonly how: ViewServing | undefined }>()
  readonly #limits: LabLimits
  #engine: Engine | undefined

  private constructor(host: SimulatedHost, catalog: MemoryCatalog, limits: LabLimits) {
    this.host = host
    this.#limits = limits
    this.catalog = catalog
  }

  /** A new host with an empty repository and folders for images; with a scheduler, one that answers late. */
  static async create(scheduler?: Random, limits: LabLimits = {}): Promise<Lab> {
    const lab = new Lab(new SimulatedHost(scheduler === undefined ? {} : { scheduler }), new MemoryCatalog(), limits)
    await lab.host.makeFolder('/images')
    await lab.host.makeFolder('/home/run')
    await lab.makeRepository(LAB_REPOSITORY)
    await lab.start()
    return lab
  }

  /** An empty repository in a folder of the host. */
  async makeRepository(folder: string): Promise<void> {
    const store = new DirectoryStore(this.host, folder)
    await (await initRepository(store, { squeezer: (vault) => new InlineSqueezer(vault) })).close()
  }

  get engine(): Engine {
    if (this.#engine === undefined) throw new Error('the lab’s engine is not running')
    return this.#engine
  }

  async start(): Promise<void> {
    this.#engine = await Engine.open({
      partPace: PART_PACE,
      // Its disks are small: with memory nothing would ever be in the file, where things go wrong.
      scratchMemoryBytes: 0,
      ...this.#limits,
      host: this.host,
      home: homeAt('/home'),
      openCatalog: () => this.catalog,
      serve: async (disk, _socket, name = disk.name) => {
        this.#disks.set(name, disk)
        return { uri: `lab:${name}`, close: async () => {}, sever: () => {} }
      },
      serveView: async (device, _socket, how) => {
        this.#views.set(device.name, { device, how })
        return { uri: `lab:${device.name}`, close: async () => void this.#views.delete(device.name), sever: () => {} }
      },
      openRepository: (location) => this.repository(location),
      peers: {
        prepare: (...args) => this.peers.prepare(...args),
        step: (...args) => this.peers.step(...args),
        connect: (...args) => this.peers.connect(...args),
      },
      report: (message) => this.reports.push(message),
      // Small disks are many pieces all the same.
      mirrorPace: { piece: 16_384, settleBytes: 65_536 },
      mergePaces: { commit: MERGE_PACE, stream: MERGE_PACE, restore: MERGE_PACE },
    })
  }

  async stop(): Promise<void> {
    await this.engine.close()
    this.#engine = undefined
  }

  repository(folder = LAB_REPOSITORY): Promise<Repository> {
    return openRepository(new DirectoryStore(this.host, folder), {
      squeezer: (vault) => new InlineSqueezer(vault),
    })
  }

  /** The disk as its guest has it. */
  guest(name: string): BlockDevice {
    const disk = this.#disks.get(name)
    if (disk === undefined) throw new Error(`no disk ${name} is served`)
    return guard(disk)
  }

  /** What is exported under that name, if anything. */
  view(name: string): BlockDevice | undefined {
    return this.#views.get(name)?.device
  }

  /** How it is exported. */
  viewServing(name: string): ViewServing | undefined {
    return this.#views.get(name)?.how
  }

  disk(name: string): Disk {
    const disk = this.#disks.get(name)
    if (disk === undefined) throw new Error(`no disk ${name} is served`)
    return disk
  }

  /** What is left when the process dies now, or the power fails and keeps what `keep` says of what was not synced. */
  fork(keep?: Keep): Lab {
    const host = this.host.clone()
    if (keep !== undefined) host.crash(keep)
    return new Lab(host, this.catalog.clone(), this.#limits)
  }

  /** Waits until no job runs; fails when one ended with an error that was no view, which no restart outlives. */
  async jobsEnd(): Promise<void> {
    for (;;) {
      const running = this.engine.listJobs().find((job) => job.endedMs === undefined)
      if (running === undefined) break
      await this.engine.jobEnded(running.id)
    }
    const failed = this.engine.listJobs().find((job) => job.error !== undefined && job.kind !== 'view')
    if (failed !== undefined) throw new Error(`job ${failed.id} failed: ${failed.error?.message}`)
  }
}

/** Reads a whole device. */
export async function readWhole(device: BlockDevice): Promise<Buffer> {
  const bytes = Buffer.alloc(device.size)
  const piece = 1024 * 1024
  for (let at = 0; at < device.size; at += piece) await device.read(at, Math.min(piece, device.size - at), bytes, at)
  return bytes
}
