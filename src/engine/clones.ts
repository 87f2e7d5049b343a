// Clones: a new disk over the layer of a snapshot, which two chains then share. Made at once, whatever the size: an empty overlay
// and a record in the catalog, in one transaction. The shared layers stay the other disk's; claims.ts keeps both from changing
// them for as long as both use them.

import { randomBytes } from 'node:crypto'
import path from 'node:path'
import { BlockError } from '../block/error.ts'
import { backingName, openLayer } from '../chain/open.ts'
import { createQcow2 } from '../format/qcow2/create.ts'
import { pathTo } from './branches.ts'
import type { DiskRecord, LayerRecord } from './catalog.ts'
import { type EngineContext, imageHost, type ManagedDisk } from './context.ts'
import { formatOf } from './disk-opener.ts'
import { removeGarbage } from './snapshots.ts'

/**
 * Makes the image of a clone, at `image` or beside the origin's base, and returns the record that the new disk will have. Until a
 * transaction has that record the image is known as garbage. Kinds: 'not-found' for the snapshot, 'exists' for the image.
 */
export async function prepareClone(
  context: EngineContext,
  origin: ManagedDisk,
  snapshot: string,
  name: string,
  image: string | undefined,
): Promise<DiskRecord> {
  const { record } = origin
  const shared = pathTo(record, snapshot)
  const top = shared.at(-1) as LayerRecord
  const file = image ?? (await besideBase(context, record, name))
  if ((await context.host.status(file)) !== undefined) {
    throw new BlockError('exists', `${file} is there already: name another image for the clone`, { path: file })
  }
  await context.catalog.commit([{ put: 'garbage', record: { id: file, disk: record.id } }])
  try {
    const layer = await openLayer(imageHost(context, record), top.path, formatOf(top), name)
    const { size } = layer
    await layer.close()
    const backing = { name: backingName(file, top.path), format: top.format }
    await createQcow2(context.host, file, { size, backing })
  } catch (error) {
    await removeGarbage(context, file)
    throw error
  }
  const borrowed = shared.map((layer, index): LayerRecord => {
    const { path: layerPath, format, of = record.name } = layer
    const isTop = index === shared.length - 1
    return { path: layerPath, format, of, ...(isTop ? { snapshot: layer.snapshot } : {}) }
  })
  return {
    id: randomBytes(8).toString('hex'),
    name,
    layers: [...borrowed, { path: file, format: 'qcow2', made: true }],
    addedMs: Date.now(),
    nextOverlay: 1,
    cache: record.cache ?? 'writeback',
  }
}

async function besideBase(context: EngineContext, record: DiskRecord, name: string): Promise<string> {
  const base = (record.layers[0] as LayerRecord).path
  const status = await context.host.status(base)
  const folder = status?.kind === 'file' ? path.dirname(base) : context.home.diskFolder(record.id)
  return path.join(folder, `${name}.qcow2`)
}
