// The control plane: owns the home and its catalog, and has the disks live in shards, worker threads that are started when they
// get their first disk. What the API asks goes to the shard of the disk or job; what a shard commits is made durable here and
// shown to the others. A shard that dies is started again and opens its disks anew; the others do not notice.
//
//   API -> Shards -> calls -> shard-worker -> Engine (its disks, exports, jobs)
//            catalog <- commit <-+

import os from 'node:os'
import { Worker } from 'node:worker_threads'
import { QCOW2_METADATA_BYTES, SHARD_RESTART_MS } from '../base/limits.ts'
import { Mutex } from '../base/mutex.ts'
import { BlockError } from '../block/error.ts'
import { diskOfToken, ensureIdentity, identityOf } from '../engine/authority.ts'
import type { BackupRequest } from '../engine/backups.ts'
import { type Catalog, type CatalogChange, disksOf } from '../engine/catalog.ts'
import type { DiskStatus } from '../engine/disk-status.ts'
import { DistantGuests } from '../engine/distant-guests.ts'
import { lockHome } from '../engine/home.ts'
import { HostDesk } from '../engine/host-desk.ts'
import { limitDefaultsOf } from '../engine/host-limits.ts'
import { dismissal, JobTable } from '../engine/job-table.ts'
import { guestsOf, Machines } from '../engine/machines.ts'
import type { IncomingReply, IncomingRequest, IncomingStep } from '../engine/peers.ts'
import { type QueueRequest, queueRows } from '../engine/queued-backups.ts'
import type { EngineService } from '../engine/service.ts'
import type { RestoreRequest } from '../engine/restores.ts'
import { exportNamesOf } from '../engine/snapshot-exports.ts'
import { type NewSnapshot, snapshotTogether } from '../engine/snapshot-party.ts'
import { socketOfView, type ViewRequest } from '../engine/views.ts'
import type { VmJobRequest } from '../engine/vm-jobs.ts'
import { Vms } from '../engine/vms.ts'
import type { HostFile } from '../host/host.ts'
import { poolLanes } from '../host/pool-lanes.ts'
import type { JobStatus } from '../job/job.ts'
import { Calls, type Remote } from './calls.ts'
import { allRecords } from './catalog-mirror.ts'
import { JobWatchers } from './job-watchers.ts'
import { remoteSnapshotParty } from './remote-snapshot-party.ts'
import { type ControlFunctions, MACHINES_SEAT, type ShardFunctions, type ShardStart } from './messages.ts'
import { partyCalls } from './party-calls.ts'
import { type Seat, seatsInUse, type Shard } from './seat.ts'
import { ShardTurns } from './shard-turns.ts'
import { noPeerCalls, type PeerCalls, type ShardsOptions } from './shards-options.ts'

/** Those of a shard's functions that are about one disk, which they name first. */
type OfDisk = {
  [K in keyof ShardFunctions]: Parameters<ShardFunctions[K]> extends [disk: string, ...unknown[]] ? K : never
}[keyof ShardFunctions]

type OfJob = 'completeJob' | 'setMirrorMode' | 'sayToJob' | 'setJobSpeed' | 'stepView'

export class Shards implements EngineService {
  readonly #options: ShardsOptions
  readonly #peers: PeerCalls
  readonly #lock: HostFile
  readonly #catalog: Catalog
  readonly #seats: readonly Seat[]
  readonly #control = new Mutex()
  /** One snapshot of disks in several shards at a time. */
  readonly #snapshotTurn = new Mutex()
  readonly #turns: ShardTurns
  /** Clients on TCP. */
  readonly guests: DistantGuests
  readonly machines: Machines
  readonly vms: Vms
  readonly host: HostDesk
  readonly #watchers = new JobWatchers((id, verb) => this.#ofJob(id).then(({ remote }) => remote[verb](id)))
  #isClosing = false
  #closed: Promise<void> | undefined

  // What one disk is asked goes to its shard as it is.
  readonly resizeDisk = this.#passOn('resizeDisk')
  readonly editBitmaps = this.#passOn('editBitmaps')
  readonly saveBitmaps = this.#passOn('saveBitmaps')
  readonly compareBitmaps = this.#passOn('compareBitmaps')
  readonly listSnapshots = this.#passOn('listSnapshots')
  readonly exportSnapshot = this.#passOn('exportSnapshot')
  readonly unexportSnapshot = this.#passOn('unexportSnapshot')
  readonly revert = this.#passOn('revert')
  readonly deleteSnapshot = this.#passOn('deleteSnapshot')
  readonly planCommit = this.#passOn('planCommit')
  readonly commit = this.#passOn('commit')
  readonly planStream = this.#passOn('planStream')
  readonly stream = this.#passOn('stream')
  readonly restoreOnto = this.#passOn('restoreOnto')
  readonly mirror = this.#passOn('mirror')
  readonly migrate = this.#passOn('migrate')
  readonly settleDisk = this.#passOn('settleDisk')

  // What one job is asked, to that of the job.
  readonly completeJob = this.#passToJob('completeJob')
  readonly setMirrorMode = this.#passToJob('setMirrorMode')
  readonly sayToJob = this.#passToJob('sayToJob')
  readonly setJobSpeed = this.#passToJob('setJobSpeed')
  readonly stepView = this.#passToJob('stepView')
  readonly vmJob = async (asked: VmJobRequest): Promise<JobStatus> => (await this.#ofFirst([])).vmJob(asked)

  private constructor(options: ShardsOptions, lock: HostFile, catalog: Catalog) {
    this.#options = options
    this.#peers = options.peers ?? noPeerCalls
    this.#lock = lock
    this.#catalog = catalog
    const bootId = options.host.bootId()
    const commit = (changes: readonly CatalogChange[]): Promise<void> => this.#commit(undefined, changes)
    this.guests = new DistantGuests(catalog, commit, bootId)
    this.machines = new Machines(catalog, commit, this.#control)
    this.vms = new Vms({ catalog, commit, control: this.#control, home: options.home, host: options.host })
    const { count = os.availableParallelism() } = options
    this.host = new HostDesk({
      catalog,
      commit,
      defaults: limitDefaultsOf(options),
      threads: count,
      report: options.report,
    })
    this.#turns = new ShardTurns(this.host.queue)
    const seat = (number: number): Seat => ({ number, disks: new Set(), shard: undefined, deaths: 0, diedMs: 0 })
    this.#seats = Array.from({ length: count }, (_, number) => seat(number))
  }

  /** Opens the home with all its disks. Kind 'busy' when another daemon has it. */
  static async open(options: ShardsOptions): Promise<Shards> {
    const { host, home } = options
    const lock = await lockHome(host, home)
    try {
      const shards = new Shards(options, lock, options.openCatalog())
      try {
        await ensureIdentity(shards.#catalog)
        await shards.#openAll()
        return shards
      } catch (error) {
        shards.#isClosing = true
        for (const { shard } of shards.#seats) await shard?.worker.terminate()
        shards.#catalog.close()
        throw error
      }
    } catch (error) {
      await lock.close()
      throw error
    }
  }

  async #openAll(): Promise<void> {
    for (const [index, { id }] of this.#catalog.list('disk').entries())
      this.#seats[index % this.#seats.length]?.disks.add(id)
    const used = seatsInUse(this.#seats, this.#catalog)
    const started = used.map((seat) => this.#start(seat))
    await Promise.all(started.map(({ ready }) => ready))
    this.host.guests.recover()
    // The bits of all disks are settled before any backup begins again: it may have disks in several shards.
    for (const { calls } of started) await calls.remote.settleBackups(undefined)
    for (const { calls } of started) await calls.remote.resumeJobs()
  }

  async listDisks(): Promise<DiskStatus[]> {
    const lists = await this.#everywhere((remote) => remote.listDisks())
    const found = new Map(lists.flat().map((status) => [status.name, status]))
    const inOrder = this.#catalog.list('disk').flatMap(({ name }) => found.get(name) ?? [])
    return inOrder.map((status) => this.#withHeld(status))
  }

  async showDisk(name: string): Promise<DiskStatus> {
    return this.#withHeld(await (await this.#of(name)).showDisk(name))
  }

  releaseDisk(name: string): Promise<void> {
    this.#seatOf(name)
    return this.guests.release(name)
  }

  addDisk(...args: Parameters<EngineService['addDisk']>): Promise<DiskStatus> {
    return this.#control.run(async () => (await this.#forNew()).addDisk(...args))
  }

  createDisk(...args: Parameters<EngineService['createDisk']>): Promise<DiskStatus> {
    return this.#control.run(async () => (await this.#forNew()).createDisk(...args))
  }

  restore(request: RestoreRequest): Promise<JobStatus> {
    return this.#control.run(async () => (await this.#forNew()).restore(request))
  }

  /** A clone begins its life in the shard of the disk that it is made of, which alone knows what is done to the layers they share. */
  clone(disk: string, ...args: [snapshot: string, name: string, image?: string]): Promise<DiskStatus> {
    return this.#control.run(async () => (await this.#of(disk)).clone(disk, ...args))
  }

  removeDisk(name: string): Promise<void> {
    return this.#control.run(async () => (await this.#of(name)).removeDisk(name))
  }

  async createSnapshot(disk: string, name: string): Promise<NewSnapshot> {
    return (await this.createSnapshots([disk], name))[0] as NewSnapshot
  }

  async createSnapshots(names: readonly string[], name: string): Promise<NewSnapshot[]> {
    const disks = this.machines.disksOf(names, 'a snapshot')
    return this.host.guests.during(guestsOf(this.#catalog, disks), () => this.#snapshot(disks, name))
  }

  async #snapshot(disks: readonly string[], name: string): Promise<NewSnapshot[]> {
    const [first, ...others] = new Set(disks.map((disk) => this.#seatOf(disk)))
    if (first === undefined) throw new BlockError('invalid-argument', 'a snapshot needs at least one disk')
    if (others.length === 0) return (await this.#reach(first)).createSnapshots(disks, name)
    return this.#snapshotTurn.run(async () => {
      const remotes = new Map<Seat, Remote<ShardFunctions>>()
      for (const seat of [first, ...others]) remotes.set(seat, await this.#reach(seat))
      const parties = disks.map((disk) =>
        remoteSnapshotParty(disk, remotes.get(this.#seatOf(disk)) as Remote<ShardFunctions>),
      )
      return snapshotTogether(parties, name, async (changes) => {
        // A thread that was started again holds no guest: its disks go on in the layers that were to be frozen.
        if ([...remotes].some(([seat, remote]) => seat.shard?.calls.remote !== remote))
          throw new BlockError('closed', 'the thread of a disk ended meanwhile; it is started again, ask in a moment')
        return this.#commit(undefined, changes)
      })
    })
  }

  prepareIncoming(request: IncomingRequest): Promise<IncomingReply> {
    return this.#control.run(async () => (await this.#forNew()).prepareIncoming(request))
  }

  async stepIncoming(token: string, step: IncomingStep): Promise<IncomingReply> {
    const record = diskOfToken(this.#catalog, token)
    if (record !== undefined) return (await this.#of(record.name)).stepIncoming(token, step)
    return { home: identityOf(this.#catalog), state: 'unknown', snapshots: [] }
  }

  /** A backup is made in the shard of its first disk. */
  async backup(request: BackupRequest): Promise<JobStatus> {
    const meant = this.machines.together(request.disks)
    return (await this.#ofFirst(meant.disks)).backup({ ...request, ...meant })
  }

  async openView(request: ViewRequest): Promise<JobStatus> {
    this.machines.disksOf(request.disks, 'a view')
    const meant = this.machines.together(request.disks)
    return (await this.#ofFirst(meant.disks)).openView({ ...request, ...meant })
  }

  async queueBackups(request: QueueRequest): Promise<JobStatus[]> {
    if (this.#isClosing) throw new BlockError('closed', 'the daemon stops: ask again when it runs')
    const rows = queueRows(this.#catalog, this.machines, request)
    const changes: CatalogChange[] = rows.map((record) => ({ put: 'job', record }))
    await this.#commit(undefined, changes)
    const ids = rows.map(({ id }) => id)
    if (rows.some(({ spec }) => disksOf(spec).length === 0)) await this.#ofFirst([])
    // A shard that is just being started finds its rows by itself.
    const launched = (await this.#everywhere((remote) => remote.launchQueued(ids))).flat()
    return rows.map((row) => launched.find(({ id }) => id === row.id) ?? JobTable.jobOf(row, {}).status)
  }

  async listJobs(): Promise<JobStatus[]> {
    const lists = await this.#everywhere((remote) => remote.listJobs())
    const ended = this.#catalog.list('history').map(({ status }) => status as JobStatus)
    const known = new Set(ended.map(({ id }) => id))
    const running = lists.flat().filter(({ id, endedMs }) => endedMs === undefined && !known.has(id))
    return [...running, ...ended.toReversed()]
  }

  async showJob(id: string): Promise<JobStatus> {
    const ended = this.#catalog.get('history', id)
    if (ended !== undefined) return ended.status as JobStatus
    return (await this.#ofJob(id)).status
  }

  async dismissJob(id: string): Promise<void> {
    const ended = this.#catalog.get('history', id)
    if (ended !== undefined) return this.#commit(undefined, dismissal(ended))
    return (await this.#ofJob(id)).remote.dismissJob(id)
  }

  watchJob(id: string, listener: (status: JobStatus) => void): Promise<() => void> {
    return this.#watchers.watch(id, listener)
  }

  async jobEnded(id: string): Promise<JobStatus> {
    const ended = this.#catalog.get('history', id)
    if (ended !== undefined) return ended.status as JobStatus
    return (await this.#ofJob(id)).remote.jobEnded(id)
  }

  /** Suspends all jobs, then leaves every image clean. */
  close(): Promise<void> {
    return (this.#closed ??= this.#close())
  }

  async #close(): Promise<void> {
    this.#isClosing = true
    await this.#control.acquire()
    const shards = this.#seats.flatMap(({ shard }) => shard ?? [])
    await Promise.allSettled(shards.map(({ calls }) => calls.remote.stopJobs()))
    this.host.guests.close()
    const closed = await Promise.allSettled(shards.map(({ calls }) => calls.remote.close()))
    for (const one of closed)
      if (one.status === 'rejected') this.#options.report(`a shard did not close: ${(one.reason as Error).message}`)
    for (const { worker } of shards) await worker.terminate()
    this.#catalog.close()
    await this.#lock.close()
  }

  /** Ends a shard as a fault in it would, for tests: it is started again. */
  async kill(number: number): Promise<void> {
    await this.#seats[number]?.shard?.worker.terminate()
  }

  /**
   * The socket at which a daemon finds the disk that it moves, or moved, to here. As a guest from another host (`isDistant`) it is noted.
   * Kinds 'not-found', 'busy' while the disk is held.
   */
  async incomingSocket(token: string, isDistant: boolean): Promise<string> {
    const record = diskOfToken(this.#catalog, token)
    if (record === undefined) throw new BlockError('not-found', 'no disk is known by this token')
    const held = this.guests.refusal(record.name)
    if (held !== undefined && isDistant) throw new BlockError('busy', `disk ${record.name}: ${held}`)
    if (record.arrival !== undefined && isDistant) await this.guests.enters(record.name)
    return this.#options.home.incomingSocket(record.name)
  }

  viewSocket(view: string, disk: string): string {
    return socketOfView(this.#catalog, this.#options.home, view, disk)
  }

  /** Of NBD. */
  get exportNames(): readonly string[] {
    return exportNamesOf(this.#catalog)
  }

  /** Threads that run. */
  get running(): number {
    return this.#seats.filter(({ shard }) => shard !== undefined).length
  }

  #start(seat: Seat): Shard {
    const { home, scratchBytes, metadataCacheBytes = QCOW2_METADATA_BYTES } = this.#options
    const workerData: ShardStart = {
      number: seat.number,
      home: home.folder,
      disks: [...seat.disks],
      records: allRecords(this.#catalog),
      scratchBytes,
      scratch: this.host.scratch.cells,
      scratchMemory: this.host.scratchMemory.cells,
      bandwidth: this.host.bandwidth.cells,
      metadataCacheBytes: Math.floor(metadataCacheBytes / this.#seats.length),
      poolLanes: poolLanes.total,
    }
    const url = new URL(`./shard-worker${import.meta.filename.endsWith('.ts') ? '.ts' : '.js'}`, import.meta.url)
    const worker = new Worker(url, { name: `varve-shard-${seat.number}`, workerData })
    const calls = new Calls<ShardFunctions>(worker, this.#functionsFor(seat), (error) => {
      this.#options.report(`a fault in the control plane: ${error instanceof Error ? error.stack : String(error)}`)
    })
    const shard: Shard = { number: seat.number, worker, calls, ready: calls.remote.open() }
    shard.ready.catch(() => undefined)
    seat.shard = shard
    worker.on('error', (error) => this.#options.report(`shard ${seat.number} failed: ${error.stack ?? error.message}`))
    worker.on('exit', () => this.#died(seat, shard))
    return shard
  }

  #died(seat: Seat, shard: Shard): void {
    const message = `the thread of the disk ended; it is started again, ask in a moment`
    shard.calls.lose(new BlockError('closed', message))
    if (seat.shard !== shard) return
    seat.shard = undefined
    this.host.scratch.reclaim(seat.number)
    this.host.scratchMemory.reclaim(seat.number)
    this.#turns.lost(seat)
    if (this.#isClosing) return
    const isRecent = Date.now() - seat.diedMs < 60_000
    seat.deaths = isRecent ? seat.deaths + 1 : 0
    seat.diedMs = Date.now()
    const waitMs = SHARD_RESTART_MS[Math.min(seat.deaths, SHARD_RESTART_MS.length - 1)] as number
    this.#options.report(`shard ${seat.number} ended: its ${seat.disks.size} disks are opened again in ${waitMs} ms`)
    setTimeout(() => void this.#restart(seat), waitMs)
  }

  async #restart(seat: Seat): Promise<void> {
    if (this.#isClosing || seat.shard !== undefined) return
    const names = this.#catalog.list('disk').flatMap(({ id, name }) => (seat.disks.has(id) ? [name] : []))
    try {
      // Its backups of others' disks first: those disks go on, and their bits are as if it had never begun.
      for (const other of this.#seats) {
        if (other.shard === undefined) continue
        await other.shard.ready
        await other.shard.calls.remote.askerDied(seat.number)
        await other.shard.calls.remote.settleBackups(names)
      }
      const shard = this.#start(seat)
      await shard.ready
      await shard.calls.remote.settleBackups(undefined)
      await shard.calls.remote.resumeJobs()
      this.#options.report(`shard ${seat.number} runs again`)
    } catch (error) {
      this.#options.report(`shard ${seat.number} was not started: ${(error as Error).message}`)
    }
  }

  /** What the shard may ask. */
  #functionsFor(seat: Seat): ControlFunctions {
    return {
      ...partyCalls((disk) => this.#of(disk)),
      commit: (changes) => this.#commit(seat, changes),
      report: this.#options.report,
      jobChanged: (id, status) => this.#watchers.changed(id, status),
      peerPrepare: (to, request) => this.#peers.prepare(to, request),
      peerStep: (to, token, step) => this.#peers.step(to, token, step),
      peerSocket: (to, token) => this.#peers.socket(to, token),
      takeTurn: (wish) => this.#turns.take(seat, wish),
      giveTurn: (id) => this.#turns.give(id),
      freezeGuest: (machine) => this.host.guests.freeze(machine),
      thawGuest: (machine) => this.host.guests.thaw(machine),
    }
  }

  /** Commits for a shard, or for the control plane itself, and shows it to the others. */
  async #commit(seat: Seat | undefined, changes: readonly CatalogChange[]): Promise<void> {
    await this.#catalog.commit(changes)
    for (const change of seat === undefined ? [] : changes) {
      if ('put' in change && change.put === 'disk') seat?.disks.add(change.record.id)
      if ('remove' in change && change.remove === 'disk') seat?.disks.delete(change.id)
    }
    for (const other of this.#seats) if (other !== seat) void other.shard?.calls.remote.apply(changes).catch(() => {})
  }

  #withHeld(status: DiskStatus): DiskStatus {
    const held = this.guests.refusal(status.name)
    return held === undefined ? status : { ...status, held }
  }

  #seatOf(disk: string): Seat {
    const record = this.#catalog.list('disk').find(({ name }) => name === disk)
    const seat = record === undefined ? undefined : this.#seats.find(({ disks }) => disks.has(record.id))
    if (seat !== undefined) return seat
    throw new BlockError('not-found', `there is no disk ${disk}: varve disk list shows those there are`)
  }

  #passOn<K extends OfDisk>(name: K): Remote<ShardFunctions>[K] {
    const passOn = async (disk: string, ...args: readonly unknown[]): Promise<unknown> => {
      const call = (await this.#of(disk))[name] as (...given: unknown[]) => Promise<unknown>
      return call(disk, ...args)
    }
    return passOn as Remote<ShardFunctions>[K]
  }

  #passToJob<K extends OfJob>(name: K): Remote<ShardFunctions>[K] {
    const passOn = async (id: string, ...args: readonly unknown[]): Promise<unknown> => {
      const call = (await this.#ofJob(id)).remote[name] as (...given: unknown[]) => Promise<unknown>
      return call(id, ...args)
    }
    return passOn as Remote<ShardFunctions>[K]
  }

  /** The shard of a disk, when its disks are open. */
  async #of(disk: string): Promise<Remote<ShardFunctions>> {
    return this.#reach(this.#seatOf(disk))
  }

  /** The shard of the first disk, when all of them are known; without any that of machines in QEMUs of their own. */
  async #ofFirst(disks: readonly string[]): Promise<Remote<ShardFunctions>> {
    const [first = this.#seats[MACHINES_SEAT] as Seat] = disks.map((disk) => this.#seatOf(disk))
    if (first.shard === undefined && disks.length === 0) this.#start(first)
    return this.#reach(first)
  }

  async #reach(seat: Seat): Promise<Remote<ShardFunctions>> {
    const { shard } = seat
    if (shard === undefined) throw new BlockError('closed', 'the thread of the disk is being started: ask in a moment')
    await shard.ready
    return shard.calls.remote
  }

  /** Where a new disk goes: the shard with the fewest. */
  async #forNew(): Promise<Remote<ShardFunctions>> {
    if (this.#isClosing) throw new BlockError('closed', 'the daemon stops: ask again when it runs')
    const seat = this.#seats.reduce((least, one) => (one.disks.size < least.disks.size ? one : least))
    if (seat.shard === undefined) this.#start(seat)
    return this.#reach(seat)
  }

  async #ofJob(id: string): Promise<{ readonly remote: Remote<ShardFunctions>; readonly status: JobStatus }> {
    for (const { shard } of this.#seats) {
      if (shard === undefined) continue
      const { remote } = shard.calls
      const found = await shard.ready.then(() => remote.showJob(id)).catch(() => undefined)
      if (found !== undefined) return { remote, status: found }
    }
    throw new BlockError('not-found', `there is no job ${id}: varve job list shows those there are`)
  }

  /** Asks every shard that runs; one that dies meanwhile has nothing to say. */
  async #everywhere<T>(ask: (remote: Remote<ShardFunctions>) => Promise<T>): Promise<T[]> {
    const asked = this.#seats.flatMap(({ shard }) =>
      shard === undefined ? [] : [shard.ready.then(() => ask(shard.calls.remote))],
    )
    return (await Promise.allSettled(asked)).flatMap((one) => (one.status === 'fulfilled' ? [one.value] : []))
  }
}
