// Revert: the disk shows again what a snapshot holds, at one moment, and goes on from there in a new overlay. What lay above the
// snapshot stays beside the chain as far as snapshots name it; the present state is one of them unless it is discarded. Prepared
// before, committed in one transaction of the catalog, then applied, as a snapshot is.
//
// The guest's disk changes under it: to stop it, or to unmount, is the user's affair.

import { Bitmap } from '../bitmap/bitmap.ts'
import type { Layer } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { backingPath, openLayer } from '../chain/open.ts'
import type { BitmapChange } from '../dirtylog/changes.ts'
import type { Job } from '../job/job.ts'
import { addHidden, addOwned } from '../job/merge.ts'
import { pathTo, prune, sideOf } from './branches.ts'
import { type DiskRecord, type GarbageRecord, garbageRow, type LayerRecord, type SideLayer } from './catalog.ts'
import { refuseClaimed, refuseExported } from './claims.ts'
import { refuseConflict } from './conflicts.ts'
import { checkName, type EngineContext, imageHost, type ManagedDisk } from './context.ts'
import { formatOf } from './disk-opener.ts'
import { JobTable } from './job-table.ts'
import { checkNewSnapshot, prepareOverlay, removeGarbage } from './snapshots.ts'

/** The chain as it will be. */
interface Change {
  /** The layers of the new chain without its overlay. */
  readonly below: readonly Layer[]
  readonly overlay: Layer
  readonly next: DiskRecord
  readonly garbage: readonly GarbageRecord[]
}

/**
 * Makes the disk what a snapshot holds. The present state becomes the snapshot `keep`; without a name it is discarded. Kinds:
 * 'not-found', 'exists' for a name in use, 'busy' while a job runs on the disk.
 */
export function revertDisk(
  context: EngineContext,
  managed: ManagedDisk,
  snapshot: string,
  keep: string | undefined,
): Promise<void> {
  return managed.control.run(async () => {
    if (keep !== undefined) {
      checkName('snapshot', keep)
      checkNewSnapshot(managed.record, keep)
    }
    refuseConflict(context, managed.disk.name, 'revert')
    await goTo(context, managed, snapshot, keep)
  })
}

/** The same by the job that works on the disk; the present state is discarded. */
export function revertTo(context: EngineContext, managed: ManagedDisk, snapshot: string): Promise<void> {
  return managed.control.run(() => goTo(context, managed, snapshot, undefined))
}

async function goTo(
  context: EngineContext,
  managed: ManagedDisk,
  snapshot: string,
  keep: string | undefined,
): Promise<void> {
  const { disk, record } = managed
  const target = pathTo(record, snapshot)
  const differs = target.findIndex(({ path }, index) => record.layers[index]?.path !== path)
  const common = differs < 0 ? target.length : differs
  const gone = disk.chain.layers.slice(common)
  const opened: Layer[] = []
  try {
    for (const layer of target.slice(common)) opened.push(await openSide(context, record, layer))
    await switchTo(context, managed, target, [...disk.chain.layers.slice(0, common), ...opened], keep)
  } catch (error) {
    for (const layer of opened) await layer.close()
    throw error
  }
  for (const layer of gone.toReversed()) await layer.close()
  for (const { id, disk: owner } of context.catalog.list('garbage')) {
    if (owner === record.id) await removeGarbage(context, id)
  }
}

/** Puts a new overlay over the layers `below`, which are those of `target`, in the place of the present chain; or changes nothing. */
async function switchTo(
  context: EngineContext,
  managed: ManagedDisk,
  target: readonly LayerRecord[],
  below: readonly Layer[],
  keep: string | undefined,
): Promise<void> {
  const { overlay, prepared } = await prepareOverlay(context, managed, below.at(-1) as Layer)
  try {
    const planned = planRecord(prepared, target, overlay.path, keep)
    refuseRemoval(context, prepared, planned.garbage, `revert of disk ${prepared.name}`)
    // No backup takes its moment from here on: it would miss what is marked now, or see the disk change under it.
    await managed.moment.run(() => apply(context, managed, { below, overlay, ...planned }))
  } catch (error) {
    await overlay.close()
    await removeGarbage(context, overlay.path)
    throw error
  }
}

/** The catalog's record after the revert, and the files that nothing needs any more. */
function planRecord(
  record: DiskRecord,
  target: readonly LayerRecord[],
  overlay: string,
  keep: string | undefined,
): Pick<Change, 'next' | 'garbage'> {
  const used = new Set(target.map(({ path }) => path))
  const left = record.layers.flatMap((layer, index): SideLayer[] => {
    if (used.has(layer.path)) return []
    const isActive = index === record.layers.length - 1
    const named = isActive && keep !== undefined ? { snapshot: { name: keep, createdMs: Date.now() } } : {}
    return [{ ...layer, ...named, on: record.layers[index - 1]?.path as string }]
  })
  const beside = [...sideOf(record).filter(({ path }) => !used.has(path)), ...left]
  const side = prune(beside)
  const garbage = garbageOf(record, beside, side)
  const layers = [...target, { path: overlay, format: 'qcow2', made: true as const }]
  return { next: { ...record, layers, side }, garbage }
}

/** Opens an image that lies beside the chain. Kind 'corrupt' when its header does not name what the catalog has below it. */
async function openSide(context: EngineContext, record: DiskRecord, place: LayerRecord): Promise<Layer> {
  const layer = await openLayer(imageHost(context, record), place.path, formatOf(place), record.name)
  const { on } = sideOf(record).find(({ path }) => path === place.path) as SideLayer
  const reference = layer.backingReference
  if (reference !== undefined && backingPath(place.path, reference.name) === on) return layer
  await layer.close()
  const message = `${place.path} does not lie on ${on} as the catalog has it: another program changed it`
  throw new BlockError('corrupt', message, { path: place.path })
}

async function apply(context: EngineContext, managed: ManagedDisk, change: Change): Promise<void> {
  const { disk } = managed
  const { below, overlay, next, garbage } = change
  if (disk.intercepted) throw new BlockError('busy', `revert has to wait: a job is at work on disk ${disk.name}`)
  await markDifferences(managed, below)
  // Most of the flush happens before the guest has to wait for the rest.
  const flushed = disk.flush()
  if (flushed !== undefined) await flushed
  await disk.drain()
  try {
    const active = disk.chain.active
    await active.setAccess('read')
    try {
      await overlay.setAccess('write')
      await context.catalog.commit([
        { put: 'disk', record: next },
        { remove: 'garbage', id: overlay.path },
        ...garbage.map((record) => ({ put: 'garbage' as const, record })),
      ])
    } catch (error) {
      await active.setAccess('write')
      throw error
    }
    managed.record = next
    disk.chain.replaceLayers([...below, overlay])
  } finally {
    disk.undrain()
  }
}

/** Sets in every recording bitmap, durably, what only one of the chains holds. */
async function markDifferences({ disk }: ManagedDisk, below: readonly Layer[]): Promise<void> {
  const recording = [...disk.log.bitmaps.values()].filter((bitmap) => bitmap.recording)
  if (recording.length === 0) return
  const differs = new Bitmap(disk.size)
  const { layers } = disk.chain
  for (const [chain, other] of [
    [layers, below],
    [below, layers],
  ] as const) {
    for (const [index, layer] of chain.entries()) {
      if (layer === other[index]) continue
      await addOwned(layer, differs)
      if (index > 0) await addHidden(layer, chain[index - 1] as Layer, differs)
    }
  }
  const name = 'revert:differs'
  await disk.log.edit([
    { kind: 'add', name, recording: false, fill: differs },
    ...recording.map((bitmap): BitmapChange => ({ kind: 'merge', from: name, into: bitmap.name })),
    { kind: 'remove', name },
  ])
}

/** Deletes a snapshot beside the chain, as a job that has little to do: the layers that nothing needs any more go. */
export function dropSideSnapshot(context: EngineContext, managed: ManagedDisk, snapshot: string): Promise<Job> {
  return managed.control.run(async () => {
    const { record } = managed
    const work = `deletion of snapshot ${snapshot} of disk ${record.name}`
    refuseExported(record, pathTo(record, snapshot).slice(-1), work)
    const unnamed = sideOf(record).map((layer) =>
      layer.snapshot?.name === snapshot ? { ...layer, snapshot: undefined } : layer,
    )
    const side = prune(unnamed)
    const garbage = garbageOf(record, unnamed, side)
    refuseRemoval(context, record, garbage, work)
    const next = { ...record, side }
    await context.catalog.commit([
      { put: 'disk', record: next },
      ...garbage.map((row) => ({ put: 'garbage' as const, record: row })),
    ])
    managed.record = next
    for (const { id } of garbage) await removeGarbage(context, id)
    const path = sideOf(record).find((layer) => layer.snapshot?.name === snapshot)?.path ?? ''
    const row = JobTable.newRow({ kind: 'commit', disk: record.name, from: path, to: path })
    const job = JobTable.jobOf(row, {})
    context.jobs.launch(job, row, async () => job.move('finalizing'))
    return job
  })
}

/** Kind 'busy' when others use a file that is to be removed. */
function refuseRemoval(
  context: EngineContext,
  record: DiskRecord,
  garbage: readonly GarbageRecord[],
  work: string,
): void {
  const removed = garbage.filter(({ keep }) => keep === undefined)
  refuseClaimed(
    context.catalog,
    record,
    removed.map(({ id }) => ({ path: id })),
    work,
  )
}

/** The layers that were beside the chain and are no longer needed there. */
function garbageOf(
  record: DiskRecord,
  beside: readonly SideLayer[],
  left: readonly SideLayer[],
): readonly GarbageRecord[] {
  const stays = new Set(left.map(({ path }) => path))
  return beside.filter(({ path }) => !stays.has(path)).map((layer) => garbageRow(record, layer))
}
