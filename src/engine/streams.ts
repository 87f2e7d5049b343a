// Live streams: which layers, what the catalog says before and after, and how a stream goes on after a restart. The copying is
// job/stream.ts.
//
// A stream ends the snapshots whose layers it pulls up, at its pivot: until then it writes into none of them. Files that Varve
// made go with them; others stay where they are, since any image may lie on them (a template, most often).

import path from 'node:path'
import type { Layer } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { Job } from '../job/job.ts'
import { runStream } from '../job/stream.ts'
import type { JobTerms } from '../job/terms.ts'
import { BACKUP_FORMAT, BackupLayer } from './backup-layer.ts'
import { type DiskRecord, garbageRow, type JobRecord, type LayerRecord, type RestoringMark } from './catalog.ts'
import { refuseClaimed, refuseExported } from './claims.ts'
import { findLayer, nameBacking, todoName } from './commits.ts'
import { refuseHeld } from './branches.ts'
import { refuseConflict } from './conflicts.ts'
import type { EngineContext, ManagedDisk } from './context.ts'
import { letGoOf } from './held-backup.ts'
import { JobTable } from './job-table.ts'
import { removeGarbage } from './snapshots.ts'

export interface StreamPlan {
  /** Indexes into the chain: the layer that stays below, -1 for none, and the one that takes what lies between. */
  readonly base: number
  readonly to: number
  /** Names of the snapshots that end. */
  readonly ends: readonly string[]
}

/** What a stream would do. `base` and `to` are snapshot names, image paths, 'active' or 'base'; by default all goes to the active layer. */
export function planStream(managed: ManagedDisk, base?: string, to = 'active'): StreamPlan {
  const { layers, name } = managed.record
  const plan = { base: base === undefined ? -1 : findLayer(managed.record, base), to: findLayer(managed.record, to) }
  if (plan.base + 1 >= plan.to) {
    const between = base === undefined ? `below ${to}` : `between --base ${base} and ${to}`
    throw new BlockError('invalid-argument', `disk ${name} has no layer ${between}: there is nothing to stream`)
  }
  const ends = layers
    .slice(plan.base + 1, plan.to)
    .flatMap(({ snapshot }) => (snapshot === undefined ? [] : [snapshot.name]))
  return { ...plan, ends }
}

/** Begins a stream as a job; the plan is made when nobody else changes the chain. Kind 'busy' while another job changes the chain. */
export function startStream(
  context: EngineContext,
  managed: ManagedDisk,
  makePlan: () => StreamPlan,
  terms: JobTerms,
): Promise<Job> {
  return managed.control.run(async () => {
    const plan = makePlan()
    const { record } = managed
    refuseConflict(context, record.name, 'stream')
    refuseHeld(record, record.layers.slice(plan.base + 1, plan.to), 'stream')
    const to = record.layers[plan.to] as LayerRecord
    // A clone leaves the layers of another disk as they are.
    const leaving = record.layers.slice(plan.base + 1, plan.to)
    const own = leaving.filter(({ of }) => of === undefined)
    refuseClaimed(context.catalog, record, [...own, to], `stream of disk ${record.name}`)
    refuseExported(record, leaving, `stream of disk ${record.name}`)
    const base = record.layers[plan.base]?.path ?? null
    const { name: disk } = record
    const isRestore = record.restoring !== undefined && base === null
    const row = JobTable.newRow(
      isRestore ? { kind: 'restore', disk, base, to: to.path } : { kind: 'stream', disk, base, to: to.path },
      terms,
    )
    await context.catalog.commit([{ put: 'job', record: row }])
    return launchStream(context, managed, row)
  })
}

/** Runs a stream, or the stream of a restore, whose row is in the catalog: a new one, or one that a restart found. */
export function launchStream(context: EngineContext, managed: ManagedDisk, row: JobRecord): Job {
  const { spec } = row
  if (spec.kind !== 'stream' && spec.kind !== 'restore')
    throw new BlockError('invalid-argument', `job ${row.id} is no stream`)
  const { restoring } = managed.record
  const from = spec.kind === 'restore' && restoring !== undefined ? fromBackup(restoring) : { base: spec.base }
  const job = JobTable.jobOf(row, { ...from, to: spec.to })
  context.jobs.launch(job, row, () => work(context, managed, row, job))
  return job
}

async function work(context: EngineContext, managed: ManagedDisk, row: JobRecord, job: Job): Promise<void> {
  const { disk } = managed
  const { spec } = row
  if (spec.kind !== 'stream' && spec.kind !== 'restore') return
  const { restoring } = managed.record
  const { layers } = managed.record
  const base = spec.base === null ? -1 : layers.findIndex((layer) => layer.path === spec.base)
  const to = layers.findIndex((layer) => layer.path === spec.to)
  if (to < 0 || (spec.base !== null && base < 0) || base + 1 >= to) {
    throw new BlockError('not-found', `job ${job.id}: the layers that it merges are no longer in the chain`)
  }
  const merged = disk.chain.layers.slice(base + 1, to)
  const [bottom] = merged
  const backup = bottom instanceof BackupLayer ? bottom : undefined
  const bitmap = todoName(row.id)
  try {
    await runStream({
      job,
      disk,
      base,
      to,
      bitmap,
      total: row.total,
      pace: context.mergePaces[spec.kind],
      source: backup?.source,
      first: backup && (() => backup.wanted.take()),
      began: (total) => {
        const record = { ...(context.catalog.get('job', row.id) ?? row), total }
        return context.catalog.commit([{ put: 'job', record }])
      },
      pivot: () => pivot(context, managed, row, base, to),
    })
  } catch (error) {
    if (!job.suspended) await undo(managed, bitmap, to)
    throw error
  }
  const left = layers.slice(base + 1, to)
  const kept = left.filter(({ made, of, format }) => made !== true && of === undefined && format !== BACKUP_FORMAT)
  job.describe({ kept: kept.map(({ path }) => path) })
  for (const layer of merged) await layer.close()
  for (const layer of left) await removeGarbage(context, garbageRow(managed.record, layer).id)
  if (restoring !== undefined && managed.record.restoring === undefined) await letGoOf(context, restoring)
}

function fromBackup({ repository, backup, disk }: RestoringMark): Readonly<Record<string, unknown>> {
  return { repository: path.basename(repository), backup, disk }
}

/** The one transaction that makes the merge take effect, and then the chain in memory and the target's header. */
async function pivot(
  context: EngineContext,
  managed: ManagedDisk,
  row: JobRecord,
  base: number,
  to: number,
): Promise<void> {
  const { disk, record } = managed
  const { restoring, ...plain } = record
  const layers = [...record.layers.slice(0, base + 1), ...record.layers.slice(to)]
  const next: DiskRecord = { ...plain, ...(base >= 0 && restoring !== undefined ? { restoring } : {}), layers }
  const garbage = record.layers.slice(base + 1, to).map((layer) => garbageRow(record, layer))
  const { layers: opened } = disk.chain
  const target = opened[to] as Layer
  if (target !== disk.chain.active) await target.setAccess('read')
  await context.catalog.commit([
    { put: 'disk', record: next },
    { remove: 'job', id: row.id },
    ...garbage.map((file) => ({ put: 'garbage' as const, record: file })),
  ])
  managed.record = next
  await disk.drain()
  try {
    disk.chain.replaceLayers([...opened.slice(0, base + 1), ...opened.slice(to)])
    await nameBacking(target, opened[base])
  } finally {
    disk.undrain()
  }
}

/** Ends a stream that failed or was cancelled: the chain goes on as it was, and what was copied does no harm. */
async function undo(managed: ManagedDisk, bitmap: string, to: number): Promise<void> {
  const { disk } = managed
  if (disk.log.bitmaps.has(bitmap)) await disk.log.edit([{ kind: 'remove', name: bitmap }])
  const target = disk.chain.layers[to]
  if (target !== undefined && target !== disk.chain.active && target.access === 'write') await target.setAccess('read')
}
