// Live commits: which layers, what the catalog says before and after, and how a commit goes on after a restart. The copying
// is job/commit.ts.
//
// A commit ends the snapshots whose layers it writes into or merges away, from its start: their layers no longer show
// that moment. The merged layer keeps the name of the highest layer that went down.

import { BlockError } from '../block/error.ts'
import type { Layer } from '../block/device.ts'
import { backingName } from '../chain/open.ts'
import { runCommit } from '../job/commit.ts'
import type { Job } from '../job/job.ts'
import type { JobTerms } from '../job/terms.ts'
import type { DiskRecord, JobRecord, LayerRecord } from './catalog.ts'
import { refuseClaimed } from './claims.ts'
import type { EngineContext, ManagedDisk } from './context.ts'
import { JobTable } from './job-table.ts'
import { refuseHeld } from './branches.ts'
import { refuseConflict } from './conflicts.ts'
import { removeGarbage } from './snapshots.ts'

export interface CommitPlan {
  /** Indexes into the chain: the highest layer that goes down, and the one that takes all. */
  readonly from: number
  readonly to: number
  /** Names of the snapshots that end. */
  readonly ends: readonly string[]
}

/** What a commit would do. `from` and `to` are snapshot names, image paths, 'active' or 'base'; by default all goes to the base. */
export function planCommit(managed: ManagedDisk, from = 'active', to = 'base'): CommitPlan {
  const { layers } = managed.record
  if (layers.length < 2) {
    throw new BlockError('invalid-argument', `disk ${managed.record.name} has one layer: there is nothing to commit`)
  }
  const plan = { from: findLayer(managed.record, from), to: findLayer(managed.record, to) }
  if (plan.to >= plan.from) {
    throw new BlockError('invalid-argument', `a commit goes down: --to ${to} is not below --from ${from}`)
  }
  const ends = layers
    .slice(plan.to, plan.from)
    .flatMap(({ snapshot }) => (snapshot === undefined ? [] : [snapshot.name]))
  return { ...plan, ends }
}

/** Begins a commit as a job; the plan is made when nobody else changes the chain. Kind 'busy' while another one runs on the disk. */
export function startCommit(
  context: EngineContext,
  managed: ManagedDisk,
  makePlan: () => CommitPlan,
  terms: JobTerms,
): Promise<Job> {
  return managed.control.run(async () => {
    const plan = makePlan()
    const { record } = managed
    refuseConflict(context, record.name, 'commit')
    const touched = record.layers.slice(plan.to, plan.from + 1)
    refuseHeld(record, touched, 'commit')
    refuseClaimed(context.catalog, record, touched, `commit of disk ${record.name}`)
    const layers = record.layers.map((layer, index) =>
      index >= plan.to && index < plan.from ? withoutName(layer) : layer,
    )
    const from = record.layers[plan.from] as LayerRecord
    const to = record.layers[plan.to] as LayerRecord
    const row = JobTable.newRow({ kind: 'commit', disk: record.name, from: from.path, to: to.path }, terms)
    const next = { ...record, layers }
    await context.catalog.commit([
      { put: 'disk', record: next },
      { put: 'job', record: row },
    ])
    managed.record = next
    return launchCommit(context, managed, row)
  })
}

/** Runs a commit whose row is in the catalog: a new one, or one that a restart found. */
export function launchCommit(context: EngineContext, managed: ManagedDisk, row: JobRecord): Job {
  const { spec } = row
  if (spec.kind !== 'commit') throw new BlockError('invalid-argument', `job ${row.id} is no commit`)
  const job = JobTable.jobOf(row, { from: spec.from, to: spec.to })
  context.jobs.launch(job, row, () => work(context, managed, row, job))
  return job
}

/** Name of a commit's to-do set in the disk's log. */
export function todoName(jobId: string): string {
  return `job:${jobId}`
}

async function work(context: EngineContext, managed: ManagedDisk, row: JobRecord, job: Job): Promise<void> {
  const { disk } = managed
  const { spec } = row
  if (spec.kind !== 'commit') return
  const from = managed.record.layers.findIndex((layer) => layer.path === spec.from)
  const to = managed.record.layers.findIndex((layer) => layer.path === spec.to)
  if (from < 0 || to < 0) {
    throw new BlockError('not-found', `job ${job.id}: the layers that it merges are no longer in the chain`)
  }
  const merged = disk.chain.layers.slice(to + 1, from + 1)
  const bitmap = todoName(row.id)
  try {
    await runCommit({
      job,
      disk,
      from,
      to,
      bitmap,
      total: row.total,
      pace: context.mergePaces.commit,
      began: (total) => {
        const record = { ...(context.catalog.get('job', row.id) ?? row), total }
        return context.catalog.commit([{ put: 'job', record }])
      },
      pivot: () => pivot(context, managed, row, from, to),
    })
  } catch (error) {
    if (!job.suspended) await undo(managed, bitmap, to)
    throw error
  }
  for (const layer of merged) {
    await layer.close()
    await removeGarbage(context, layer.path)
  }
}

/** The one transaction that makes the merge take effect, and then the chain in memory and the child's header. */
async function pivot(
  context: EngineContext,
  managed: ManagedDisk,
  row: JobRecord,
  from: number,
  to: number,
): Promise<void> {
  const { disk, record } = managed
  const merged = record.layers.slice(to + 1, from + 1)
  const target = record.layers[to] as LayerRecord
  const kept: LayerRecord = { ...target, snapshot: record.layers[from]?.snapshot }
  const next: DiskRecord = {
    ...record,
    layers: [...record.layers.slice(0, to), kept, ...record.layers.slice(from + 1)],
  }
  const layers = disk.chain.layers
  const child = layers[from + 1]
  if (child !== undefined) await (layers[to] as Layer).setAccess('read')
  await context.catalog.commit([
    { put: 'disk', record: next },
    { remove: 'job', id: row.id },
    ...merged.map(({ path }) => ({ put: 'garbage' as const, record: { id: path, disk: record.id } })),
  ])
  managed.record = next
  if (child === undefined) {
    disk.chain.replaceLayers(layers.slice(0, to + 1))
    return
  }
  await disk.drain()
  try {
    disk.chain.replaceLayers([...layers.slice(0, to + 1), ...layers.slice(from + 1)])
    await nameBacking(child, layers[to] as Layer)
  } finally {
    disk.undrain()
  }
}

/** The layer, no longer a snapshot. */
function withoutName({ snapshot: _ended, ...layer }: LayerRecord): LayerRecord {
  return layer
}

type LayerPlace = Pick<LayerRecord, 'path' | 'format'>

/** Writes into an image's header what it now lies on, if anything. A frozen layer is opened for writing just for that. */
export async function nameBacking(child: Layer, backing: LayerPlace | undefined): Promise<void> {
  const access = child.access
  if (access === 'read') await child.setAccess('write')
  const named = backing && { name: backingName(child.path, backing.path), format: backing.format }
  await child.setBackingReference(named)
  if (access === 'read') await child.setAccess('read')
}

/** Ends a commit that failed or was cancelled: the upper layers go on as they were. */
async function undo(managed: ManagedDisk, bitmap: string, to: number): Promise<void> {
  const { disk } = managed
  if (disk.log.bitmaps.has(bitmap)) await disk.log.edit([{ kind: 'remove', name: bitmap }])
  const target = disk.chain.layers[to]
  if (target !== undefined && target !== disk.chain.active && target.access === 'write') await target.setAccess('read')
}

/** The index of a layer: a snapshot's name, an image's path, 'active' or 'base'. Kind 'not-found'. */
export function findLayer(record: DiskRecord, word: string): number {
  if (word === 'active') return record.layers.length - 1
  if (word === 'base') return 0
  const index = record.layers.findIndex((layer) => layer.snapshot?.name === word || layer.path === word)
  if (index >= 0) return index
  const names = record.layers.flatMap((layer) => (layer.snapshot === undefined ? [] : [layer.snapshot.name]))
  const known = ['base', ...names, 'active'].join(', ')
  throw new BlockError('not-found', `disk ${record.name} has no layer ${word}; its layers are ${known}`)
}
