// Live stream: copies what the layers between a base and a layer above them own up into that layer, while the guest writes,
// then pivots: the layer lies on the base, or on nothing. What the disk shows never changes, so no dirty bit is set; what the
// layer owns by then is newer, and is never copied over. The to-do set is a bitmap in the disk's log: a new run goes on with it.
//
//   top   T . . .          to do: granules 1 2        after the pivot
//   mid   a B . .
//   mid   c . C .                                     top   T B C .
//   base  d d d d                                     base  d d d d
//
// What the pivot means for the catalog and for files is the engine's: it is the `pivot` callback.

import { assert } from '../base/assert.ts'
import { roundDown, roundUp } from '../base/round.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import { type Layer, UNALLOCATED, ZERO } from '../block/device.ts'
import type { Disk } from '../chain/disk.ts'
import { linkLayers } from '../chain/open.ts'
import { PaddedFilter } from '../filter/padded.ts'
import { Copier, type CopySource } from './copier.ts'
import type { Job } from './job.ts'
import { whileMendable } from './mend.ts'
import { addHidden, addOwned, copyGranules } from './merge.ts'
import { settledIn } from './scanned-todo.ts'
import { type MergePace, Settler } from './settler.ts'
import { UnownedTarget } from './unowned-target.ts'

/** What a stream without a base copies: of the size of the target. */
export type StreamSource = CopySource & Pick<Layer, 'size'>

export interface StreamOptions {
  readonly job: Job
  readonly disk: Disk
  /**
   * The layer that stays below, -1 for none, and the layer that takes what lies between, as indexes into the disk's chain;
   * base + 1 < to.
   */
  readonly base: number
  readonly to: number
  /** Name of the to-do set in the disk's log. */
  readonly bitmap: string
  /** Bytes to do when the job was first begun; 0 for a new job. */
  readonly total: number
  readonly pace: MergePace
  /** Where the copy comes from, when that is not the disk itself: what lies below the target, by a way of its own. */
  readonly source?: StreamSource | undefined
  /** See CopierOptions. */
  readonly first?: (() => number | undefined) | undefined
  /** Told once, when the to-do set is known. */
  readonly began: (total: number) => Promise<void>
  /** Makes the merge take effect: called with the target flushed, while the guest goes on. */
  readonly pivot: () => Promise<void>
}

/** Runs the stream to its end, from wherever an earlier run left it. Ends with the job finalizing, or throws. */
export async function runStream(options: StreamOptions): Promise<void> {
  const { job, disk, bitmap } = options
  const target = disk.chain.layers[options.to] as Layer
  const copier = await attach(options, target)
  try {
    await whileMendable(job, () => target.setAccess('write'))
    await whileMendable(job, () => findTodo(options, target, copier.todo))
    await copyAll(options, target, copier)
    job.move('finalizing')
    await options.pivot()
  } catch (error) {
    // The next run begins where a clean stop ended this one; what cannot be saved now is copied again.
    if (job.suspended) await saveProgress(options, target, copier).catch(() => undefined)
    disk.detach(copier)
    linkLayers(disk.chain.layers)
    throw error
  }
  disk.detach(copier)
  await disk.log.edit([{ kind: 'remove', name: bitmap }])
}

/** Makes durable what was copied: it is no longer to do, whatever crashes. */
function saveProgress({ disk, bitmap }: StreamOptions, target: Layer, copier: Copier): Promise<void> {
  return copier.checkpoint(() => target.flush(), settledIn(disk, bitmap))
}

/** A copier with nothing to do yet, which the guest's writes pass from now on. */
async function attach(options: StreamOptions, target: Layer): Promise<Copier> {
  const { job, disk, base, to, pace } = options
  const isActive = target === disk.chain.active
  const settler = new Settler(pace, () => saveProgress(options, target, copier))
  const copier: Copier = new Copier({
    job,
    mode: 'yielding',
    piece: pace.piece,
    lanes: pace.lanes,
    idleLanes: pace.idleLanes,
    source: options.source ?? (isActive ? disk.chain : target),
    ...(options.first === undefined ? {} : { first: options.first }),
    target: new UnownedTarget({ layer: target, device: isActive ? disk.chain : target, keepsZeros: base >= 0 }),
    todo: new Bitmap(Math.min(disk.size, target.size)),
    copied: (_offset, length) => {
      job.advance(length, copier.todo.bytes)
      return settler.copied(length)
    },
  })
  // Under a drain, so that no write is in flight that does not pass the copier.
  await disk.drain()
  // Past the end of a short layer below, the target would take zeros for nothing to keep; over a longer base they are needed.
  const below = disk.chain.layers[to - 1] as Layer
  if (below.size < target.size) target.backing = new PaddedFilter(below, target.size)
  if (isActive) disk.attach(copier)
  disk.undrain()
  return copier
}

/** Fills `todo` with the to-do set in the log: that of an earlier run, or a new one. */
async function findTodo(options: StreamOptions, target: Layer, todo: Bitmap): Promise<void> {
  const { disk, job, bitmap, base, to } = options
  const { log, chain } = disk
  const saved = log.bitmaps.get(bitmap)
  if (saved !== undefined && saved.state === 'valid') {
    copyGranules(saved.bits, todo)
    // While no stream ran, zeros of the guest may have been taken for nothing to keep.
    if (base >= 0) await addHidden(chain.layers[to - 1] as Layer, chain.layers[base] as Layer, todo)
    const total = Math.max(options.total, todo.bytes)
    job.resumeFrom(total - todo.bytes, total)
    return
  }
  if (base < 0) await addShown(options.source ?? target, todo)
  else await addMerged(chain.layers.slice(base, to), todo)
  await leaveOwned(target, todo)
  // What the target owns by a write that is not flushed yet, a power loss takes away from it, and it would be copied by nobody.
  await target.flush()
  const fill = new Bitmap(disk.size)
  copyGranules(todo, fill)
  await log.edit([
    ...(saved === undefined ? [] : [{ kind: 'remove' as const, name: bitmap }]),
    { kind: 'add', name: bitmap, recording: false, fill },
  ])
  await options.began(todo.bytes)
  job.resumeFrom(0, todo.bytes)
}

/** All that a device shows and that is not zeros: without anything below, nothing else needs a place. */
async function addShown(device: Pick<Layer, 'extents'>, todo: Bitmap): Promise<void> {
  let position = 0
  await device.extents(0, todo.size, (length, extent) => {
    if ((extent & ZERO) === 0) todo.set(position, length)
    position += length
    return true
  })
}

/** What the layers over the base, which comes first, own or hide. */
async function addMerged([base, ...merged]: readonly Layer[], todo: Bitmap): Promise<void> {
  let below = base as Layer
  for (const layer of merged) {
    await addOwned(layer, todo)
    await addHidden(layer, below, todo)
    below = layer
  }
}

/** Takes out what the target owns, and widens the rest to its clusters, which it takes as a whole anyway. */
async function leaveOwned(target: Layer, todo: Bitmap): Promise<void> {
  const { clusterSize } = target
  const runs: number[] = []
  todo.runs(0, todo.size, todo.size, (offset, length) => runs.push(offset, length) > 0)
  for (let i = 0; i < runs.length; i += 2) {
    const start = roundDown(runs[i] as number, clusterSize)
    const end = roundUp((runs[i] as number) + (runs[i + 1] as number), clusterSize)
    todo.set(start, Math.min(end, todo.size) - start)
  }
  let position = 0
  await target.allocation(0, todo.size, (length, ownership) => {
    if (ownership !== UNALLOCATED) todo.clear(position, length)
    position += length
    return true
  })
}

/** Copies until nothing is left and all of it is flushed, and nobody has paused or cancelled the job. */
async function copyAll(options: StreamOptions, target: Layer, copier: Copier): Promise<void> {
  const { job } = options
  for (;;) {
    await whileMendable(job, () => copier.pass())
    assert(copier.todo.count === 0, 'what is to do only shrinks')
    await saveProgress(options, target, copier)
    if (job.state === 'running' && (await job.mayTakeEffect())) return
    await job.pausePoint(0)
  }
}
