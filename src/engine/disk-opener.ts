// Opens a disk of the catalog: first finishes or undoes what a crash left half done, then opens the chain as the catalog has it,
// its dirty log, and serves it. Refuses when the images and the catalog disagree: somebody changed the chain meanwhile.

import path from 'node:path'
import { Mutex } from '../base/mutex.ts'
import type { Layer } from '../block/device.ts'
import { BlockError, isBlockError } from '../block/error.ts'
import { Chain } from '../chain/chain.ts'
import { Disk } from '../chain/disk.ts'
import { backingPath, type Format, isFormat, openChain, openLayer } from '../chain/open.ts'
import { DirtyLog, type DirtyLogFiles } from '../dirtylog/dirty-log.ts'
import { dataFilePath } from '../format/qcow2/data-file.ts'
import { readQcow2Info } from '../format/qcow2/image.ts'
import { warningOf } from '../host/cache-mode.ts'
import type { HostFile } from '../host/host.ts'
import { BackupLayer } from './backup-layer.ts'
import type { DiskRecord, LayerRecord } from './catalog.ts'
import { isServed } from './authority.ts'
import { layersOf } from './claims.ts'
import { nameBacking } from './commits.ts'
import { type EngineContext, imageHost, type ManagedDisk } from './context.ts'
import { settleGuest } from './distant-guests.ts'
import { backupLayerOf } from './held-backup.ts'
import { finishResize } from './resize.ts'
import { entrustBitmaps, saveBitmaps, takeBitmaps } from './internal-bitmaps.ts'
import { openExports } from './snapshot-exports.ts'
import { removeGarbage } from './snapshots.ts'

const LOG_FILES = ['log.0', 'log.1', 'slot.0', 'slot.1'] as const

/** What is special about opening a disk for the first time. */
export interface Opening {
  /** The backup that it is restored from, when that is open already. */
  readonly bottom?: BackupLayer
  /** Done before anybody can use the disk. */
  readonly beforeServing?: (disk: Disk) => Promise<void>
}

/** Opens, recovers and serves one disk. */
export async function openManagedDisk(
  context: EngineContext,
  record: DiskRecord,
  opening: Opening = {},
): Promise<ManagedDisk> {
  const active = record.layers.at(-1) as LayerRecord
  // As it was found: opening it for writing changes it.
  const found = await lineage(context, active)
  await redoBackingNames(context, record)
  const { restoring } = record
  const backup = opening.bottom ?? (restoring && backupLayerOf(context, record.name, restoring))
  const layers = await openChain({
    host: imageHost(context, record),
    path: active.path,
    format: formatOf(active),
    allowedFolders: await imageFolders(context, record),
    name: record.name,
    report: context.report,
    bottom: backup && { name: backup.path, layer: backup },
  })
  const warning = warningOf(record.cache ?? 'writeback')
  if (warning !== undefined) context.report(`${record.name}: ${warning}`)
  let log: DirtyLog | undefined
  try {
    checkAgainstCatalog(record, layers)
    const chain = new Chain(record.name, layers)
    // Before the image is opened for writing, which changes it; no other program can, since the layers are locked.
    const opened = await openLog(context, record, chain.size, found)
    log = opened.log
    if (opened.isNew) await takeBitmaps(context, record.name, chain.active, log)
    const noted = opened.lost === undefined ? record : await noteLoss(context, record, opened.lost)
    await settleGuest(context, record, opened.isClean)
    // Takes the last clean close back: from here on the images change, by snapshots and merges also without a mark.
    await log.fold()
    entrustBitmaps(chain.active, log)
    await chain.active.setAccess('write')
    const settled = await finishResize(context, noted, chain.active, log)
    if (settled !== noted) chain.replaceLayers(layers)
    await removeLeftovers(context, record, log)
    const disk = new Disk(record.name, chain, log)
    await opening.beforeServing?.(disk)
    const serving = await serveManaged(context, disk, settled)
    const exports = await openExports(context, settled)
    return { disk, ...serving, exports, control: new Mutex(), moment: new Mutex(), record: settled }
  } catch (error) {
    await closeUnserved(context, layers, log)
    throw error
  }
}

/** Serves a disk to whoever may use it: its guests, and the daemon that it comes, or came, from. */
export async function serveManaged(
  context: EngineContext,
  disk: Disk,
  record: DiskRecord,
): Promise<Pick<ManagedDisk, 'served' | 'peerServed'>> {
  const { name } = record
  const token = (record.incoming ?? record.arrival)?.token
  const peerServed =
    token === undefined ? undefined : await context.serve(disk, context.home.incomingSocket(name), token)
  if (!isServed(record)) return { served: undefined, peerServed }
  try {
    return { served: await context.serve(disk, context.home.nbdSocket(name)), peerServed }
  } catch (error) {
    await peerServed?.close()
    throw error
  }
}

/** A clean close all the same: a disk that could not be served loses nothing by that. */
async function closeUnserved(context: EngineContext, layers: readonly Layer[], log?: DirtyLog): Promise<void> {
  try {
    for (const layer of layers.toReversed()) await layer.close()
    await log?.close(await lineage(context, layers.at(-1) as Layer))
  } finally {
    await log?.abandon()
  }
}

/** Stops serving, and leaves images and log clean for any other program. */
export async function closeManagedDisk(context: EngineContext, managed: ManagedDisk): Promise<void> {
  // What is passed on may never be answered: guests ask again, there or here.
  if (managed.record.away !== undefined) {
    for (const one of [managed.served, managed.peerServed]) one?.sever()
    await managed.disk.close()
  }
  letGo(managed)
  for (const served of [...managed.exports.values(), managed.peerServed, managed.served]) await served?.close()
  await managed.disk.drain()
  if (managed.record.away === undefined) await saveBitmaps(context, managed)
  await managed.disk.close()
  await managed.disk.log.close(await lineage(context, managed.record.layers.at(-1) as LayerRecord))
}

/** Ends the waiting for a repository that is away: guests are hung up on, and ask again when the disk is served again. */
export function letGo({ disk, served }: ManagedDisk): void {
  const bottom = disk.chain.layers[0]
  if (!(bottom instanceof BackupLayer) || !bottom.isHolding) return
  served?.sever()
  bottom.letGo()
}

/** What a clean close says of the active image and its data file; another writer since then changes it. */
async function lineage({ host }: EngineContext, { path: image, format }: LayerRecord): Promise<string> {
  const status = await host.status(image)
  if (status === undefined) return ''
  const said = [image, status.identity, status.size, status.modifiedMs]
  const dataFile = format === 'qcow2' ? (await readQcow2Info(host, image)).dataFile : undefined
  if (dataFile === undefined) return JSON.stringify(said)
  const data = await host.status(dataFilePath(image, dataFile.name))
  return JSON.stringify([...said, data?.identity, data?.size, data?.modifiedMs])
}

export function formatOf(layer: LayerRecord): Format {
  if (isFormat(layer.format)) return layer.format
  throw new BlockError('unsupported', `${layer.path}: this Varve does not know the format ${layer.format}`)
}

/** A merge may have been committed to the catalog and not yet written into the header above what went. */
async function redoBackingNames(context: EngineContext, record: DiskRecord): Promise<void> {
  const rows = context.catalog.list('garbage').filter(({ disk }) => disk === record.id)
  const garbage = new Set(rows.map(({ id, keep }) => keep ?? id))
  if (garbage.size === 0) return
  for (const [index, child] of record.layers.entries()) {
    const backing = record.layers[index - 1]
    if ((await context.host.status(child.path)) === undefined) continue
    const layer = await openLayer(context.host, child.path, formatOf(child), record.name, { report: context.report })
    try {
      const reference = layer.backingReference
      if (reference === undefined) continue
      // A backup is no file: its name stands for itself.
      if (![reference.name, backingPath(child.path, reference.name)].some((name) => garbage.has(name))) continue
      await nameBacking(layer, backing)
      context.report(`${record.name}: finished a merge: ${child.path} now lies on ${backing?.path ?? 'nothing'}`)
    } finally {
      await layer.close()
    }
  }
}

/** The folders in which a disk's images lie, as far as they exist. */
export async function imageFolders(context: EngineContext, record: DiskRecord): Promise<string[]> {
  const folders = new Set(layersOf(record).map((layer) => path.dirname(layer.path)))
  const found: string[] = []
  for (const folder of folders) if ((await context.host.status(folder)) !== undefined) found.push(folder)
  return found
}

function checkAgainstCatalog(record: DiskRecord, layers: readonly Layer[]): void {
  const found = layers.map((layer) => layer.path)
  const expected = record.layers.map((layer) => layer.path)
  if (found.length === expected.length && found.every((place, index) => place === expected[index])) return
  const message =
    `disk ${record.name}: its images form the chain ${found.join(' <- ')}, the catalog has ${expected.join(' <- ')}: ` +
    `another program changed it. To go on with the images as they are: varve disk remove ${record.name}, then varve disk add`
  throw new BlockError('corrupt', message, { device: record.name })
}

interface OpenedLog {
  readonly log: DirtyLog
  /** It was made now, and has no bitmaps. */
  readonly isNew: boolean
  /** The disk was closed cleanly the last time. */
  readonly isClean: boolean
  /** Why the log had to be made anew; undefined when nothing was lost. */
  readonly lost?: string
}

/** Opens the dirty log. One that is lost or belongs to another state of the image is made anew: the next backup is a full. */
async function openLog(context: EngineContext, record: DiskRecord, size: number, found: string): Promise<OpenedLog> {
  const folder = context.home.diskFolder(record.id)
  await context.host.makeFolder(folder)
  const bootId = context.host.bootId()
  const isNew = (await context.host.status(path.join(folder, LOG_FILES[0]))) === undefined
  if (isNew) {
    const log = await createLog(context, folder, size, bootId)
    const isKnown = context.catalog.get('disk', record.id) !== undefined
    const made = { log, isNew: true }
    return isKnown
      ? { ...made, isClean: false, lost: `the dirty log in ${folder} is gone` }
      : { ...made, isClean: true }
  }
  let lost: string
  let isClean = false
  const files = await openFiles(context, folder)
  try {
    const { log, recovery, stamp } = await DirtyLog.open(files, { bootId })
    isClean = recovery === 'clean'
    const isOurs = !isClean || stamp === found
    const isResized = record.growTo !== undefined && log.size <= record.growTo
    if (isOurs && (log.size === size || isResized)) {
      if (!isClean) context.report(`${record.name}: dirty log recovered after the ${recovery} stopped`)
      for (const { name, state, durability } of log.bitmaps.values())
        if (!isClean && state === 'void' && durability !== 'host')
          context.report(
            `${record.name}: bitmap ${name} is void, it does not outlive this: all counts as changed until it is cleared`,
          )
      return { log, isNew: false, isClean }
    }
    await log.close('')
    lost = `another program changed ${(record.layers.at(-1) as LayerRecord).path} while the daemon did not run`
  } catch (error) {
    if (!isBlockError(error, 'corrupt') && !isBlockError(error, 'invalid-format')) throw error
    lost = `its dirty log was damaged: ${error.message}`
    await closeFiles(files)
  }
  return { log: await makeLogAnew(context, record, size), isNew: true, isClean, lost }
}

/** Keeps for the next backup why it must be a full. */
async function noteLoss(context: EngineContext, record: DiskRecord, reason: string): Promise<DiskRecord> {
  context.report(`${record.name}: ${reason}: its bitmaps are void and the next backup is a full`)
  const noted: DiskRecord = { ...record, bitmapsLost: { atMs: Date.now(), reason } }
  await context.catalog.commit([{ put: 'disk', record: noted }])
  return noted
}

/** A log without bitmaps, whatever was there. */
export async function makeLogAnew(context: EngineContext, record: DiskRecord, size: number): Promise<DirtyLog> {
  const folder = context.home.diskFolder(record.id)
  await context.host.makeFolder(folder)
  for (const name of LOG_FILES) await context.host.unlink(path.join(folder, name))
  return createLog(context, folder, size, context.host.bootId())
}

async function createLog(context: EngineContext, folder: string, size: number, bootId: string): Promise<DirtyLog> {
  const files = await openFiles(context, folder)
  const log = await DirtyLog.create(files, { size, bootId })
  await context.host.syncFolder(folder)
  return log
}

async function openFiles(context: EngineContext, folder: string): Promise<DirtyLogFiles> {
  const opened: HostFile[] = []
  for (const name of LOG_FILES) {
    opened.push(await context.host.open(path.join(folder, name), { write: true, create: 'if-missing', mapped: true }))
  }
  const [log0, log1, slot0, slot1] = opened as [HostFile, HostFile, HostFile, HostFile]
  return { areas: [log0, log1], slots: [slot0, slot1] }
}

async function closeFiles(files: DirtyLogFiles): Promise<void> {
  for (const file of [...files.areas, ...files.slots]) await file.close()
}

/** Removes files of ended layers that are not to stay, and the to-do sets of jobs that are no more. */
async function removeLeftovers(context: EngineContext, record: DiskRecord, log: DirtyLog): Promise<void> {
  // A new disk may not be in the catalog yet.
  const used = new Set(
    [...context.catalog.list('disk'), record].flatMap((one) => layersOf(one).map((layer) => layer.path)),
  )
  for (const garbage of context.catalog.list('garbage')) {
    if (garbage.disk === record.id && !used.has(garbage.id)) await removeGarbage(context, garbage.id)
  }
  const jobs = new Set(context.catalog.list('job').map(({ id }) => id))
  const leftover = [...log.bitmaps.keys()].filter(
    (name) => name.startsWith('job:') && !jobs.has(name.split(':')[1] as string),
  )
  if (leftover.length > 0) await log.edit(leftover.map((name) => ({ kind: 'remove' as const, name })))
}
