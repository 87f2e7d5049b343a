// Backup: copies a point in time of one or more disks into a repository while the guests write. The moment is already taken
// when this runs: each disk comes as a view with the granules that it needs. What is copied is released from the view at
// once, so that scratch stays small. Which bits are kept or returned afterwards is the caller's.
//
//   prove     some of what the bitmap calls unchanged is compared with the earlier backup (proof.ts); nothing is stored before
//   copy      what changed; of a full all, or what differs from an earlier backup (compared-target.ts)
//   part      now and then: what the repository has so far, for another backup to go on from if this one breaks
//   finish    what the disks had is on stable storage, then the backup is visible

import type { Bitmap } from '../bitmap/bitmap.ts'
import type { BlockDevice, Pending } from '../block/device.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { systemClock } from '../base/clock.ts'
import { BACKUP_PIECE, COPY_PIECE } from '../base/limits.ts'
import type { BackupInfo, BackupNotes, BackupWriter, DiskWriter } from '../repository/repository.ts'
import { ComparedTarget } from './compared-target.ts'
import { Copier, type CopySource, type CopyTarget } from './copier.ts'
import type { Job } from './job.ts'
import { mend } from './mend.ts'
import { chooseUnchanged, type ProofResult, type ProofWish, prove } from './proof.ts'
import { allocatedGranules } from './restore.ts'

/** A disk as it was at the moment, in this thread or in another one. */
export interface BackupView extends CopySource {
  /** Bytes. */
  readonly size: number
  /** Bytes that were saved for it in all, and the most that scratch held at one time. */
  readonly savedBytes: number
  readonly scratchPeak: number
  /** Why it can be read no longer; never set where that is not known here. */
  readonly broken?: BlockError | undefined
  /** Only these granules are read after all. */
  restrict(needed: Bitmap): void
  /** The backup has the range: it is not read again. */
  release(offset: number, length: number): void
  /** Puts what the disk had at the moment on stable storage. */
  flushDisk(): Pending
  close(): Promise<void>
}

export interface BackupDisk {
  readonly name: string
  readonly view: BackupView
  /** The granules that changed since the parent; undefined for a full, which finds what is allocated by itself. */
  readonly changed: Bitmap | undefined
  /** The disk as an earlier backup has it: a full is compared with that, and a bitmap is proved by it. */
  readonly before?: BlockDevice | undefined
}

/** When what a backup has so far is kept, should it break: after so many milliseconds and bytes; and when it breaks, so many bytes. */
export interface PartPace {
  readonly everyMs: number
  readonly everyBytes: number
  readonly lastBytes: number
}

export interface Parts {
  readonly pace: PartPace
  /** Durable in the repository is a part, which has of each disk, in their order, all but the rest. */
  kept(part: BackupInfo, rest: readonly Bitmap[]): Promise<void>
}

export interface BackupOptions {
  readonly disks: readonly BackupDisk[]
  readonly writer: BackupWriter
  /** What the backup says of itself. */
  readonly notes: BackupNotes
  /** Proves the bitmaps of the disks that have one and an earlier backup. */
  readonly proof?: ProofWish | undefined
  /** A proof has found the bitmap of the disk of that number to be wrong: its bits are to be believed no longer. */
  readonly distrust?: (disk: number, reason: string) => Promise<void>
  /** None are kept unless given. */
  readonly parts?: Parts | undefined
}

export interface BackupResult {
  readonly info: BackupInfo
  readonly readBytes: number
}

/** Copies all disks and makes the backup visible. On failure the writer is aborted and nothing is visible. */
export async function runBackup(job: Job, options: BackupOptions): Promise<BackupResult> {
  const run = new BackupRun(job, options)
  try {
    return await run.go()
  } catch (error) {
    await run.keepLast(error)
    await options.writer.abort()
    throw error
  }
}

class BackupRun {
  readonly #job: Job
  readonly #options: BackupOptions
  /** Of each disk what is to copy, and what is to prove. */
  readonly #todos: Bitmap[] = []
  readonly #chosen: (Bitmap | undefined)[] = []
  readonly #proofs: (ProofResult | undefined)[] = []
  #readBytes = 0
  #sinceBytes = 0
  #sinceMs = systemClock.now()

  constructor(job: Job, options: BackupOptions) {
    this.#job = job
    this.#options = options
  }

  async go(): Promise<BackupResult> {
    const { disks, writer, proof } = this.#options
    for (const disk of disks) await this.#plan(disk)
    this.#job.expect(this.#left)
    if (proof !== undefined) for (const index of disks.keys()) await this.#prove(index, proof)
    for (const index of disks.keys()) await this.#copy(index, writer.disk(index))
    // All of it but what makes it visible: whatever the store has no room for is met while the job can still wait for it.
    await writer.store()
    while (!(await this.#job.mayTakeEffect())) continue
    await this.#job.pausePoint(0)
    this.#job.move('finalizing')
    await this.#flushDisks()
    return { info: await writer.finish(this.#notes), readBytes: this.#readBytes }
  }

  /** What was copied is not lost with the backup, unless its user gave it up or the repository is what failed. */
  async keepLast(error: unknown): Promise<void> {
    const { parts } = this.#options
    if (parts === undefined || this.#sinceBytes < parts.pace.lastBytes || isBlockError(error, 'cancelled')) return
    // Should it fail too, the part before counts, or the bits as they were.
    await this.#keep(parts).catch(() => undefined)
  }

  async #plan({ view, changed, before }: BackupDisk): Promise<void> {
    const todo = changed?.copy() ?? (await allocatedGranules(view))
    if (changed === undefined && before !== undefined) {
      // What it had and the disk has not is zeros now.
      const end = Math.min(before.size, view.size)
      const held = await allocatedGranules(before)
      held.runs(0, end, end, (offset, length) => todo.set(offset, length) >= 0)
    }
    const { proof } = this.#options
    const provable = proof !== undefined && changed !== undefined && before !== undefined
    const chosen = provable ? chooseUnchanged(changed, proof) : undefined
    const needed = todo.copy()
    if (chosen !== undefined) needed.or(chosen)
    view.restrict(needed)
    this.#todos.push(todo)
    this.#chosen.push(chosen)
  }

  get #left(): number {
    return [...this.#todos, ...this.#chosen].reduce((sum, granules) => sum + (granules?.bytes ?? 0), 0)
  }

  get #notes(): BackupNotes {
    const { notes, disks } = this.#options
    const labels = disks.map((_disk, index) => ({ ...notes.disks?.[index], ...labelsOf(this.#proofs[index]) }))
    return { ...notes, disks: labels }
  }

  /** Kind 'corrupt' when the bitmap of the disk is wrong. */
  async #prove(index: number, wish: ProofWish): Promise<void> {
    const { name, view, before } = this.#options.disks[index] as BackupDisk
    const chosen = this.#chosen[index]
    if (chosen === undefined || before === undefined) return
    const unproved = chosen.copy()
    this.#chosen[index] = unproved
    const proved = (offset: number, length: number): void => {
      view.release(offset, length)
      unproved.clear(offset, length)
      this.#job.advance(length, this.#left)
    }
    const source = mendedSource(this.#job, view)
    const result = await prove({ job: this.#job, view: source, before, chosen, wish, proved })
    this.#proofs[index] = result
    this.#job.describe({ proofs: this.#proofs.map((one) => one ?? null) })
    const { readBytes, differentBytes, firstAt } = result
    if (firstAt === undefined) return
    const found = `of ${readBytes} bytes that its bitmap calls unchanged ${differentBytes} differ from the earlier backup, first at ${firstAt}`
    await this.#options.distrust?.(index, `a proof failed: ${found}`)
    const advice =
      'the bitmap is not trusted any more: the next backup is a full by comparison. Earlier incrementals may be wrong too: varve verify --against'
    throw new BlockError('corrupt', `disk ${name}: ${found}; ${advice}`, { device: name, offset: firstAt })
  }

  async #copy(index: number, sink: DiskWriter): Promise<void> {
    const { name, view, changed, before } = this.#options.disks[index] as BackupDisk
    const todo = this.#todos[index] as Bitmap
    const stored: CopyTarget = {
      write: (offset, length, from, at) => sink.write(offset, length, from, at),
      zero: (offset, length) => sink.zero(offset, length),
    }
    const copier = new Copier({
      job: this.#job,
      source: mendedSource(this.#job, view),
      target: changed === undefined && before !== undefined ? new ComparedTarget(stored, before) : stored,
      todo,
      piece: BACKUP_PIECE,
      idlePiece: COPY_PIECE,
      copied: (offset, length) => {
        view.release(offset, length)
        this.#job.advance(length, this.#left)
        this.#job.describe({ scratchPeak: view.scratchPeak, scratchSaved: view.savedBytes })
        this.#sinceBytes += length
        return this.#keepSometimes()
      },
    })
    try {
      await copier.pass()
    } finally {
      this.#readBytes += copier.readBytes
      this.#job.describe({ readBytes: this.#readBytes })
    }
    // Nothing re-marks a backup's to-do set: one pass is all, and what it left would be missing from the backup.
    if (todo.count !== 0) throw new BlockError('io', `${name}: ${todo.bytes} bytes were not copied`)
  }

  #keepSometimes(): Promise<void> | undefined {
    const { parts } = this.#options
    if (parts === undefined || this.#sinceBytes < parts.pace.everyBytes) return undefined
    return systemClock.now() - this.#sinceMs < parts.pace.everyMs ? undefined : this.#keep(parts)
  }

  /**
   * A visible backup, or a part of one, ends the marks of what it holds. Were a write that it holds still to be lost with the power, the
   * disk would differ from it without a mark: so what the disk had at the moment is on stable storage first.
   */
  async #flushDisks(): Promise<void> {
    for (const { view } of this.#options.disks) {
      const flushed = view.flushDisk()
      if (flushed !== undefined) await flushed
    }
  }

  async #keep(parts: Parts): Promise<void> {
    const part = await this.#options.writer.keepPart()
    await this.#flushDisks()
    await parts.kept(part, this.#todos)
    this.#sinceBytes = 0
    this.#sinceMs = systemClock.now()
  }
}

/** What the record says of a proof. */
function labelsOf(proof: ProofResult | undefined): Record<string, string> {
  if (proof === undefined) return {}
  return { proved: `${proof.percent} %`, provedSeed: String(proof.seed), provedBytes: String(proof.readBytes) }
}

/**
 * The view, of which a range that cannot be read is read again when the job's policy says so: what is stored has to come in order, so
 * nothing goes past it. Scratch that is used up is the end of a view, which no room mends.
 */
function mendedSource(job: Job, view: BackupView): CopySource {
  return {
    read: async (offset, length, into, at) => {
      for (;;) {
        try {
          return await view.read(offset, length, into, at)
        } catch (error) {
          if (isBlockError(error, 'no-space')) throw error
          await mend(job, error)
        }
      }
    },
    extents: (offset, length, visit) => view.extents(offset, length, visit),
  }
}
