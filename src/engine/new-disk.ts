// What must be true of an image that becomes a disk, and what is worth saying of it; and a new image for one.

import path from 'node:path'
import { BlockError } from '../block/error.ts'
import { type Format, openChain } from '../chain/open.ts'
import type { Durability } from '../dirtylog/dirty-log.ts'
import { createQcow2 } from '../format/qcow2/create.ts'
import { readQcow2Info } from '../format/qcow2/image.ts'
import { createRaw } from '../format/raw/raw.ts'
import type { CacheMode } from '../host/cache-mode.ts'
import { checkSocketPath } from '../nbd/uri.ts'
import type { LayerRecord } from './catalog.ts'
import { layersOf } from './claims.ts'
import { checkName, type EngineContext } from './context.ts'

/** What of a disk its user may say: writeback and host, unless told. */
export type DiskTerms = readonly [cache?: CacheMode, durability?: Durability]

/** Kinds 'invalid-argument' for what cannot be a disk's name, 'exists' for one that a disk or a machine has. */
export function checkNewDisk({ catalog, home }: EngineContext, name: string): void {
  checkName('disk', name)
  checkSocketPath(home.nbdSocket(name))
  if (catalog.get('machine', name) !== undefined)
    throw new BlockError('exists', `there is a machine ${name}: give the disk a name that no machine has`)
  if (!catalog.list('disk').some((record) => record.name === name)) return
  throw new BlockError('exists', `there is a disk ${name} already: varve disk show ${name}`)
}

/** Makes an image for a new disk. Kind 'exists' when there is something at the path. */
export async function makeImage({ host }: EngineContext, image: string, format: Format, size: number): Promise<void> {
  if ((await host.status(image)) !== undefined) {
    const message = `${image} is there already: take it with varve disk add, or name another image`
    throw new BlockError('exists', message, { path: image })
  }
  if (format === 'raw') await createRaw(host, image, size)
  else await createQcow2(host, image, { size })
}

/** The chain of an image as the catalog will have it. Checks all that opening it checks, and closes it again. */
export async function readLayers(
  { host, catalog }: EngineContext,
  name: string,
  image: string,
  format: Format,
): Promise<LayerRecord[]> {
  const refuseShared = (file: string): void => {
    const owner = catalog.list('disk').find((record) => layersOf(record).some((layer) => layer.path === file))
    if (owner === undefined) return
    const message = `disk ${name}: ${file} belongs to disk ${owner.name} already: varve disk show ${owner.name}`
    throw new BlockError('exists', message, { path: file })
  }
  const layers = await openChain({ host, path: path.resolve(image), format, name, admit: refuseShared })
  const records = layers.map((layer) => ({ path: layer.path, format: layer.format }))
  for (const layer of layers.toReversed()) await layer.close()
  return records
}

/** What whoever adds an image should know. */
export async function noteOnImage({ host }: EngineContext, image: string, format: Format): Promise<string | undefined> {
  if (format !== 'qcow2' || (await readQcow2Info(host, image)).version !== 2) return undefined
  return (
    `${image} has version 2 of qcow2: what a crash leaks there is found only by varve image check -r leaks, and zeros over ` +
    `a backing file take space. To upgrade it while no disk uses it: qemu-img amend -f qcow2 -o compat=1.1 ${image}`
  )
}
