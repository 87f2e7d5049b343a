// The bitmaps of a disk inside its qcow2 image, where QEMU and others find them: saved there at a clean close and on request, and taken
// from there when the disk is new or another program wrote to it last. While the disk is open its dirty log alone has them: those in the
// image are marked in_use, so that after a crash nobody trusts what the image has.
//
//   open: image (consistent) -> log, when the log is new         then, and after a crash: image in_use, log right
//   close: log -> image (consistent)
//
// Varve's own, with a colon in their names, stay in the log: outside of it nobody knows what they count from.

import { DIRTYLOG_BITMAPS_MAX, USER_GRANULE_MIN } from '../base/limits.ts'
import type { Layer } from '../block/device.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import type { BitmapChange, DirtyLog, LoggedBitmap } from '../dirtylog/dirty-log.ts'
import type { BitmapInfo } from '../format/qcow2/bitmap-info.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { USER_BITMAP_META } from './backup-party.ts'
import { checkName, type EngineContext, type ManagedDisk } from './context.ts'

/**
 * Takes the bitmaps of an image that nobody here has written yet into a log that has none. What cannot be used is reported, and stays in
 * the image as it is.
 */
export async function takeBitmaps(context: EngineContext, disk: string, active: Layer, log: DirtyLog): Promise<void> {
  if (!(active instanceof Qcow2Image)) return
  const changes: BitmapChange[] = []
  for (const bitmap of active.bitmaps) {
    try {
      changes.push(await taken(active, bitmap, changes.length))
    } catch (error) {
      if (!(error instanceof BlockError)) throw error
      context.report(`${disk}: bitmap ${JSON.stringify(bitmap.name)} of ${active.path} is not used: ${error.message}`)
    }
  }
  if (changes.length === 0) return
  await log.edit(changes)
  const names = [...log.bitmaps.keys()].join(', ')
  context.report(`${disk}: took over the bitmaps of ${active.path}: ${names}`)
}

async function taken(image: Qcow2Image, { name, isRecording }: BitmapInfo, before: number): Promise<BitmapChange> {
  if (before >= DIRTYLOG_BITMAPS_MAX)
    throw new BlockError('unsupported', `a disk has at most ${DIRTYLOG_BITMAPS_MAX} bitmaps`)
  checkName('bitmap', name)
  const bits = await image.readBitmap(name)
  const granule = Math.max(bits.granule, USER_GRANULE_MIN)
  return { kind: 'add', name, granule, recording: isRecording, fill: bits.inGranules(granule), meta: USER_BITMAP_META }
}

/** Before the image is opened for writing: the log keeps these, and the image only has them marked. */
export function entrustBitmaps(active: Layer, log: DirtyLog): void {
  if (active instanceof Qcow2Image) active.entrustBitmaps(usersOf(log).map(({ name }) => name))
}

/** At the clean end of writing, when no request comes any more. What cannot be saved is reported: the disk's data do not depend on it. */
export async function saveBitmaps(context: EngineContext, { disk, record }: ManagedDisk): Promise<void> {
  const { active } = disk.chain
  if (!(active instanceof Qcow2Image) || active.access !== 'write') return
  const bitmaps = usersOf(disk.log)
  const names = new Set(bitmaps.map(({ name }) => name))
  const gone = active.entrustedBitmaps.filter((name) => !names.has(name))
  active.entrustBitmaps([])
  const edits = active.bitmapEdits
  const work = [
    ...gone.map((name) => () => removeFrom(active, name)),
    ...bitmaps.map((bitmap) => () => edits.save([toSave(bitmap)])),
  ]
  for (const step of work) {
    try {
      await step()
    } catch (error) {
      const why = (error as Error).message
      context.report(`${record.name}: not all of its bitmaps are in ${active.path}; none is lost here: ${why}`)
    }
  }
}

/**
 * Writes bitmaps into the image now, all that the user has or one, so that a clean close finds the room; until then they are marked in_use.
 * The guest waits meanwhile. Kinds: 'not-found', 'unsupported' for an image that has no bitmaps or no room for these, 'corrupt' for a void one.
 */
export function depositBitmaps(managed: ManagedDisk, name?: string): Promise<void> {
  return managed.control.run(async () => {
    const { disk } = managed
    const { active } = disk.chain
    if (!(active instanceof Qcow2Image))
      throw new BlockError('unsupported', `${active.path} is a ${active.format} image, which has no bitmaps; qcow2 has`)
    const wanted = usersOf(disk.log, true).filter((bitmap) => name === undefined || bitmap.name === name)
    if (wanted.length === 0) {
      const what = name === undefined ? 'no bitmap of yours' : `no bitmap "${name}" of yours`
      throw new BlockError('not-found', `disk ${disk.name} has ${what}: varve bitmap list ${disk.name}`)
    }
    const lost = wanted.find(({ state }) => state === 'void')
    if (lost !== undefined)
      throw new BlockError('corrupt', `bitmap ${lost.name} of disk ${disk.name} is void: varve bitmap clear, or remove`)
    await disk.drain()
    try {
      await active.bitmapEdits.deposit(wanted.map(toSave))
    } finally {
      disk.undrain()
    }
  })
}

async function removeFrom(image: Qcow2Image, name: string): Promise<void> {
  try {
    await image.bitmapEdits.remove(name)
  } catch (error) {
    if (!isBlockError(error, 'not-found')) throw error
  }
}

function usersOf(log: DirtyLog, alsoVoid = false): LoggedBitmap[] {
  return [...log.bitmaps.values()].filter(({ name, state }) => !name.includes(':') && (alsoVoid || state === 'valid'))
}

function toSave({ name, bits, recording }: LoggedBitmap): Parameters<Qcow2Image['bitmapEdits']['save']>[0][number] {
  return { name, bits, isRecording: recording }
}
