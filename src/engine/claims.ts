// Named claims: who else uses a layer. A clone lies on layers of the disk that it was made of, an export shows a snapshot with all that
// it lies on. Nothing is stored beside the records that say so: a layer is held for as long as another record of the catalog
// names it, so a claim begins and ends with the transaction that changes that record. What is held is never written, merged
// away or removed, and the refusal says who holds it.
//
//   vm1    base - monday - active            base and monday are held by web, and the other way round
//                       \
//   web                  active

import { BlockError } from '../block/error.ts'
import { pathTo, sideOf } from './branches.ts'
import { BACKUP_FORMAT } from './backup-layer.ts'
import type { Catalog, DiskRecord, LayerRecord } from './catalog.ts'

/** Who holds a layer, and what would end that; as halves of a sentence. */
interface Holder {
  readonly who: string
  readonly end: string
}

/** All layers that a disk's record names. */
export function layersOf(record: DiskRecord): readonly LayerRecord[] {
  return [...record.layers, ...sideOf(record)]
}

/** Kind 'busy' when others than the disk itself use one of these layers, which the work is to change or to remove. */
export function refuseClaimed(
  catalog: Catalog,
  record: DiskRecord,
  layers: readonly { readonly path: string; readonly format?: string }[],
  work: string,
): void {
  // A backup is nobody's layer: any number of disks may be restored from it.
  const files = layers.filter(({ format }) => format !== BACKUP_FORMAT)
  for (const { path } of files) refuse(path, holdersOf(catalog, record, path), work)
}

/** Kind 'busy' when one of these layers, which the work is to take out of the disk, is shown by an export of the disk's own. */
export function refuseExported(record: DiskRecord, layers: readonly { readonly path: string }[], work: string): void {
  for (const { path } of layers) refuse(path, exportsOver(record, path), work)
}

function refuse(path: string, holders: readonly Holder[], work: string): void {
  if (holders.length === 0) return
  const who = holders.map((holder) => holder.who).join(', ')
  const ends = [...new Set(holders.map(({ end }) => end))].join('; ')
  throw new BlockError('busy', `${work} is not possible: ${path} is held by ${who}. To free it: ${ends}`, { path })
}

function holdersOf(catalog: Catalog, record: DiskRecord, path: string): Holder[] {
  const isBorrowed = layersOf(record).some((layer) => layer.path === path && layer.of !== undefined)
  return catalog.list('disk').flatMap((other): Holder[] => {
    const exports = exportsOver(other, path)
    const layer = other.id === record.id ? undefined : layersOf(other).find((one) => one.path === path)
    if (layer === undefined) return exports
    const name = other.name
    if (layer.of === undefined) return [{ who: `disk ${name}, whose layer it is`, end: leave(record.name) }, ...exports]
    const end = isBorrowed ? leave(record.name) : `${leave(name)}, or varve disk remove ${name}`
    return [{ who: `disk ${name}, a clone`, end }, ...exports]
  })
}

function leave(clone: string): string {
  return `varve stream ${clone} gives ${clone} all it needs of its own`
}

/** The exports of a disk's snapshots that show a layer. */
function exportsOver(record: DiskRecord, path: string): Holder[] {
  const over = (record.exports ?? []).filter((name) => pathTo(record, name).some((layer) => layer.path === path))
  return over.map((snapshot) => ({
    who: `the export of snapshot ${snapshot} of disk ${record.name}`,
    end: `varve snapshot unexport ${record.name} ${snapshot}`,
  }))
}
