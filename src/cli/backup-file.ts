// A backup of one disk into an image file, for users of qemu-img: a full, or an incremental whose backing file is the one made before it in
// the same folder. The daemon keeps a bitmap for each such folder, which counts from the newest file there; the file is known by its
// name and by its time, which is the moment of the backup, so that one that was changed or replaced since is none to go on from.
//
//   monday.qcow2 <- tuesday.qcow2 <- wednesday.qcow2        qemu-img convert wednesday.qcow2 ... is the disk of Wednesday

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import type { BodyInput } from '../api/schema.ts'
import { GRANULE, IMAGE_LANES } from '../base/limits.ts'
import { divideUp } from '../base/round.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import { type Layer, type Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { Filter } from '../block/filter.ts'
import { type Format, openChain } from '../chain/open.ts'
import type { CheckpointWish } from '../engine/checkpoints.ts'
import { realHost } from '../host/real.ts'
import { copyImage, LEFT_ALONE } from '../image/copy.ts'
import { createImage } from '../image/create.ts'
import type { AskExtents } from '../image/extent-walk.ts'
import { makeWholeFile } from '../image/whole-file.ts'
import type { NbdView } from '../job/nbd-view.ts'
import { Progress } from './progress.ts'
import { type ViewedDisk, ViewSession } from './view-session.ts'

export interface FileBackup {
  /** URI of the daemon. */
  readonly from: string
  readonly disk: string
  /** Absolute path of the image that is made. */
  readonly file: string
  readonly format: Format
  readonly full: boolean
  readonly leaseMs: number
  /** The checkpoint that the changes are counted from, and the one that its moment becomes. */
  readonly marks: CheckpointWish
}

export interface FileOutcome {
  readonly file: string
  readonly kind: 'full' | 'incremental'
  readonly reason: string
  readonly backing?: string
  readonly readBytes: number
  readonly isCompleted: boolean
}

/** A file that a bitmap counts from. */
interface EarlierFile {
  readonly name: string
  readonly format: Format
}

/** Sizes of an image are multiples of it, in bytes, and no cluster is larger than the unit that is copied. */
const UNIT = 65_536

/** Kinds: 'exists' for a file that is there, those of the view and of making images. */
export async function backUpToFile(wish: FileBackup): Promise<FileOutcome> {
  const { file } = wish
  if ((await realHost.status(file)) !== undefined)
    throw new BlockError('exists', `${file} is there already: each backup is a file of its own`, { path: file })
  const momentMs = Date.now()
  const { session, earlier, reason } = await openSession(wish, momentMs)
  const [view, ...others] = session.views
  const cancelled = new AbortController()
  const cancel = (): void => cancelled.abort()
  process.once('SIGINT', cancel)
  try {
    if (view === undefined || others.length > 0)
      throw new BlockError(
        'invalid-argument',
        `${wish.disk} has ${session.views.length} disks, and a file holds one: name it`,
      )
    const source = new AcknowledgedSource(view)
    await makeWholeFile({ host: realHost, path: file }, async (partial) => {
      await writeImage(partial, { view, source, earlier, format: wish.format, signal: cancelled.signal })
      settleFile(partial, momentMs)
    })
    const isCompleted = await session.complete()
    const kind = earlier === undefined ? 'full' : 'incremental'
    return { file, kind, reason, ...(earlier && { backing: earlier.name }), readBytes: source.readBytes, isCompleted }
  } catch (error) {
    await session.abort()
    throw error
  } finally {
    process.off('SIGINT', cancel)
    await session.close()
  }
}

interface Opened {
  readonly session: ViewSession
  readonly earlier: EarlierFile | undefined
  readonly reason: string
}

/** Asks for what changed since the newest file; where that cannot be gone on from, once more for all. */
async function openSession(wish: FileBackup, momentMs: number): Promise<Opened> {
  const { from, disk, file, format, full, leaseMs, marks } = wish
  const [folder, name] = [path.dirname(file), path.basename(file)]
  const target = {
    name: `file:${os.hostname()}:${encodeURIComponent(await realHost.realPath(folder))}`,
    moment: `${name}@${momentMs}@${format}`,
  }
  const ask = (all: boolean): Promise<ViewSession> => {
    const request: BodyInput<'openView'> = {
      disks: [disk],
      target: { ...target, ...marks, full: all ? [disk] : [] },
      whole: true,
    }
    return ViewSession.open(from, { ...request, leaseMs })
  }
  if (full || format === 'raw') {
    const reason = full ? 'asked for' : 'a raw image has no backing file'
    return { session: await ask(true), earlier: undefined, reason }
  }
  const session = await ask(false)
  const { since, reason, size } = session.disks[0] as ViewedDisk
  if (since === undefined) return { session, earlier: undefined, reason }
  const earlier = earlierFile(folder, since, size)
  if (typeof earlier !== 'string') return { session, earlier, reason: `changes since ${earlier.name}` }
  await session.abort()
  await session.close()
  if (marks.since !== undefined) {
    const { since: checkpoint, ...rest } = marks
    const usual = await openSession({ ...wish, marks: rest }, momentMs)
    return { ...usual, reason: `${usual.reason}; not since ${checkpoint}: ${earlier}` }
  }
  return { session: await ask(true), earlier: undefined, reason: earlier }
}

/** The file that the changes are relative to, or why it is none to go on from. */
function earlierFile(folder: string, since: string, size: number): EarlierFile | string {
  const [, name = '', moment = '', format = ''] = /^(.*)@(\d+)@(raw|qcow2)$/.exec(since) ?? []
  const found = fs.statSync(path.join(folder, name), { throwIfNoEntry: false })
  if (name === '') return `${since} is no file of ${folder}`
  if (found === undefined) return `the earlier backup ${name} is no longer in ${folder}`
  if (Math.floor(found.mtimeMs) !== Number(moment)) return `${name} was changed or replaced since it was made`
  if (format === 'raw' && found.size > size) return `the disk is smaller than in ${name}`
  return { name, format: format as Format }
}

interface ImageSource {
  readonly view: NbdView
  readonly source: AcknowledgedSource
  readonly earlier: EarlierFile | undefined
  readonly format: Format
  readonly signal: AbortSignal
}

async function writeImage(partial: string, { view, source, earlier, format, signal }: ImageSource): Promise<void> {
  const needed = neededOf(view, earlier)
  view.restrict(needed.inGranules(GRANULE))
  const backing = earlier === undefined ? {} : { backingName: earlier.name, backingFormat: earlier.format }
  const host = realHost
  await createImage({
    host,
    path: partial,
    format,
    settings: { size: view.size, ...backing },
    allowedFolders: [path.dirname(partial)],
  })
  const layers = await openChain({ host, path: partial, format, allowedFolders: [path.dirname(partial)] })
  const progress = new Progress('backup')
  try {
    const target = layers.at(-1) as Layer
    await target.setAccess('write')
    await copyImage({
      source,
      target,
      extents: extentsOf(view, needed),
      unit: UNIT,
      sparse: GRANULE,
      targetIsZero: earlier === undefined,
      lanes: IMAGE_LANES,
      signal,
      progress: (done, total) => progress.update(done, total),
    })
    await target.setAccess('read')
  } finally {
    progress.end()
    for (const layer of layers.toReversed()) await layer.close()
  }
}

/** What is copied: of an incremental all units that changed somewhere. */
function neededOf({ changed, size }: NbdView, earlier: EarlierFile | undefined): Bitmap {
  if (earlier !== undefined && changed !== undefined) return changed.inGranules(UNIT)
  const all = new Bitmap(size, UNIT)
  all.setAll()
  return all
}

function extentsOf(view: NbdView, needed: Bitmap): AskExtents {
  return async (offset, length, visit) => {
    const end = offset + length
    let isOver = false
    for (let at = offset; at < end && !isOver; ) {
      const index = Math.floor(at / UNIT)
      const isNeeded = needed.has(index)
      const last = divideUp(end, UNIT)
      const stop = Math.min(end, (isNeeded ? needed.nextClear(index, last) : needed.nextSet(index, last)) * UNIT)
      if (isNeeded) await view.extents(at, stop - at, (piece, extent) => !(isOver = !visit(piece, extent)))
      else isOver = !visit(stop - at, LEFT_ALONE)
      at = stop
    }
  }
}

/** The file's time says of which moment it is; all of it is on stable storage before it gets its name. */
function settleFile(partial: string, momentMs: number): void {
  const file = fs.openSync(partial, 'r+')
  try {
    fs.futimesSync(file, new Date(momentMs), new Date(momentMs))
    fs.fsyncSync(file)
  } finally {
    fs.closeSync(file)
  }
}

/** What was read is not read again: its scratch is given back. */
class AcknowledgedSource extends Filter {
  readonly #view: NbdView
  readBytes = 0

  constructor(view: NbdView) {
    super(view.device)
    this.#view = view
  }

  override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.#read(offset, length, into, at)
  }

  async #read(offset: number, length: number, into: Uint8Array, at: number): Promise<void> {
    await this.#view.read(offset, length, into, at)
    this.readBytes += length
    this.#view.release(offset, length)
  }
}
