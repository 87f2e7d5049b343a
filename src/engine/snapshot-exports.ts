// A snapshot exported read-only, for another guest or program, while the disk lives on. It has its images open for itself, so that
// nothing done to the disk's chain disturbs its readers; that the images stay as they are is seen to by claims.ts. The catalog has
// the exports of a disk in the disk's record, and a restart serves them again.

import type { BlockDevice } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { Chain } from '../chain/chain.ts'
import { openChain } from '../chain/open.ts'
import { checkSocketPath } from '../nbd/uri.ts'
import { pathTo } from './branches.ts'
import { isServed } from './authority.ts'
import type { Catalog, DiskRecord, LayerRecord } from './catalog.ts'
import { refuseConflict } from './conflicts.ts'
import { type EngineContext, imageHost, type ManagedDisk, type Served } from './context.ts'
import { formatOf, imageFolders } from './disk-opener.ts'

/** Names of all NBD exports: disks that guests may use here, also those that are not open, and exported snapshots. */
export function exportNamesOf(catalog: Pick<Catalog, 'list'>): readonly string[] {
  const served = catalog.list('disk').filter(isServed)
  return served.flatMap(({ name, exports = [] }) => [name, ...exports.map((snapshot) => exportName(name, snapshot))])
}

/** The NBD export's name. No disk has one with an '@'. */
function exportName(disk: string, snapshot: string): string {
  return `${disk}@${snapshot}`
}

/** Serves a snapshot until `unexportSnapshot`; returns its URI. Kinds: 'not-found', 'exists' when it is exported already. */
export function exportSnapshot(context: EngineContext, managed: ManagedDisk, snapshot: string): Promise<string> {
  return managed.control.run(async () => {
    const { record } = managed
    const { exports = [] } = record
    pathTo(record, snapshot)
    if (exports.includes(snapshot)) {
      const message = `snapshot ${snapshot} of disk ${record.name} is exported already: varve snapshot list ${record.name}`
      throw new BlockError('exists', message)
    }
    refuseConflict(context, record.name, 'snapshot export')
    const served = await serveSnapshot(context, record, snapshot)
    const next = { ...record, exports: [...exports, snapshot] }
    try {
      await context.catalog.commit([{ put: 'disk', record: next }])
    } catch (error) {
      await served.close()
      throw error
    }
    managed.record = next
    managed.exports.set(snapshot, served)
    return served.uri
  })
}

/** Ends an export: its readers are cut off, and the layers are free again. Kind 'not-found' when there is none. */
export function unexportSnapshot(context: EngineContext, managed: ManagedDisk, snapshot: string): Promise<void> {
  return managed.control.run(async () => {
    const { record } = managed
    const { exports = [] } = record
    if (!exports.includes(snapshot)) {
      throw new BlockError('not-found', `disk ${record.name} has no export of a snapshot ${snapshot}`)
    }
    // The images first: once the record says so, others may write them.
    await managed.exports.get(snapshot)?.close()
    managed.exports.delete(snapshot)
    const next = { ...record, exports: exports.filter((name) => name !== snapshot) }
    await context.catalog.commit([{ put: 'disk', record: next }])
    managed.record = next
  })
}

/** Serves what the record of a disk says is exported; what cannot be is reported, and does not keep the disk from its guest. */
export async function openExports(context: EngineContext, record: DiskRecord): Promise<Map<string, Served>> {
  const opened = new Map<string, Served>()
  for (const snapshot of record.exports ?? []) {
    try {
      opened.set(snapshot, await serveSnapshot(context, record, snapshot))
    } catch (error) {
      context.report(`${exportName(record.name, snapshot)} cannot be exported: ${(error as Error).message}`)
    }
  }
  return opened
}

async function serveSnapshot(context: EngineContext, record: DiskRecord, snapshot: string): Promise<Served> {
  const name = exportName(record.name, snapshot)
  const socket = context.home.nbdSocket(name)
  checkSocketPath(socket)
  const top = pathTo(record, snapshot).at(-1) as LayerRecord
  const layers = await openChain({
    host: imageHost(context, record),
    path: top.path,
    format: formatOf(top),
    allowedFolders: await imageFolders(context, record),
    name,
  })
  const chain = new Chain(name, layers)
  try {
    const served = await context.serveView(chain, socket)
    return { uri: served.uri, close: () => closeBoth(served, chain), sever: () => served.sever() }
  } catch (error) {
    await chain.close()
    throw error
  }
}

async function closeBoth(served: Served, device: BlockDevice): Promise<void> {
  try {
    await served.close()
  } finally {
    await device.close()
  }
}
