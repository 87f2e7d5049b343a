// Copies what a frozen layer shows, where it may differ from the one below, to a target: one step of a migration. What is to do is saved
// in the disk's log, so that after a crash, or with a target that was lost and is back, the rest is copied and no more.

import type { Bitmap } from '../bitmap/bitmap.ts'
import type { BlockDevice } from '../block/device.ts'
import type { Disk } from '../chain/disk.ts'
import { Copier } from './copier.ts'
import type { Job } from './job.ts'
import type { MirrorPace } from './mirror.ts'
import { savedTodo, scanTodo, settledIn } from './scanned-todo.ts'

export interface FrozenCopyOptions {
  readonly job: Job
  /** In whose log the to-do set is. */
  readonly disk: Disk
  /** Name of the to-do set; it stays until `forget`. */
  readonly bitmap: string
  /** What the layer shows; it does not change. */
  readonly view: BlockDevice
  readonly target: BlockDevice
  readonly lanes: number
  readonly pace: MirrorPace
  /** Sets what is to do at first, in a set of the disk's size. */
  readonly scan: (todo: Bitmap) => Promise<void>
}

/** Brings the target to what the view shows, flushed. When it fails it can be run again with the target opened anew. */
export async function copyFrozen(options: FrozenCopyOptions): Promise<void> {
  const { job, disk, bitmap, view, target, lanes, pace, scan } = options
  const saved = savedTodo(disk, bitmap) ?? (await scanTodo(disk, bitmap, false, scan))
  const todo = saved.bits.resized(view.size)
  let sinceBytes = 0
  const settle = async (): Promise<void> => {
    sinceBytes = 0
    await copier.checkpoint(() => target.flush(), settledIn(disk, bitmap))
  }
  const copier = new Copier({
    job,
    source: view,
    target,
    todo,
    piece: pace.piece,
    lanes,
    copied: (_offset, length) => {
      job.advance(length, todo.bytes)
      sinceBytes += length
      return sinceBytes >= pace.settleBytes ? settle() : undefined
    },
  })
  job.expect(todo.bytes)
  try {
    await copier.pass()
  } catch (error) {
    if (job.suspended) await settle().catch(() => undefined)
    throw error
  }
  await settle()
}
