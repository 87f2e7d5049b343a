// A shard: the thread in which some of the disks live, with their exports and their jobs. An Engine on a mirror of the catalog,
// reached by calls from the control plane (shards.ts). It shares nothing with other shards.

import { parentPort, workerData } from 'node:worker_threads'
import { EVENTS_EVERY_MS } from '../base/limits.ts'
import { assert } from '../base/assert.ts'
import { BlockError } from '../block/error.ts'
import { ScratchBudget } from '../chain/scratch-budget.ts'
import type { Turn, TurnEvents } from '../engine/backup-queue.ts'
import type { CatalogChange } from '../engine/catalog.ts'
import { Engine } from '../engine/engine.ts'
import { ListenedDisks } from '../engine/guest-ears.ts'
import type { SnapshotParty } from '../engine/snapshot-party.ts'
import { homeAt } from '../engine/home.ts'
import { metadataCache } from '../format/qcow2/metadata-cache.ts'
import { Bandwidth } from '../job/bandwidth.ts'
import { poolLanes } from '../host/pool-lanes.ts'
import { realHost } from '../host/real.ts'
import { Calls } from './calls.ts'
import { CatalogMirror } from './catalog-mirror.ts'
import { serveDisk, serveView } from './disk-exports.ts'
import { type ControlFunctions, MACHINES_SEAT, type ShardFunctions, type ShardStart } from './messages.ts'
import { peersThrough } from './peer-links.ts'
import { FarGuests } from './far-guests.ts'
import { RemoteParty } from './remote-party.ts'
import { openRepositoryAt } from './repositories.ts'
import { ViewExports } from './view-exports.ts'

const start = workerData as ShardStart
const home = homeAt(start.home)
const owned = new Set(start.disks)
const watched = new Map<string, () => void>()
let engine: Engine | undefined

function running(): Engine {
  if (engine !== undefined) return engine
  throw new BlockError('closed', 'the thread of the disk is being started: ask in a moment')
}

const mirror = new CatalogMirror((changes) => {
  // A disk that this shard adds is its own from the moment at which the mirror shows it.
  for (const change of changes) if ('put' in change && change.put === 'disk') owned.add(change.record.id)
  return control.commit(changes)
}, start.records)

const views = new ViewExports(
  (disk) => running().partyOf(disk),
  (disk) => home.viewSocket(disk),
)

/** Backups of this shard that have their turn or wait for it. */
const turns = new Map<string, TurnEvents>()

/** Disks of this shard whose guests jobs of others make way for. */
const listened = new ListenedDisks()

/** This shard's sides of snapshots that the control plane takes of disks in several. */
const snapshots = new Map<string, SnapshotParty>()

function snapshotOf(disk: string): SnapshotParty {
  const party = snapshots.get(disk)
  if (party !== undefined) return party
  throw new BlockError('closed', `disk ${disk} does not take part in a snapshot any more`)
}

const functions: ShardFunctions = {
  ...views.functions,
  open: async () => {
    metadataCache.budget = start.metadataCacheBytes
    poolLanes.total = start.poolLanes
    engine = await Engine.open({
      host: realHost,
      home,
      openCatalog: () => mirror,
      serve: serveDisk,
      serveView,
      openRepository: openRepositoryAt,
      peers: peersThrough(control),
      report: (message, details) => void control.report(message, details),
      ...(start.scratchBytes === undefined ? {} : { scratchBytes: start.scratchBytes }),
      shard: {
        owns: (id) => owned.has(id),
        hasMachines: start.number === MACHINES_SEAT,
        partyOf: (disk) => new RemoteParty(disk, start.number, control),
        scratch: new ScratchBudget(start.scratch, start.number),
        scratchMemory: new ScratchBudget(start.scratchMemory, start.number),
        bandwidth: new Bandwidth(start.bandwidth),
        backupTurn,
        farEar: (disk) => new FarGuests(disk, start.number, control),
        guests: {
          freeze: (machine) => control.freezeGuest(machine),
          thaw: (machine) => control.thawGuest(machine),
        },
      },
    })
  },
  settleBackups: (ofDisks) =>
    running().settleBackups(
      ofDisks === undefined ? undefined : ({ spec }) => 'disks' in spec && ofDisks.includes(spec.disks[0] as string),
    ),
  resumeJobs: () => running().resumeJobs(),
  apply: (changes: readonly CatalogChange[]) => mirror.apply(changes),
  listDisks: () => running().listDisks(),
  showDisk: (name) => running().showDisk(name),
  addDisk: (...args) => running().addDisk(...args),
  createDisk: (...args) => running().createDisk(...args),
  resizeDisk: (...args) => running().resizeDisk(...args),
  editBitmaps: (...args) => running().editBitmaps(...args),
  saveBitmaps: (...args) => running().saveBitmaps(...args),
  compareBitmaps: (...args) => running().compareBitmaps(...args),
  clone: (...args) => running().clone(...args),
  removeDisk: (name) => {
    views.checkFree(name)
    return running().removeDisk(name)
  },
  listSnapshots: (disk) => running().listSnapshots(disk),
  createSnapshot: (...args) => running().createSnapshot(...args),
  createSnapshots: (...args) => running().createSnapshots(...args),
  snapshotPrepare: async (disk, name) => {
    const party = running().snapshotPartyOf(disk)
    snapshots.set(disk, party)
    await party.prepare(name)
  },
  snapshotFreeze: (disk) => snapshotOf(disk).freeze(),
  snapshotApply: async (disk) => {
    const party = snapshotOf(disk)
    snapshots.delete(disk)
    await party.apply()
  },
  snapshotUndo: async (disk) => {
    const party = snapshots.get(disk)
    snapshots.delete(disk)
    await party?.undo()
  },
  exportSnapshot: (...args) => running().exportSnapshot(...args),
  unexportSnapshot: (...args) => running().unexportSnapshot(...args),
  revert: (...args) => running().revert(...args),
  deleteSnapshot: (...args) => running().deleteSnapshot(...args),
  planCommit: (...args) => running().planCommit(...args),
  commit: (...args) => running().commit(...args),
  planStream: (...args) => running().planStream(...args),
  stream: (...args) => running().stream(...args),
  restore: (request) => running().restore(request),
  restoreOnto: (...args) => running().restoreOnto(...args),
  mirror: (...args) => running().mirror(...args),
  migrate: (...args) => running().migrate(...args),
  settleDisk: (...args) => running().settleDisk(...args),
  prepareIncoming: (request) => running().prepareIncoming(request),
  stepIncoming: (...args) => running().stepIncoming(...args),
  completeJob: (...args) => running().completeJob(...args),
  setMirrorMode: (...args) => running().setMirrorMode(...args),
  backup: (request) => running().backup(request),
  vmJob: (request) => running().vmJob(request),
  launchQueued: (ids) => running().launchQueued(ids),
  turnWaits: (id, reason) => turns.get(id)?.waits(reason),
  turnOver: (id, message) => turns.get(id)?.over(new BlockError('timeout', message)),
  openView: (...args) => running().openView(...args),
  stepView: (...args) => running().stepView(...args),
  listJobs: () => running().listJobs(),
  showJob: (id) => running().showJob(id),
  sayToJob: (...args) => running().sayToJob(...args),
  dismissJob: (id) => running().dismissJob(id),
  setJobSpeed: (...args) => running().setJobSpeed(...args),
  jobEnded: (id) => running().jobEnded(id),
  watchJob: (id) => {
    if (!watched.has(id)) watched.set(id, watch(id))
  },
  unwatchJob: (id) => {
    watched.get(id)?.()
    watched.delete(id)
  },
  guestsHear: (disk, asker) => listened.hear(running().diskNamed(disk), asker),
  guestsLeave: (disk, asker) => listened.leave(disk, asker),
  askerDied: (asker) => {
    listened.lost(asker)
    return views.askerDied(asker)
  },
  stopJobs: () => running().stopJobs(),
  close: async () => {
    await views.close()
    await engine?.close()
  },
}

assert(parentPort !== null, 'a shard runs in a worker thread')
const { remote: control } = new Calls<ControlFunctions>(parentPort, functions, (error) => {
  // A fault in Varve: the thread ends, and the control plane starts it again.
  throw error
})

const backupTurn: Turn = {
  take: (wish, events) => {
    turns.set(wish.id, events)
    return control.takeTurn(wish)
  },
  give: (id) => {
    if (turns.delete(id)) void control.giveTurn(id)
  },
}

/** Passes a job's changes on, not too often; the last one always arrives. */
function watch(id: string): () => void {
  let timer: NodeJS.Timeout | undefined
  const unwatch = running().watchJob(id, () => {
    timer ??= setTimeout(() => {
      timer = undefined
      void control.jobChanged(id, running().showJob(id))
    }, EVENTS_EVERY_MS / 2)
  })
  return () => {
    unwatch()
    clearTimeout(timer)
  }
}
