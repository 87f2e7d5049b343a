// Live mirror: copies a disk to a target while the guest writes, and keeps the target equal until the user has it end: with the
// target as a copy of that moment, or with the disk going on there (a pivot). The to-do set is a bitmap in the disk's log that
// records the guest's writes: a new run goes on with it, after a crash or with a target that was lost and is back.
//
//   background       what the guest writes is to do again: it never waits for the target
//   write-blocking   what it writes goes to both: the target falls no further behind
//   auto             background, until the guest dirties as much as is copied, or the end is asked for
//
// What the target is and what a pivot means for catalog and files is the engine's.

import {
  ERRORS_IN_A_ROW,
  MIRROR_BEHIND_BYTES,
  MIRROR_IDLE_LANES,
  MIRROR_LANES,
  MIRROR_LOOK_MS,
  MIRROR_SETTLE_MS,
} from '../base/limits.ts'
import { formatSize } from '../base/size.ts'
import type { Bitmap } from '../bitmap/bitmap.ts'
import type { BlockDevice, Pending } from '../block/device.ts'
import type { Disk } from '../chain/disk.ts'
import type { LoggedBitmap } from '../dirtylog/dirty-log.ts'
import { Convergence } from './convergence.ts'
import { Copier, type CopyMode } from './copier.ts'
import type { Job } from './job.ts'
import { savedTodo, scanTodo, settledIn } from './scanned-todo.ts'

export const MIRROR_MODES = ['auto', 'background', 'write-blocking'] as const
export type MirrorMode = (typeof MIRROR_MODES)[number]

/** How a mirror ends: the target stays a copy of the moment, or the disk goes on there. */
export type MirrorFinish = 'copy' | 'pivot'

/** Bytes that are copied at a time, and after how many of them progress is made durable. */
export interface MirrorPace {
  readonly piece: number
  readonly settleBytes: number
}

export interface MirrorOptions {
  readonly job: Job
  readonly disk: Disk
  /** Written only; at least as large as the disk. */
  readonly target: BlockDevice
  /** Name of the to-do set in the disk's log. */
  readonly bitmap: string
  /** Bytes to do when the job was first begun; 0 for a new job. */
  readonly total: number
  /** Sets what is to do at first, while the guest writes. */
  readonly scan: (todo: Bitmap) => Promise<void>
  /** Told once, when the to-do set is known: from here on the target is written. */
  readonly began: (total: number) => Promise<void>
  readonly pace: MirrorPace
  /** Pieces that are copied at once; MIRROR_LANES unless told. */
  readonly lanes?: number
  /** What the user wants now; after a change the job is nudged. */
  readonly mode: () => MirrorMode
  readonly finish: () => MirrorFinish | undefined
  /** Makes it known for good that the target is a copy: the to-do set, without which a restart could not go on, is dropped after it. */
  readonly copied: () => Promise<void>
  /** Called before each attempt to reach the end of a pivot, while the guest goes on. */
  readonly approach?: () => Promise<void>
  /** Called with the target equal and flushed, and the disk drained; when it fails the mirror can be run again. */
  readonly seal?: () => Promise<void>
  /** Makes a pivot take effect: called after `seal`, the disk still drained. From here on there is no way back but its own. */
  readonly pivot: () => Promise<void>
}

/**
 * Runs the mirror to its end, from wherever an earlier run left it. Ends with the job finalizing, or throws. Either way nothing is on
 * its way to the target any more; when that failed, the mirror can be run again with the target opened anew.
 */
export async function runMirror(options: MirrorOptions): Promise<void> {
  const todo = await findTodo(options)
  const { disk } = options
  // Under a drain, so that no write is in flight that the copy of the to-do set misses.
  await disk.drain()
  let mirror: Mirror
  try {
    mirror = new Mirror(options, todo)
  } finally {
    disk.undrain()
  }
  await mirror.run()
}

async function findTodo(options: MirrorOptions): Promise<LoggedBitmap> {
  const { job, disk, bitmap } = options
  const saved = savedTodo(disk, bitmap)
  if (saved === undefined) {
    const todo = await scanTodo(disk, bitmap, true, options.scan)
    const { done } = job.status
    await options.began(done + todo.bits.bytes)
    if (done > 0) job.expect(todo.bits.bytes)
    else job.resumeFrom(0, todo.bits.bytes)
    return todo
  }
  const left = saved.bits.bytes
  // The target came back, or the daemon did.
  if (job.status.done > 0) job.expect(left)
  else job.resumeFrom(Math.max(0, options.total - left), Math.max(options.total, left))
  return saved
}

class Mirror {
  readonly #options: MirrorOptions
  readonly #convergence = new Convergence()
  readonly #copier: Copier
  #sinceBytes = 0
  #sinceMs = performance.now()
  #settling = false
  #switching = false
  /** When the drain began that the end is made under. */
  #heldMs = 0

  /** The guest's writes pass here from now on. The disk is drained. */
  constructor(options: MirrorOptions, todo: LoggedBitmap) {
    const { job, disk, target, mode, pace, lanes = MIRROR_LANES } = options
    this.#options = options
    this.#copier = new Copier({
      job,
      source: disk.chain,
      target,
      todo: todo.bits.copy(),
      piece: pace.piece,
      lanes,
      idleLanes: MIRROR_IDLE_LANES,
      failures: job.onError === 'ignore' ? ERRORS_IN_A_ROW : 1,
      unit: target.can.minimumBlock,
      mode: mode() === 'write-blocking' ? 'write-both' : 'background',
      mark: (offset, length) => disk.log.mark(offset, length),
      copied: (_offset, length) => this.#copied(length),
    })
    disk.attach(this.#copier)
    job.describe({ mode: nameOf(this.#copier.mode) })
  }

  async run(): Promise<void> {
    const { job, disk, pivot, copied, bitmap } = this.#options
    try {
      const finish = await this.#follow()
      job.move('finalizing')
      if (finish === 'pivot') await this.#underDrain(pivot)
      else await copied()
    } catch (error) {
      // The next run begins where a clean stop ended this one; what cannot be saved now is copied again.
      // A pivot that was under way is nothing to save.
      if (job.suspended && job.state !== 'finalizing') await this.#settle().catch(() => undefined)
      disk.detach(this.#copier)
      await this.#copier.quiet()
      throw error
    }
    await disk.log.edit([{ kind: 'remove', name: bitmap }])
  }

  /** Keeps the target equal until the user has it end, and the end is reached: for a pivot, with the disk drained. */
  async #follow(): Promise<MirrorFinish> {
    const { job } = this.#options
    const copier = this.#copier
    for (;;) {
      await copier.pass()
      await this.#look()
      if (copier.todo.bytes > MIRROR_BEHIND_BYTES) continue
      if (job.state === 'running') await this.#settle()
      if (job.state === 'running') job.move('ready')
      // Paused or cancelled: the pass sees to that.
      if (job.state !== 'ready') continue
      const finish = this.#options.finish()
      if (finish === undefined) {
        if (copier.hasUnsettled && performance.now() - this.#sinceMs >= MIRROR_SETTLE_MS) await this.#settle()
        await job.idle(MIRROR_LOOK_MS)
      } else if (copier.todo.count === 0 && copier.mode === 'write-both' && (await this.#reachEnd(finish))) {
        return finish
      }
    }
  }

  /** The moment at which the target equals the disk; false when there is still something to do first. */
  async #reachEnd(finish: MirrorFinish): Promise<boolean> {
    const { job, disk, target } = this.#options
    if (finish === 'pivot') await this.#options.approach?.()
    // Most of the flush happens before the guest has to wait for the rest.
    await this.#settle()
    this.#heldMs = performance.now()
    await disk.drain()
    let isHeld = false
    try {
      if (this.#copier.todo.count > 0 || job.state !== 'ready') return false
      if (finish === 'pivot') {
        const flushed = target.flush()
        if (flushed !== undefined) await flushed
        await this.#options.seal?.()
        isHeld = job.state === 'ready'
        return isHeld
      }
      // What is written from here on is not the copy's. The to-do set records it still, in case the flush fails.
      disk.detach(this.#copier)
    } finally {
      if (!isHeld) disk.undrain()
    }
    const flushed = target.flush()
    if (flushed !== undefined) await flushed
    while (job.state !== 'ready') await job.pausePoint(0)
    return true
  }

  /** The disk comes drained, and is so no longer. */
  async #underDrain(pivot: () => Promise<void>): Promise<void> {
    const { disk } = this.#options
    try {
      await pivot()
      disk.detach(this.#copier)
    } finally {
      disk.undrain()
      this.#options.job.describe({ pauseMs: Math.round(performance.now() - this.#heldMs) })
    }
  }

  /** After each piece. */
  #copied(length: number): Promise<void> | undefined {
    const { job } = this.#options
    job.advance(length, this.#copier.todo.bytes)
    this.#sinceBytes += length
    const looked = this.#look()
    const isDue =
      this.#sinceBytes >= this.#options.pace.settleBytes || performance.now() - this.#sinceMs >= MIRROR_SETTLE_MS
    if (!isDue || this.#settling || job.state !== 'running') return looked
    return looked === undefined ? this.#settle() : looked.then(() => this.#settle())
  }

  /** Measures, and brings the mode about that is wanted now. */
  #look(): Promise<void> | undefined {
    const { copiedBytes, dirtiedBytes, todo, mode } = this.#copier
    if (this.#convergence.note(performance.now(), copiedBytes, dirtiedBytes, todo.bytes)) {
      this.#options.job.describe({ behind: todo.bytes, ...this.#convergence.estimate })
    }
    const wanted = this.#wanted()
    return wanted === mode || this.#switching ? undefined : this.#switchTo(wanted)
  }

  #wanted(): CopyMode {
    const wish = this.#options.mode()
    const isEnding = this.#options.job.state === 'ready' && this.#options.finish() !== undefined
    if (wish === 'write-blocking' || isEnding) return 'write-both'
    if (wish === 'background') return 'background'
    return this.#convergence.isLost ? 'write-both' : this.#copier.mode
  }

  async #switchTo(mode: CopyMode): Promise<void> {
    const { disk, job } = this.#options
    this.#switching = true
    try {
      await disk.drain()
      if (mode === 'write-both') this.#copier.writeBoth()
      else this.#copier.background()
      disk.undrain()
    } finally {
      this.#switching = false
    }
    job.describe({ mode: nameOf(mode), ...this.#reason(mode) })
  }

  /** Why the mode changed, when that was not asked for. */
  #reason(mode: CopyMode): { readonly reason?: string } {
    const { estimate, isLost } = this.#convergence
    if (mode !== 'write-both' || !isLost || estimate === undefined || this.#options.mode() !== 'auto') return {}
    const [dirty, copy] = [formatSize(Math.round(estimate.dirtyRate)), formatSize(Math.round(estimate.copyRate))]
    return { reason: `write-blocking since the guest changes ${dirty} a second, and ${copy} are copied` }
  }

  /** Makes durable what was copied: it is no longer to do, whatever crashes. */
  async #settle(): Promise<void> {
    const { disk, bitmap } = this.#options
    this.#settling = true
    this.#sinceBytes = 0
    this.#sinceMs = performance.now()
    try {
      await this.#copier.checkpoint(() => this.#flushBoth(), settledIn(disk, bitmap))
    } finally {
      this.#settling = false
    }
  }

  /**
   * The source before the target: else a power loss could take back a write of the guest whose copy is at the target for good, and
   * a pivot would bring it back long after.
   */
  async #flushBoth(): Promise<void> {
    const source = this.#options.disk.chain.flush()
    if (source !== undefined) await source
    const flushed: Pending = this.#options.target.flush()
    if (flushed !== undefined) await flushed
  }
}

function nameOf(mode: CopyMode): string {
  return mode === 'write-both' ? 'write-blocking' : 'background'
}
