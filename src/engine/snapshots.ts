// What all that put a new overlay on a chain share, snapshots and reverts: the overlay's file, which the catalog knows as garbage
// until a chain has it; and the list of a disk's snapshots. How a snapshot is taken is in snapshot-party.ts.

import path from 'node:path'
import { BlockError, isBlockError } from '../block/error.ts'
import { backingName, openLayer } from '../chain/open.ts'
import type { Layer } from '../block/device.ts'
import { createQcow2 } from '../format/qcow2/create.ts'
import { sideOf, snapshotBelow } from './branches.ts'
import type { DiskRecord, LayerRecord } from './catalog.ts'
import { type EngineContext, imageHost, type ManagedDisk } from './context.ts'

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
