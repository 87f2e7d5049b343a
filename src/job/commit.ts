// Live commit: copies what the layers above own down into a lower layer while the guest writes, then pivots: the lower layer
// takes their place. Until the pivot the upper layers keep their mappings and are the authority, so a crash at any point
// is harmless, and copying again too. The to-do set is a bitmap in the disk's log: a new run goes on with it.
//
//   top   . . B B .        to do: granules 2 3        after the pivot
//   base  a a a a a                                   base  a a B B a
//
// What the pivot means for the catalog and for files is the engine's: it is the `pivot` callback.

import { Bitmap } from '../bitmap/bitmap.ts'
import type { Layer } from '../block/device.ts'
import type { Disk } from '../chain/disk.ts'
import type { LoggedBitmap } from '../dirtylog/dirty-log.ts'
import { PaddedFilter } from '../filter/padded.ts'
import { Copier } from './copier.ts'
import type { Job } from './job.ts'
import { whileMendable } from './mend.ts'
import { addHidden, addOwned, copyGranules } from './merge.ts'
import { savedTodo, scanTodo, settledIn } from './scanned-todo.ts'
import { type MergePace, Settler } from './settler.ts'

export interface CommitOptions {
  readonly job: Job
  readonly disk: Disk
  /** The highest layer that goes down, and the layer that takes all, as indexes into the disk's chain; to < from. */
  readonly from: number
  readonly to: number
  /** Name of the to-do set in the disk's log. */
  readonly bitmap: string
  /** Bytes to do when the job was first begun; 0 for a new job. */
  readonly total: number
  readonly pace: MergePace
  /** Told once, when the to-do set is known. */
  readonly began: (total: number) => Promise<void>
  /** Makes the merge take effect: called with the target flushed, and the disk drained when the active layer goes down. */
  readonly pivot: () => Promise<void>
}

/** Runs the commit to its end, from wherever an earlier run left it. Ends with the job finalizing, or throws. */
export async function runCommit(options: CommitOptions): Promise<void> {
  const { job, disk } = options
  const layers = disk.chain.layers
  const target = layers[options.to] as Layer
  const isActive = options.from === layers.length - 1
  await whileMendable(job, async () => {
    await target.setAccess('write')
    // Not to the disk's own: what a snapshot shows, which the target may be from now on, keeps its size.
    const { size } = layers[options.from] as Layer
    if (target.size < size) await target.grow(size)
  })
  const todo = await findTodo(options, isActive)
  const copier = await attach(options, todo, target, isActive)
  try {
    await whileMendable(job, () => copyAll(job, copier, target, isActive ? disk : undefined))
    job.move('finalizing')
    await finish(options, copier, isActive)
  } catch (error) {
    // The next run begins where a clean stop ended this one; what cannot be saved now is copied again.
    if (job.suspended) await saveProgress(disk, todo, copier, target).catch(() => undefined)
    disk.detach(copier)
    throw error
  }
}

/** Makes durable what was copied: it is no longer to do, whatever crashes. */
function saveProgress(disk: Disk, todo: LoggedBitmap, copier: Copier, target: Layer): Promise<void> {
  return copier.checkpoint(() => flushBoth(disk, target), settledIn(disk, todo.name))
}

/** The to-do set in the log: that of an earlier run, or a new one with all that the upper layers own. */
async function findTodo(options: CommitOptions, isActive: boolean): Promise<LoggedBitmap> {
  const { disk, bitmap, job, from, to } = options
  const saved = savedTodo(disk, bitmap)
  if (saved !== undefined) {
    const total = Math.max(options.total, saved.bits.bytes)
    job.resumeFrom(total - saved.bits.bytes, total)
    return saved
  }
  const { layers } = disk.chain
  const todo = await scanTodo(disk, bitmap, isActive, async (owned) => {
    for (let index = to + 1; index <= from; index++) {
      await addOwned(layers[index] as Layer, owned)
      await addHidden(layers[index] as Layer, layers[index - 1] as Layer, owned)
    }
  })
  await options.began(todo.bits.bytes)
  job.resumeFrom(0, todo.bits.bytes)
  return todo
}

async function attach(options: CommitOptions, todo: LoggedBitmap, target: Layer, isActive: boolean): Promise<Copier> {
  const { job, disk, pace } = options
  const upper = new PaddedFilter(disk.chain.layers[options.from] as Layer, disk.size)
  const make = (): Copier => {
    const pending = new Bitmap(Math.min(disk.size, target.size))
    copyGranules(todo.bits, pending)
    const settler = new Settler(pace, () => saveProgress(disk, todo, copier, target))
    const copier: Copier = new Copier({
      job,
      piece: pace.piece,
      lanes: pace.lanes,
      idleLanes: pace.idleLanes,
      idlePiece: pace.idlePiece,
      source: isActive ? disk.chain : upper,
      target,
      todo: pending,
      mark: (offset, length) => disk.log.mark(offset, length),
      copied: (_offset, length) => {
        job.advance(length, pending.bytes)
        job.describe({ copied: copier.copiedBytes, rewritten: copier.dirtiedBytes })
        return settler.copied(length)
      },
    })
    return copier
  }
  if (!isActive) return make()
  // Under a drain, so that no write is in flight that the copy of the to-do set misses.
  await disk.drain()
  try {
    const copier = make()
    disk.attach(copier)
    return copier
  } finally {
    disk.undrain()
  }
}

/**
 * The source before the target: else a power loss could take back a write of the guest whose copy is at the target for good,
 * and the pivot would bring it back long after.
 */
async function flushBoth(disk: Disk, target: Layer): Promise<void> {
  const source = disk.chain.flush()
  if (source !== undefined) await source
  const flushed = target.flush()
  if (flushed !== undefined) await flushed
}

/**
 * Passes until nothing is left and all of it is flushed. A guest that writes is let in on both sides after the first pass, so
 * that it ends; its disk is drained on return.
 */
async function copyAll(job: Job, copier: Copier, target: Layer, guest: Disk | undefined): Promise<void> {
  for (;;) {
    await copier.pass()
    if (copier.todo.count > 0) {
      if (guest === undefined || copier.mode === 'write-both') continue
      await guest.drain()
      copier.writeBoth()
      guest.undrain()
      continue
    }
    // Most of the flush happens before the guest has to wait for the rest.
    await copier.checkpoint(() => target.flush())
    if (!(await job.mayTakeEffect())) continue
    await guest?.drain()
    try {
      await copier.drainPass()
      // What a failed flush may have lost is to do again, should the job go on after it.
      await copier.checkpoint(() => target.flush())
    } catch (error) {
      guest?.undrain()
      throw error
    }
    if (job.state === 'running') return
    // Paused or cancelled meanwhile, which the guest does not wait for.
    guest?.undrain()
    await job.pausePoint(0)
  }
}

/** The merge takes effect. The disk of an active layer comes drained, and is so no longer. */
async function finish(options: CommitOptions, copier: Copier, isActive: boolean): Promise<void> {
  const { disk } = options
  let durable: Promise<void>
  try {
    await options.pivot()
    disk.detach(copier)
    durable = disk.log.edit([{ kind: 'remove', name: options.bitmap }])
  } finally {
    if (isActive) disk.undrain()
  }
  await durable
}
