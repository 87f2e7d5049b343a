// What the bitmaps of a disk must and may have set, followed from outside: every mark of the disk's log is seen as it is made, and every
// edit at its moment, so that after a crash it can be said of each block whether its bit must be there, and whether it may be.
//
//   edit ──moment──────────durable──>     in between the bitmaps may be as before the edit or as after it, with all marks since
//   mark ──acknowledged──>                in between its bits may be there; after that they must be
//
// Users' bitmaps are known by what a command means (bitmap-commands.ts), those of backups by the backup that they count from, and that
// of a view by whether its reader said that it has all of it.

import type { BitmapChange, Durability } from '../../src/dirtylog/dirty-log.ts'
import { DIRTYLOG_REGION } from '../../src/base/limits.ts'
import { Bitmap } from '../../src/bitmap/bitmap.ts'
import type { Disk } from '../../src/chain/disk.ts'
import { BLOCK } from './versioned-guest.ts'

/** Of each block, whether it must and whether it may be set. */
export interface Bits {
  readonly must: Uint8Array
  readonly may: Uint8Array
}

export interface ModelBitmap extends Bits {
  readonly granule: number
  readonly recording: boolean
  readonly durability: Durability
}

/** The users' bitmaps, by name. */
export type World = ReadonlyMap<string, ModelBitmap>

/** The bitmap that a view reads and moves on, and that only the view's commands touch. */
export const VIEW_BITMAP = 'viewed'

/** What is known at one moment, independent of what happens after. */
export interface Known {
  /** One of these is what is there. */
  readonly worlds: readonly World[]
  /** The view's bitmap is one of these. */
  readonly viewed: readonly Bits[]
  /** By the name of a repository's bitmap, or of a checkpoint's. */
  readonly backups: ReadonlyMap<string, KnownBackups>
  /** A power loss may set too much in these regions. */
  readonly regions: ReadonlySet<number>
}

export interface KnownBackups {
  /** What changed since backups that were reported done. */
  readonly since: ReadonlyMap<string, Bits>
  /** What changed since a moment whose backup was not reported yet. */
  readonly pending: Bits | undefined
}

/**
 * A power loss sets too much in the regions that were written since the last fold but three began, in windows between syncs of slots: one in
 * which that fold's slot was written, those up to the next folds' syncs and to that of one that did not become durable, and since then.
 */
const WINDOWS = 6
/** Of the backups in one repository so many are remembered. */
const BACKUPS = 2

interface Mark {
  readonly first: number
  readonly end: number
  readonly bits: readonly Bits[]
}

export class TrackedBitmaps {
  readonly #blocks: number
  #worlds: World[] = [new Map()]
  /** What the edit of users' bitmaps means that is expected next. */
  #meaning: ((world: World) => World) | undefined
  readonly #backups = new Map<string, { since: Map<string, Bits>; pending: Bits | undefined }>()
  #viewed: Bits
  /** While a view is open, what changed since its moment; it may be all that its bitmap has once the reader is about to say so. */
  #view: { readonly since: Bits; isCompleting: boolean } | undefined
  /** Of the request that is under way. */
  #marks: Mark[] = []
  #windows: Set<number>[] = [new Set()]

  /** Sees all that happens to the log of the disk from now on. */
  constructor(disk: Disk, blocks: number) {
    this.#blocks = blocks
    this.#viewed = this.none()
    const { log } = disk
    const mark = log.mark.bind(log)
    log.mark = (offset, length) => {
      this.#mark(offset, length)
      return mark(offset, length)
    }
    const edit = log.edit.bind(log)
    log.edit = async (changes) => {
      // What it writes may be there after a crash before the call returns.
      const after = this.#edit(changes)
      try {
        await edit(changes)
      } catch (error) {
        this.#worlds = this.#worlds.filter((world) => world !== after)
        throw error
      }
      // An edit that became durable has those before it with it.
      if (after !== undefined) this.#worlds = this.#worlds.slice(this.#worlds.indexOf(after))
    }
  }

  /** The bitmaps as they are now, in memory. */
  get world(): World {
    return this.#worlds.at(-1) as World
  }

  none(): Bits {
    return { must: new Uint8Array(this.#blocks), may: new Uint8Array(this.#blocks) }
  }

  /** The next edit of users' bitmaps means this. */
  expect(meaning: (world: World) => World): void {
    this.#meaning = meaning
  }

  /** The guest's request was acknowledged. */
  acknowledged(): void {
    for (const { first, end, bits } of this.#marks) for (const { must } of bits) must.fill(1, first, end)
    this.#marks = []
  }

  /** A slot of the log is about to be synced. */
  slotSync(): void {
    this.#windows = [new Set<number>(), ...this.#windows].slice(0, WINDOWS)
  }

  /** The reader of the view is about to say that it has all. */
  completing(): void {
    if (this.#view !== undefined) this.#view.isCompleting = true
  }

  /** The view has ended; `taken` when its reader has all. */
  viewEnded(taken: boolean): void {
    if (taken && this.#view !== undefined) this.#viewed = this.#view.since
    this.#view = undefined
  }

  /** The backup whose moment was the last one in the repository with this bitmap is done. */
  backupDone(bitmap: string, id: string): void {
    const known = this.#backups.get(bitmap)
    if (known?.pending === undefined) return
    known.since.set(id, known.pending)
    known.pending = undefined
    for (const old of [...known.since.keys()].slice(0, -BACKUPS)) known.since.delete(old)
  }

  /** It is about to be removed, and may be there or not from now on. */
  forget(bitmap: string): void {
    this.#backups.delete(bitmap)
  }

  known(): Known {
    const view = this.#view
    return {
      worlds: this.#worlds.map((world) => new Map([...world].map(([name, bitmap]) => [name, copyOf(bitmap)]))),
      viewed: [this.#viewed, ...(view?.isCompleting === true ? [view.since] : [])].map(copyOf),
      backups: new Map(
        [...this.#backups].map(([name, { since, pending }]) => [
          name,
          {
            since: new Map([...since].map(([id, bits]) => [id, copyOf(bits)])),
            pending: pending === undefined ? undefined : copyOf(pending),
          },
        ]),
      ),
      regions: new Set(this.#windows.flatMap((window) => [...window])),
    }
  }

  #mark(offset: number, length: number): void {
    const first = Math.floor(offset / BLOCK)
    const end = Math.min(this.#blocks, Math.ceil((offset + length) / BLOCK))
    const bits = this.#recording
    for (const { may } of bits) may.fill(1, first, end)
    this.#marks.push({ first, end, bits })
    const last = Math.floor((offset + length - 1) / DIRTYLOG_REGION)
    for (let region = Math.floor(offset / DIRTYLOG_REGION); region <= last; region++) this.#windows[0]?.add(region)
  }

  get #recording(): Bits[] {
    const users = this.#worlds.flatMap((world) => [...world.values()].filter(({ recording }) => recording))
    const backups = [...this.#backups.values()].flatMap(({ since, pending }) => [
      ...since.values(),
      ...(pending === undefined ? [] : [pending]),
    ])
    return [...users, ...backups, this.#viewed, ...(this.#view === undefined ? [] : [this.#view.since])]
  }

  /** The moment of an edit: gives the world that it begins, if it is one of users' bitmaps. */
  #edit(changes: readonly BitmapChange[]): World | undefined {
    for (const change of changes) {
      if (change.kind !== 'add' || change.name.endsWith(':captured')) continue
      if (change.name.startsWith('revert:') && change.fill instanceof Bitmap) this.#mayHave(change.fill)
      if (/^(backup|checkpoint):/.test(change.name)) this.#newMoment(change.name)
      if (change.name === VIEW_BITMAP) this.#view = { since: this.none(), isCompleting: false }
    }
    const meaning = this.#meaning
    const isReverts = changes.some((change) => change.kind === 'add' && change.name.startsWith('revert:'))
    if (meaning === undefined || isReverts || !changes.some(isUsers)) return undefined
    this.#meaning = undefined
    const after = new Map([...meaning(this.world)].map(([name, bitmap]) => [name, copyOf(bitmap)]))
    this.#worlds.push(after)
    return after
  }

  /** A revert sets what the chains do not have in common: more than what really differs. */
  #mayHave(fill: Bitmap): void {
    for (const { may } of this.#recording)
      fill.runs(0, this.#blocks * BLOCK, fill.size, (offset, length) => {
        may.fill(1, Math.floor(offset / BLOCK), Math.ceil((offset + length) / BLOCK))
        return true
      })
  }

  #newMoment(name: string): void {
    const known = this.#backups.get(name) ?? { since: new Map<string, Bits>(), pending: undefined }
    known.pending = this.none()
    this.#backups.set(name, known)
  }
}

/** An edit that a user asked for; the view's bitmap is changed by its view alone. */
function isUsers(change: BitmapChange): boolean {
  const name = change.kind === 'merge' ? change.into : change.name
  return name !== VIEW_BITMAP && !name.includes(':')
}

function copyOf<T extends Bits>(bits: T): T {
  return { ...bits, must: bits.must.slice(), may: bits.may.slice() }
}
