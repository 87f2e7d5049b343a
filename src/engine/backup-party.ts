// One disk's side of a backup: how it is backed up and why, its moment, and what becomes of its bits. The backup itself
// (backups.ts) asks one party for each disk and does not know in which thread that disk lives.
//
// Each disk has one recording bitmap per repository, which says what changed since the last backup there. At the moment,
// under a drain of all disks of the backup:
//
//   backup:R  ##.#..        ->  backup:R:captured  ##.#..   (what this backup copies)
//                               backup:R           ......   (records what changes from now on)
//
// When the backup is durable the captured bits are dropped; if it fails they are put back. A backup that keeps a part of itself in
// the repository changes what that means: the captured bits are then those that the part does not have, and put back they count
// from the part.

import path from 'node:path'
import { GRANULE } from '../base/limits.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import { BlockError } from '../block/error.ts'
import type { Disk } from '../chain/disk.ts'
import { PointInTime } from '../chain/point-in-time.ts'
import { ScratchBudget } from '../chain/scratch-budget.ts'
import { ScratchMemory } from '../chain/scratch-memory.ts'
import { Scratch } from '../chain/scratch.ts'
import type { BitmapChange, LoggedBitmap } from '../dirtylog/dirty-log.ts'
import type { BackupView } from '../job/backup.ts'
import type { BackupDiskName } from '../repository/repository.ts'
import { refuseAway } from './authority.ts'
import { type EarlierBackup, type Way, wayByComparison, wayFrom } from './backup-way.ts'
import type { DiskRecord } from './catalog.ts'
import { checkpointBitmap, type CheckpointWish, refuseSecond } from './checkpoints.ts'
import { refuseConflict } from './conflicts.ts'
import type { EngineContext, ManagedDisk } from './context.ts'
import { limitsOf } from './host-limits.ts'

export interface PlanRequest {
  readonly bitmap: string
  /** A full was asked for. */
  readonly full: boolean
  /**
   * Those that the bitmap may count from, parts too, oldest first; undefined for a user's bitmap, which counts from whatever moment its
   * user knows.
   */
  readonly backups: readonly EarlierBackup[] | undefined
  readonly checkpoints?: CheckpointWish
}

/** How one disk is backed up, and why not by its changes alone. */
export interface DiskPlan extends Way {
  /** Bytes of the disk. */
  readonly size: number
  readonly bitmap: string | undefined
  /** The bitmap that says what is copied, where that is another one: a checkpoint's, which stays as it is. */
  readonly from?: string
  /** The moment becomes this checkpoint, once the backup is done. */
  readonly checkpoint?: string
  /** The bitmap counts from this moment on, once the backup is done. */
  readonly moves: boolean
  /** All of the disk can be read, not only what changed. */
  readonly whole: boolean
}

/** A disk's moment. */
export interface Captured {
  readonly view: BackupView
  /** The granules that changed since the parent; undefined for a full. */
  readonly changed: Bitmap | undefined
  /** Resolves when the swapped bitmaps are durable. */
  readonly durable: Promise<unknown>
}

/** Whether the backup became visible, so that the captured bits have been used, or not. */
export type Outcome = 'kept' | 'returned'

export interface BackupParty {
  /** The disk's name. */
  readonly disk: string
  plan(request: PlanRequest): Promise<DiskPlan>
  /** Holds the guest back until `thaw`; kind 'timeout' when its requests in flight do not end. */
  freeze(): Promise<void>
  /** Takes the moment: the disk is frozen. */
  capture(plan: DiskPlan, backup: string): Promise<Captured>
  thaw(): Promise<void>
  /** The repository has a part of the backup, which has all but `rest` of the disk's moment: should it break, bits count from there. Durable on return. */
  keepPart(bitmap: string, backup: string, part: string, rest: Bitmap): Promise<void>
  /** The bitmap is wrong: until a full by comparison is done it says nothing. Durable on return. */
  distrust(bitmap: string, backup: string, reason: string): Promise<void>
  /** Ends the view and settles the bits; a party that captured nothing for this backup has nothing to settle. */
  settle(bitmap: string | undefined, backup: string, outcome: Outcome): Promise<void>
}

/**
 * Meta of a recording bitmap: the backup or view that it counts from (USER_BITMAP_META for one that a user added), and the one that is under way,
 * from which it will count.
 */
interface RecordingMeta {
  readonly last?: string | undefined
  /** What the disk is called in that backup, where it is another name. */
  readonly disk?: string | undefined
  readonly pending?: string | undefined
  /** What is stored of that one so far. */
  readonly part?: string | undefined
  /** Why its bits are not believed. */
  readonly distrust?: string | undefined
}

/** Meta of a bitmap that a user adds. */
export const USER_BITMAP_META = metaText({ last: 'its user’s moment' })

/** Meta of a recording bitmap of a disk that is as the disk of that name in a backup. */
export function countingFrom(backup: string, disk: string): string {
  return metaText({ last: backup, disk })
}

/** What a valid bitmap of a disk's backups counts from, and its bits; undefined when that is not known, or not believed. */
export function countedFrom(
  disk: Disk,
  name: string,
): { readonly last: BackupDiskName; readonly bits: Bitmap } | undefined {
  const bitmap = disk.log.bitmaps.get(name)
  if (bitmap === undefined || bitmap.state === 'void') return undefined
  const { last, disk: there = disk.name, pending, distrust } = metaOf(bitmap.meta)
  if (last === undefined || pending !== undefined || distrust !== undefined) return undefined
  return { last: { backup: last, disk: there }, bits: bitmap.bits }
}

/** The party of a disk in this thread. */
export class LocalParty implements BackupParty {
  readonly disk: string
  readonly #context: EngineContext
  readonly #managed: ManagedDisk
  #scratch: Scratch | undefined
  #view: PointInTime | undefined
  #isFrozen = false

  constructor(context: EngineContext, managed: ManagedDisk) {
    this.disk = managed.record.name
    this.#context = context
    this.#managed = managed
  }

  /** Incremental whenever it can be; else a full, with the reason. */
  async plan({ bitmap, full, backups, checkpoints = {} }: PlanRequest): Promise<DiskPlan> {
    const known = backups === undefined ? undefined : new Map(backups.map((info) => [info.id, info]))
    const managed = this.#managed
    // A resize that is under way ends first; a later one waits for the backup, whose job is there by now.
    return managed.control.run(async () => {
      refuseAway(managed.record)
      refuseConflict(this.#context, this.disk, 'backup')
      const { since, checkpoint } = checkpoints
      if (checkpoint !== undefined) refuseSecond(managed.disk, checkpoint)
      const usual = findWay(managed, bitmap, known, full)
      const found = since === undefined ? usual : wayFromCheckpoint(managed.disk, since, known, usual)
      const marked = checkpoint === undefined ? {} : { checkpoint }
      return { size: managed.disk.size, bitmap, moves: true, whole: false, ...found, ...marked }
    })
  }

  async freeze(): Promise<void> {
    await this.#managed.moment.acquire()
    try {
      // Under the lock: a view's and a backup's scratch begin under one name.
      this.#scratch = await this.#makeScratch()
      await this.#managed.disk.drain()
    } catch (error) {
      this.#managed.moment.release()
      throw error
    }
    this.#isFrozen = true
  }

  async capture(plan: DiskPlan, backup: string): Promise<Captured> {
    const { size, bitmap, from = bitmap, checkpoint, moves, whole, parent } = plan
    const { disk } = this.#managed
    const scratch = this.#scratch
    if (scratch === undefined || !this.#isFrozen)
      throw new BlockError('timeout', `${disk.name} was let go before its moment was taken`, { device: disk.name })
    if (disk.size !== size)
      throw new BlockError('busy', `disk ${disk.name} was resized while its backup was prepared: ask again`)
    const changed = parent === undefined || from === undefined ? undefined : capturedBits(disk, from)
    const needed = whole ? undefined : changed?.copy()
    const view = new PointInTime(disk, scratch, needed ?? everything(disk))
    this.#view = view
    this.#scratch = undefined
    const counting = [
      ...(moves && bitmap !== undefined ? [bitmap] : []),
      ...(checkpoint === undefined ? [] : [checkpointBitmap(checkpoint)]),
    ]
    const changes = counting.flatMap((name) => captureChanges(this.#managed, name, backup))
    const durable = changes.length > 0 ? disk.log.edit(changes) : Promise.resolve()
    // Whoever waits for it hears of a failure; until then it is nobody's.
    durable.catch(() => undefined)
    return { view, changed, durable }
  }

  async thaw(): Promise<void> {
    if (this.#isFrozen) {
      this.#managed.disk.undrain()
      this.#managed.moment.release()
    }
    this.#isFrozen = false
    const unused = this.#scratch
    this.#scratch = undefined
    await unused?.close()
  }

  async keepPart(bitmap: string, backup: string, part: string, rest: Bitmap): Promise<void> {
    const { disk } = this.#managed
    if (isPending(disk, bitmap, backup)) await disk.log.edit(partChanges(disk, bitmap, { part, rest }))
  }

  async distrust(bitmap: string, backup: string, reason: string): Promise<void> {
    const { disk } = this.#managed
    const meta = metaOf(disk.log.bitmaps.get(bitmap)?.meta ?? '')
    if (!isPending(disk, bitmap, backup)) return
    await disk.log.edit([{ kind: 'meta', name: bitmap, meta: metaText({ ...meta, distrust: reason }) }])
  }

  async settle(bitmap: string | undefined, backup: string, outcome: Outcome): Promise<void> {
    await this.#view?.close()
    this.#view = undefined
    if (bitmap === undefined) return
    const { disk } = this.#managed
    // With the checkpoint that the backup was to become.
    const pending = pendingBackups(disk).filter((one) => one.backup === backup)
    await Promise.all(pending.map((one) => settleBits(disk, one.bitmap, backup, outcome)))
  }

  async #makeScratch(): Promise<Scratch> {
    const { host, home, scratchBudget, scratchMemory } = this.#context
    const file = path.join(home.diskFolder(this.#managed.record.id), 'scratch')
    await host.unlink(file)
    const opened = await host.open(file, { write: true, create: 'exclusive' })
    // Unlinked while open: whatever happens to the daemon, the space comes back.
    await host.unlink(file)
    const places = { memory: new ScratchMemory(GRANULE, scratchMemory), file: opened }
    return new Scratch(places, GRANULE, [ScratchBudget.of(limitsOf(this.#context).scratchBytes, 1), scratchBudget])
  }
}

/** The backups that a crash left pending on a disk: its recording bitmaps with the backup that each waits for. */
export function pendingBackups(disk: Disk): { readonly bitmap: string; readonly backup: string }[] {
  return [...disk.log.bitmaps].flatMap(([bitmap, { meta }]) => {
    if (bitmap.startsWith('job:') || isCaptured(bitmap)) return []
    const { pending } = metaOf(meta)
    return pending === undefined ? [] : [{ bitmap, backup: pending }]
  })
}

/** Drops or puts back the bits that were captured for a backup; nothing when none are. */
export async function settleBits(disk: Disk, bitmap: string, backup: string, outcome: Outcome): Promise<void> {
  if (!isPending(disk, bitmap, backup)) return
  await disk.log.edit(outcome === 'kept' ? keepChanges(disk, bitmap, backup) : returnChanges(disk, bitmap))
}

function isPending(disk: Disk, bitmap: string, backup: string): boolean {
  const recording = disk.log.bitmaps.get(bitmap)
  return recording !== undefined && metaOf(recording.meta).pending === backup
}

/** The backup that a bitmap counts from; undefined when there is none yet, or nobody but its user knows. */
export function countsFrom({ meta }: LoggedBitmap): string | undefined {
  const last = meta.startsWith('{') ? metaOf(meta).last : undefined
  return meta === USER_BITMAP_META ? undefined : last
}

/** Why the bits of this bitmap are not believed; undefined when they are. */
export function distrustOf({ meta }: LoggedBitmap): string | undefined {
  return meta.startsWith('{') ? metaOf(meta).distrust : undefined
}

function findWay(
  { disk, record }: ManagedDisk,
  name: string,
  backups: ReadonlyMap<string, EarlierBackup> | undefined,
  full: boolean,
): Way {
  if (full) return { parent: undefined, kind: 'full', reason: 'asked for' }
  const bitmap = disk.log.bitmaps.get(name)
  const no = (reason: string): Way => wayByComparison(disk, backups, reason)
  if (bitmap === undefined) {
    return no(backups === undefined ? `there was no bitmap ${name}: now there is` : whyNoBitmap(record, backups))
  }
  if (bitmap.state === 'void') return no('its bitmap is void')
  const { last, disk: there, distrust } = metaOf(bitmap.meta)
  if (distrust !== undefined) return no(distrust)
  if (last === undefined) return no('the earlier backup was not finished')
  if (backups === undefined) return { parent: last, kind: 'incremental', reason: `changes by bitmap ${name}` }
  return wayFrom(disk, backups, last, there)
}

/** Kind 'not-found' when there is no such checkpoint; where what it counts from cannot be used, the usual way, and why. */
function wayFromCheckpoint(
  disk: Disk,
  checkpoint: string,
  backups: ReadonlyMap<string, EarlierBackup> | undefined,
  usual: Way,
): Way & Pick<DiskPlan, 'from'> {
  const from = checkpointBitmap(checkpoint)
  const bitmap = disk.log.bitmaps.get(from)
  const { last } = metaOf(bitmap?.meta ?? '')
  if (bitmap === undefined || last === undefined)
    throw new BlockError(
      'not-found',
      `disk ${disk.name} has no checkpoint ${checkpoint}: varve checkpoint list ${disk.name}`,
    )
  const instead = (why: string): Way => ({ ...usual, reason: `${usual.reason}; not since ${checkpoint}: ${why}` })
  if (bitmap.state === 'void') return instead('its bitmap is void')
  const reason = `differential, changes since checkpoint ${checkpoint}: ${last}`
  // Whoever reads a view knows whether that is there.
  if (backups === undefined) return { parent: last, kind: 'incremental', from, reason }
  const way = wayFrom(disk, backups, last)
  return way.parent === undefined ? instead(way.reason) : { ...way, from, reason }
}

function whyNoBitmap({ name, bitmapsLost }: DiskRecord, backups: ReadonlyMap<string, EarlierBackup>): string {
  const isOlder = (info: EarlierBackup, atMs: number): boolean =>
    info.moment < atMs && info.disks.some((disk) => disk.name === name)
  if (bitmapsLost !== undefined && [...backups.values()].some((info) => isOlder(info, bitmapsLost.atMs)))
    return bitmapsLost.reason
  return 'no earlier backup of this disk in this repository is known'
}

function everything(disk: Disk): Bitmap {
  const bitmap = new Bitmap(disk.size)
  bitmap.setAll()
  return bitmap
}

function metaOf(text: string): RecordingMeta {
  return text === '' ? {} : (JSON.parse(text) as RecordingMeta)
}

function metaText(meta: RecordingMeta): string {
  return JSON.stringify(meta)
}

/** A bitmap of the backups to one place, that says what changed since the last one. */
export function isOfBackups(bitmap: string): boolean {
  return bitmap.startsWith('backup:') && !isCaptured(bitmap)
}

function isCaptured(name: string): boolean {
  return name.endsWith(':captured')
}

function capturedName(bitmap: string): string {
  return `${bitmap}:captured`
}

/** A bitmap's bits in granules of scratch. */
function capturedBits(disk: Disk, bitmap: string): Bitmap {
  const found = disk.log.bitmaps.get(bitmap)
  if (found === undefined) throw new BlockError('not-found', `${disk.name}: bitmap ${bitmap} is gone`)
  return found.bits.inGranules(GRANULE)
}

/** At the moment: the bits so far are set aside, and a new empty bitmap records from now on. */
function captureChanges({ disk, record }: ManagedDisk, bitmap: string, backup: string): BitmapChange[] {
  const old = disk.log.bitmaps.get(bitmap)
  const { last, disk: there, distrust } = metaOf(old?.meta ?? '')
  const meta = metaText({ last, disk: there, pending: backup, distrust })
  const fresh: BitmapChange = {
    kind: 'add',
    name: bitmap,
    granule: old?.bits.granule ?? GRANULE,
    durability: old?.durability ?? record.durability ?? 'host',
    recording: true,
    fill: 'none',
    meta,
  }
  if (old === undefined) return [fresh]
  if (last === undefined || old.state === 'void') return [{ kind: 'remove', name: bitmap }, fresh]
  // Also when a full is asked for: should it fail, the next one is an incremental as before.
  const captured = capturedName(bitmap)
  return [{ kind: 'rename', name: bitmap, to: captured }, { kind: 'record', name: captured, on: false }, fresh]
}

/** What was set aside is now what the part does not have. */
function partChanges(disk: Disk, bitmap: string, { part, rest }: { part: string; rest: Bitmap }): BitmapChange[] {
  const captured = capturedName(bitmap)
  const { last, pending } = metaOf(disk.log.bitmaps.get(bitmap)?.meta ?? '')
  const old: BitmapChange[] = disk.log.bitmaps.has(captured) ? [{ kind: 'remove', name: captured }] : []
  const fresh: BitmapChange = { kind: 'add', name: captured, recording: false, fill: rest }
  return [...old, fresh, { kind: 'meta', name: bitmap, meta: metaText({ last, pending, part }) }]
}

/** The backup is durable: the recording bitmap counts from it. */
function keepChanges(disk: Disk, bitmap: string, backup: string): BitmapChange[] {
  const captured = capturedName(bitmap)
  const meta = metaText({ last: backup })
  const kept: BitmapChange = { kind: 'meta', name: bitmap, meta }
  return disk.log.bitmaps.has(captured) ? [{ kind: 'remove', name: captured }, kept] : [kept]
}

/** The backup failed: what was set aside comes back, or there is no bitmap when there was none to count from. */
function returnChanges(disk: Disk, bitmap: string): BitmapChange[] {
  const captured = capturedName(bitmap)
  const { last: before, disk: there, part, distrust } = metaOf(disk.log.bitmaps.get(bitmap)?.meta ?? '')
  const last = part ?? before
  if (last === undefined || !disk.log.bitmaps.has(captured)) return [{ kind: 'remove', name: bitmap }]
  return [
    { kind: 'merge', from: captured, into: bitmap },
    { kind: 'remove', name: captured },
    { kind: 'meta', name: bitmap, meta: metaText({ last, disk: part === undefined ? there : undefined, distrust }) },
  ]
}
