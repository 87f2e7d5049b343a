// The tree of a disk's layers. A revert leaves what lay above the snapshot beside the chain: each such layer knows on which it
// lies. Here are the questions about that tree; it changes nothing.
//
//   base - monday - tuesday - before        beside the chain after a revert to monday
//               \
//                 active                    the chain: base, monday, active

import { BlockError } from '../block/error.ts'
import type { DiskRecord, LayerRecord, SideLayer } from './catalog.ts'

/** The layers from the base to that of a snapshot, wherever it lies. Kind 'not-found'. */
export function pathTo(record: DiskRecord, snapshot: string): readonly LayerRecord[] {
  const index = record.layers.findIndex((layer) => layer.snapshot?.name === snapshot)
  if (index >= 0) return record.layers.slice(0, index + 1)
  const side = sideOf(record)
  const top = side.find((one) => one.snapshot?.name === snapshot)
  if (top === undefined) {
    const message = `disk ${record.name} has no snapshot ${snapshot}: varve snapshot list ${record.name} shows them`
    throw new BlockError('not-found', message)
  }
  const above: LayerRecord[] = []
  let on = top.path
  for (let layer: SideLayer | undefined = top; layer !== undefined; layer = side.find(({ path }) => path === on)) {
    const { on: below, ...plain } = layer
    above.unshift(plain)
    on = below
  }
  return [...record.layers.slice(0, record.layers.findIndex(({ path }) => path === on) + 1), ...above]
}

/** What lies beside the chain. */
export function sideOf(record: DiskRecord): readonly SideLayer[] {
  return record.side ?? []
}

/** Without the layers that no snapshot names and none lies on. */
export function prune(side: readonly SideLayer[]): readonly SideLayer[] {
  const left = side.filter(({ path, snapshot }) => snapshot !== undefined || side.some(({ on }) => on === path))
  return left.length === side.length ? left : prune(left)
}

/** The name of the nearest snapshot below a layer; undefined when there is none. */
export function snapshotBelow(record: DiskRecord, layerPath: string): string | undefined {
  const side = sideOf(record)
  let path = side.find((layer) => layer.path === layerPath)?.on
  for (let below = side.find((layer) => layer.path === path); below !== undefined; ) {
    if (below.snapshot !== undefined) return below.snapshot.name
    path = below.on
    below = side.find((layer) => layer.path === path)
  }
  const at = record.layers.findIndex((layer) => layer.path === (path ?? layerPath))
  const under = record.layers.slice(0, path === undefined ? at : at + 1)
  return under.findLast(({ snapshot }) => snapshot !== undefined)?.snapshot?.name
}

/** Kind 'busy' when a snapshot beside the chain lies on one of these layers, which are to change or to go. */
export function refuseHeld(record: DiskRecord, layers: readonly LayerRecord[], work: string): void {
  const paths = new Set(layers.map(({ path }) => path))
  const side = sideOf(record)
  const holder = side.find(({ on }) => paths.has(on))
  if (holder === undefined) return
  const holders = side.filter((layer) => isAbove(side, layer, holder))
  const names = holders.flatMap(({ snapshot }) => (snapshot === undefined ? [] : [snapshot.name]))
  const message =
    `${work} of disk ${record.name} is not possible: ${holder.on} is what other snapshots lie on, beside the chain: ` +
    `${names.join(', ')}. Delete them first`
  throw new BlockError('busy', message, { path: holder.on })
}

function isAbove(side: readonly SideLayer[], layer: SideLayer, bottom: SideLayer): boolean {
  for (let at: SideLayer | undefined = layer; at !== undefined; ) {
    if (at === bottom) return true
    const { on }: SideLayer = at
    at = side.find(({ path }) => path === on)
  }
  return false
}
