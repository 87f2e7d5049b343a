// Live mirrors: what they are asked for and refused, what the catalog says before and after, and how one goes on after a restart
// or when its target failed. The copying is job/mirror.ts, what a target must be mirror-target.ts.
//
// A pivot takes the target into the chain in one transaction. The images that the disk leaves stay where they are, whoever made
// them; the snapshots that they were end.

import type { Bitmap } from '../bitmap/bitmap.ts'
import type { Layer } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { Format } from '../chain/open.ts'
import type { Job, JobStatus } from '../job/job.ts'
import { mend } from '../job/mend.ts'
import { addHidden, addOwned } from '../job/merge.ts'
import { type MirrorFinish, type MirrorMode, runMirror } from '../job/mirror.ts'
import { allocatedGranules } from '../job/restore.ts'
import type { JobTerms } from '../job/terms.ts'
import { refuseHeld } from './branches.ts'
import { refuseClaimed } from './claims.ts'
import type { DiskRecord, JobRecord, LayerRecord, MirrorSpec, MirrorSync } from './catalog.ts'
import { todoName } from './commits.ts'
import { refuseConflict } from './conflicts.ts'
import { type EngineContext, findDisk, type ManagedDisk } from './context.ts'
import { JobTable } from './job-table.ts'
import {
  checkPivot,
  isNbdTarget,
  makeTarget,
  type MirrorTarget,
  openTarget,
  refuseUsedTarget,
  targetPath,
} from './mirror-target.ts'
import { removeGarbage } from './snapshots.ts'

export interface MirrorRequest extends JobTerms {
  /** An absolute path, or an NBD URI. */
  readonly target: string
  /** Of an image; needed for a path. */
  readonly format?: Format | undefined
  readonly sync: MirrorSync
  readonly bitmap?: string | undefined
  readonly mode: MirrorMode
  /** Writes into what is there, instead of making an image. */
  readonly existing: boolean
  /** Ends by itself, like that, as soon as it can. */
  readonly finish?: MirrorFinish | undefined
}

/** Begins a mirror as a job. Whatever is wrong with the target is said before anything is written, and what was made is gone again. */
export function startMirror(context: EngineContext, managed: ManagedDisk, request: MirrorRequest): Promise<Job> {
  return managed.control.run(async () => {
    const { record } = managed
    refuseConflict(context, record.name, 'mirror')
    const spec = await specOf(context, managed, request)
    await refuseUsedTarget(context, record.name, spec.target)
    if (spec.finish === 'pivot') refuseLeaving(context, record, layersLeft(managed, spec))
    const row = JobTable.newRow(spec, request)
    if (!spec.made) return begin(context, managed, row)
    await context.catalog.commit([{ put: 'garbage', record: { id: spec.target, disk: record.id } }])
    try {
      await makeTarget(context, managed, spec)
      return await begin(context, managed, row)
    } catch (error) {
      await removeGarbage(context, spec.target)
      throw error
    }
  })
}

async function begin(context: EngineContext, managed: ManagedDisk, row: JobRecord): Promise<Job> {
  const target = await openTarget(context, managed, row.spec as MirrorSpec)
  try {
    await context.catalog.commit([
      { put: 'job', record: row },
      { remove: 'garbage', id: (row.spec as MirrorSpec).target },
    ])
  } catch (error) {
    await target.close()
    throw error
  }
  return launchMirror(context, managed, row, target)
}

async function specOf(context: EngineContext, managed: ManagedDisk, request: MirrorRequest): Promise<MirrorSpec> {
  const { record, disk } = managed
  const { format, sync, bitmap, mode, finish } = request
  const invalid = (message: string): BlockError => new BlockError('invalid-argument', message)
  const isNbd = isNbdTarget(request.target)
  if (isNbd && format !== undefined) throw invalid(`${request.target}: an NBD export is written as it is, without -f`)
  if (!isNbd && format === undefined)
    throw invalid(`${request.target}: say the format of the target with -f raw or -f qcow2`)
  const target = isNbd ? request.target : await targetPath(context, request.target)
  const isThere = isNbd || (await context.host.status(target)) !== undefined
  if (isThere && !isNbd && !request.existing) {
    const message = `${target} is there already: --existing writes over it, or name another target`
    throw new BlockError('exists', message, { path: target })
  }
  if (!isThere && request.existing) throw new BlockError('not-found', `the target ${target} does not exist`)
  if (!isThere && (sync === 'none' || sync === 'bitmap'))
    throw invalid(
      `a mirror with --sync ${sync} brings a copy up to date that is there: make one with --sync full first`,
    )
  if (!isThere && sync === 'top') {
    if (record.layers.length < 2) throw invalid(`disk ${disk.name} has one layer: mirror it with --sync full`)
    if (format === 'raw') throw invalid('a raw image cannot lie on another: make a target for --sync top with -f qcow2')
  }
  if ((sync === 'bitmap') !== (bitmap !== undefined)) throw invalid('--sync bitmap and --bitmap NAME go together')
  if (bitmap !== undefined) checkBitmap(managed, bitmap)
  return {
    kind: 'mirror',
    disk: record.name,
    target,
    sync,
    mode,
    made: !isThere,
    begun: false,
    ...(format === undefined ? {} : { format }),
    ...(bitmap === undefined ? {} : { bitmap }),
    ...(finish === undefined ? {} : { finish }),
  }
}

function checkBitmap({ disk }: ManagedDisk, name: string): void {
  const bitmap = disk.log.bitmaps.get(name)
  if (bitmap === undefined)
    throw new BlockError('not-found', `disk ${disk.name} has no bitmap ${name}: varve disk show ${disk.name}`)
  if (bitmap.state === 'void')
    throw new BlockError('invalid-argument', `bitmap ${name} of disk ${disk.name} is void: mirror with --sync full`)
}

/** Runs a mirror whose row is in the catalog: a new one with its open target, or one that a restart found. */
export function launchMirror(context: EngineContext, managed: ManagedDisk, row: JobRecord, target?: MirrorTarget): Job {
  const { spec } = row
  if (spec.kind !== 'mirror') throw new BlockError('invalid-argument', `job ${row.id} is no mirror`)
  const ends = layersLeft(managed, spec).flatMap(({ snapshot }) => (snapshot === undefined ? [] : [snapshot.name]))
  const job = JobTable.jobOf(row, { target: spec.target, sync: spec.sync, wanted: spec.mode, pivotEnds: ends })
  context.jobs.launch(job, row, () => work(context, managed, row, job, target))
  return job
}

/** The layers that a pivot leaves behind. */
function layersLeft({ record: { layers } }: ManagedDisk, { sync }: MirrorSpec): readonly LayerRecord[] {
  return sync === 'top' ? layers.slice(-1) : layers
}

/** Runs until the mirror ends; when its target fails, the job waits for the user, and goes on with the target opened anew. */
async function work(
  context: EngineContext,
  managed: ManagedDisk,
  row: JobRecord,
  job: Job,
  opened: MirrorTarget | undefined,
): Promise<void> {
  const current = (): MirrorSpec => (context.catalog.get('job', row.id) ?? row).spec as MirrorSpec
  let target = opened
  let left: readonly Layer[] | undefined
  try {
    for (;;) {
      try {
        target ??= await openTarget(context, managed, current())
        job.describe({ noPivot: whyNoPivot(managed, current(), target) })
        await runMirror({
          job,
          disk: managed.disk,
          target: target.device,
          bitmap: todoName(row.id),
          pace: context.mirrorPace,
          total: (context.catalog.get('job', row.id) ?? row).total,
          scan: (todo) => scan(managed, current(), todo),
          began: (total) => {
            const record = {
              ...(context.catalog.get('job', row.id) ?? row),
              total,
              spec: { ...current(), begun: true },
            }
            return context.catalog.commit([{ put: 'job', record }])
          },
          mode: () => current().mode,
          finish: () => current().finish,
          copied: () => context.catalog.commit([{ remove: 'job', id: row.id }]),
          pivot: async () => {
            left = await pivot(context, managed, row, target?.layer as Layer)
          },
        })
        break
      } catch (error) {
        if (left !== undefined) throw error
        await target?.close().catch(() => undefined)
        target = undefined
        await mend(job, error)
      }
    }
  } catch (error) {
    if (!job.suspended && left === undefined) await undo(managed, row, job)
    throw error
  }
  if (left === undefined) {
    job.describe({ holds: `the disk as it was at ${new Date().toISOString()}` })
    await target?.close()
    return
  }
  job.describe({ holds: `disk ${managed.record.name} itself`, kept: left.map(({ path }) => path) })
  for (const layer of left.toReversed()) await layer.close()
}

/** Kind 'busy' when snapshots beside the chain, clones or exports need the layers that a pivot would leave. What the disk borrows itself it may leave. */
function refuseLeaving({ catalog }: EngineContext, record: DiskRecord, layers: readonly LayerRecord[]): void {
  refuseHeld(record, layers, 'mirror --pivot')
  const own = layers.filter(({ of: owner }) => owner === undefined)
  refuseClaimed(catalog, record, own, `mirror --pivot of disk ${record.name}`)
}

/** Why the disk cannot go on at the target; undefined when it can. */
function whyNoPivot(managed: ManagedDisk, spec: MirrorSpec, { device, layer }: MirrorTarget): string | undefined {
  try {
    checkPivot(managed, spec, layer, device.size)
    return undefined
  } catch (error) {
    return (error as Error).message
  }
}

/** What is to be copied at first. */
async function scan({ disk }: ManagedDisk, spec: MirrorSpec, todo: Bitmap): Promise<void> {
  if (spec.begun && spec.sync !== 'full') {
    const message = `what was still to be mirrored of disk ${disk.name} is lost with its dirty log: begin anew with --sync full`
    throw new BlockError('corrupt', message)
  }
  const { layers } = disk.chain
  const below = layers.at(-2)
  switch (spec.sync) {
    case 'full':
      if (spec.begun || !spec.made) todo.setAll()
      else todo.or(await allocatedGranules(disk.chain))
      return
    case 'top':
      await addOwned(disk.chain.active, todo)
      if (below !== undefined) await addHidden(disk.chain.active, below, todo)
      return
    case 'bitmap': {
      const bits = disk.log.bitmaps.get(spec.bitmap ?? '')?.bits
      if (bits === undefined) throw new BlockError('corrupt', `disk ${disk.name} has no bitmap ${spec.bitmap} any more`)
      bits.runs(
        0,
        bits.size,
        bits.size,
        (offset, length) => todo.set(offset, Math.min(length, bits.size - offset)) >= 0,
      )
      return
    }
    case 'none':
  }
}

/** The one transaction after which the disk is at the target, which is equal and flushed; the disk is drained. Returns the layers left. */
async function pivot(
  context: EngineContext,
  managed: ManagedDisk,
  row: JobRecord,
  target: Layer,
): Promise<readonly Layer[]> {
  const { disk, record } = managed
  const spec = (context.catalog.get('job', row.id) ?? row).spec as MirrorSpec
  const gone = layersLeft(managed, spec)
  // Since it was asked for, snapshots may have come to lie beside the chain.
  refuseLeaving(context, record, gone)
  const active: LayerRecord = { path: target.path, format: target.format, ...(spec.made ? { made: true } : {}) }
  const below = record.layers.length - gone.length
  const next: DiskRecord = { ...record, layers: [...record.layers.slice(0, below), active] }
  await context.catalog.commit([
    { put: 'disk', record: next },
    { remove: 'job', id: row.id },
  ])
  managed.record = next
  const { layers } = disk.chain
  disk.chain.replaceLayers([...layers.slice(0, below), target])
  return layers.slice(below)
}

/** Ends a mirror that failed or was cancelled: the disk goes on as it was, and the target is no copy. */
async function undo({ disk }: ManagedDisk, row: JobRecord, job: Job): Promise<void> {
  const bitmap = todoName(row.id)
  if (disk.log.bitmaps.has(bitmap)) await disk.log.edit([{ kind: 'remove', name: bitmap }])
  const { done, total } = job.status
  const parts = done < total || total === 0 ? 'a part of the disk' : 'most of the disk, but not of one moment'
  job.describe({ holds: `${parts}: it is no copy, and stays where it is` })
}

/** Has a mirror that is ready end. Kinds 'busy' unless it is ready, or when others lie on what a pivot leaves; 'unsupported' for a target that a disk cannot go on at. */
export async function completeMirror(context: EngineContext, id: string, finish: MirrorFinish): Promise<JobStatus> {
  const { status } = context.jobs.running(id)
  const row = context.catalog.get('job', id)
  if (finish === 'pivot' && row?.spec.kind === 'mirror') {
    const why = status.details['noPivot']
    if (typeof why === 'string') throw new BlockError('unsupported', why)
    const managed = findDisk(context, row.spec.disk)
    refuseLeaving(context, managed.record, layersLeft(managed, row.spec))
  }
  return context.jobs.complete(id, finish)
}
