// Live snapshots: under a drain the active layer is frozen and an empty overlay takes the writes. Prepared before, committed
// in one transaction of the catalog, then applied; whatever fails before the transaction is undone.

import path from 'node:path'
import { BlockError, isBlockError } from '../block/error.ts'
import { backingName, openLayer } from '../chain/open.ts'
import type { Layer } from '../block/device.ts'
import { createQcow2 } from '../format/qcow2/create.ts'
import { sideOf, snapshotBelow } from './branches.ts'
import type { DiskRecord, LayerRecord } from './catalog.ts'
import { refuseConflict } from './conflicts.ts'
import { checkName, type EngineContext, imageHost, type ManagedDisk } from './context.ts'

export interface SnapshotInfo {
  readonly name: string
  readonly createdMs: number
  /** The frozen layer. */
  readonly path: string
  /** The snapshot that it follows; undefined for the first. */
  readonly after?: string | undefined
  /** Whether the disk's present state follows it; a revert leaves snapshots beside. */
  readonly inChain: boolean
  /** Where it is exported. */
  readonly uri?: string | undefined
}

/** The snapshots of a disk: those of its chain, oldest first, then those beside it. */
export function listSnapshots({ record, exports }: ManagedDisk): SnapshotInfo[] {
  const infos = (layers: readonly LayerRecord[], inChain: boolean): SnapshotInfo[] =>
    layers.flatMap(({ path: layer, snapshot }) =>
      snapshot === undefined
        ? []
        : [
            {
              ...snapshot,
              path: layer,
              after: snapshotBelow(record, layer),
              inChain,
              uri: exports.get(snapshot.name)?.uri,
            },
          ],
    )
  return [...infos(record.layers, true), ...infos(sideOf(record), false)]
}

/** Kind 'exists' when the disk has a snapshot of that name. */
export function checkNewSnapshot(record: DiskRecord, name: string): void {
  if ([...record.layers, ...sideOf(record)].every(({ snapshot }) => snapshot?.name !== name)) return
  throw new BlockError('exists', `disk ${record.name} has a snapshot ${name} already`)
}

/** Freezes the disk's present state under a name. Kinds 'exists' for a name in use, 'busy' while layers are merged. */
export function createSnapshot(context: EngineContext, managed: ManagedDisk, name: string): Promise<SnapshotInfo> {
  checkName('snapshot', name)
  return managed.control.run(async () => {
    const { record, disk } = managed
    checkNewSnapshot(record, name)
    refuseConflict(context, disk.name, 'snapshot create')
    const { overlay, prepared } = await prepareOverlay(context, managed, disk.chain.active)
    const frozen = record.layers.at(-1) as LayerRecord
    const createdMs = Date.now()
    const layers = [
      ...record.layers.slice(0, -1),
      { ...frozen, snapshot: { name, createdMs } },
      { path: overlay.path, format: 'qcow2', made: true as const },
    ]
    const next: DiskRecord = { ...prepared, layers }
    try {
      await freeze(context, managed, overlay, next)
    } catch (error) {
      await overlay.close()
      await removeGarbage(context, overlay.path)
      throw error
    }
    return { name, createdMs, path: frozen.path, after: snapshotBelow(next, frozen.path), inChain: true }
  })
}

/** Removes a file that no chain uses, unless it is to stay, and its row, whose id is given. */
export async function removeGarbage(context: EngineContext, id: string): Promise<void> {
  if (context.catalog.get('garbage', id)?.keep === undefined) {
    await context.host.unlink(id)
    await context.host.syncFolder(path.dirname(id))
  }
  await context.catalog.commit([{ remove: 'garbage', id }])
}

/** Makes an overlay file on a layer, known to the catalog as garbage until a chain has it. */
export async function prepareOverlay(
  context: EngineContext,
  managed: ManagedDisk,
  below: Layer,
): Promise<{ overlay: Layer; prepared: DiskRecord }> {
  const { disk, record } = managed
  const overlayPath = await freePath(context, record)
  const prepared = { ...record, nextOverlay: record.nextOverlay + 1 }
  await context.catalog.commit([
    { put: 'garbage', record: { id: overlayPath, disk: record.id } },
    { put: 'disk', record: prepared },
  ])
  managed.record = prepared
  try {
    const backing = { name: backingName(overlayPath, below.path), format: below.format }
    await createQcow2(context.host, overlayPath, { size: disk.size, backing })
    return { overlay: await openLayer(imageHost(context, record), overlayPath, 'qcow2', disk.name), prepared }
  } catch (error) {
    // A file that somebody else made there meanwhile is theirs.
    if (isBlockError(error, 'exists')) await context.catalog.commit([{ remove: 'garbage', id: overlayPath }])
    else await removeGarbage(context, overlayPath)
    throw error
  }
}

/** Overlays lie beside the base image and are named after the disk, as no other disk is: vm1.varve-1.qcow2, ... */
async function freePath(context: EngineContext, record: DiskRecord): Promise<string> {
  const base = (record.layers[0] as LayerRecord).path
  const status = await context.host.status(base)
  const folder = status?.kind === 'file' ? path.dirname(base) : context.home.diskFolder(record.id)
  for (let number = record.nextOverlay; ; number++) {
    const candidate = path.join(folder, `${record.name}.varve-${number}.qcow2`)
    if ((await context.host.status(candidate)) === undefined) return candidate
  }
}

async function freeze(context: EngineContext, managed: ManagedDisk, overlay: Layer, next: DiskRecord): Promise<void> {
  const { disk } = managed
  // Most of the flush happens before the guest has to wait for the rest.
  const flushed = disk.flush()
  if (flushed !== undefined) await flushed
  await disk.drain()
  try {
    const frozen = disk.chain.active
    await frozen.setAccess('read')
    try {
      await overlay.setAccess('write')
      await context.catalog.commit([
        { put: 'disk', record: next },
        { remove: 'garbage', id: overlay.path },
      ])
    } catch (error) {
      await frozen.setAccess('write')
      throw error
    }
    managed.record = next
    disk.chain.replaceLayers([...disk.chain.layers, overlay])
  } finally {
    disk.undrain()
  }
}
