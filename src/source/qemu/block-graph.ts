// What a QEMU has of disks, as its monitor tells it (qapi/block-core.json), and what Varve can do with each: whether what changes can be
// recorded in the image or only for as long as QEMU lives, or why the disk is not backed up. Pure but for the three questions that it asks.
//
//   guest's device -> [throttle, copy-on-read ...] -> qcow2 or raw -> file
//                     top: what the device writes to  node: has the bitmaps

import type { QmpClient } from './qmp-client.ts'
import { roleOf } from './names.ts'

/** Drivers that pass everything on to their one child. */
const FILTERS: ReadonlySet<string> = new Set(['throttle', 'copy-on-read', 'compress', 'copy-before-write'])

export interface QemuBitmap {
  readonly name: string
  readonly granularity: number
  readonly recording: boolean
  readonly persistent: boolean
  readonly inconsistent: boolean
  readonly busy: boolean
  /** Dirty bytes. */
  readonly count: number
}

/** How what changes in a disk can be recorded, or why it is not backed up. */
export type Treatment =
  /** In the image: over restarts of QEMU. */
  | { readonly kind: 'persistent' }
  /** In QEMU's memory. */
  | { readonly kind: 'transient'; readonly reason: string }
  | { readonly kind: 'skipped'; readonly reason: string }

export interface QemuDisk {
  /** Of the device, as its user called it; unique in the machine. */
  readonly name: string
  /** The device, for qom-set; undefined without one. */
  readonly device: string | undefined
  /** Node names; undefined for an empty drive. */
  readonly top: string | undefined
  readonly node: string | undefined
  /** Bytes. */
  readonly size: number
  readonly format: string
  readonly file: string
  readonly bitmaps: readonly QemuBitmap[]
  readonly treatment: Treatment
}

interface Info {
  readonly device?: string
  readonly qdev?: string
  readonly removable?: boolean
  readonly inserted?: { readonly 'node-name': string }
}

/** A node of `query-named-block-nodes`. */
export interface NodeInfo {
  readonly 'node-name': string
  readonly drv: string
  readonly ro: boolean
  readonly file: string
  readonly image: {
    readonly 'virtual-size': number
    readonly 'format-specific'?: { readonly type: string; readonly data?: { readonly compat?: string } }
  }
  readonly 'dirty-bitmaps'?: readonly (Omit<QemuBitmap, 'name'> & { readonly name?: string })[]
}

interface DebugGraph {
  readonly nodes: readonly { readonly id: number; readonly type: string; readonly name: string }[]
  readonly edges: readonly { readonly parent: number; readonly child: number; readonly name: string }[]
}

/** Nodes by name, which is whose child, and the devices. */
export interface BlockGraph {
  readonly nodes: ReadonlyMap<string, NodeInfo>
  /** The child that a node calls "file". */
  child(node: string): string | undefined
  readonly devices: readonly { readonly info: Info; readonly top: string | undefined }[]
}

/** Asks for the graph. Kinds as of commands. */
export async function readGraph(client: QmpClient): Promise<BlockGraph> {
  const infos = (await client.execute('query-block')) as readonly Info[]
  const named = (await client.execute('query-named-block-nodes', { flat: true })) as readonly NodeInfo[]
  const edges = await readEdges(client)
  return {
    nodes: new Map(named.map((node) => [node['node-name'], node])),
    child: (node) => edges.get(node),
    devices: infos.map((info) => ({ info, top: info.inserted?.['node-name'] })),
  }
}

/** The disks of the machine, as if nothing of Varve's, whose nodes have this tag, were in their way. */
export function disksOf(graph: BlockGraph, tag: string): QemuDisk[] {
  const taken = new Set<string>()
  return graph.devices.map(({ info, top: found }, index) => {
    let top = found
    while (top !== undefined && roleOf(tag, top) !== undefined) top = graph.child(top)
    let node = top
    while (node !== undefined && FILTERS.has(graph.nodes.get(node)?.drv ?? '')) node = graph.child(node)
    const name = uniqueName(nameOf(info, node, index), taken)
    const at = node === undefined ? undefined : graph.nodes.get(node)
    return {
      name,
      device: info.qdev === undefined || info.qdev === '' ? undefined : info.qdev,
      top,
      node: at === undefined ? undefined : node,
      size: at?.image['virtual-size'] ?? 0,
      format: at?.drv ?? '',
      file: at?.file ?? '',
      // A filter that saves old data has some without a name.
      bitmaps: at?.['dirty-bitmaps']?.filter((bitmap): bitmap is QemuBitmap => bitmap.name !== undefined) ?? [],
      treatment: treatmentOf(info, at),
    }
  })
}

function treatmentOf({ removable = false, qdev }: Info, node: NodeInfo | undefined): Treatment {
  const skipped = (reason: string): Treatment => ({ kind: 'skipped', reason })
  if (node === undefined) return skipped(removable ? 'the drive is empty' : 'it has no image')
  if (node.ro) return skipped(removable ? 'a read-only medium' : 'read-only')
  if (qdev === undefined || qdev === '') return skipped('no device of the guest has it')
  if (node.drv !== 'qcow2') return { kind: 'transient', reason: `${node.drv} has no place for a bitmap` }
  if (node.image['format-specific']?.data?.compat === '1.1') return { kind: 'persistent' }
  return { kind: 'transient', reason: 'version 2 of qcow2 has no place for a bitmap' }
}

/** As its user called it: the device's id, else that of its drive, else its number. */
function nameOf({ qdev = '', device = '' }: Info, node: string | undefined, index: number): string {
  const id = /^\/machine\/peripheral\/([^/]+)/.exec(qdev)?.[1] ?? (qdev.startsWith('/') ? '' : qdev)
  const named = node === undefined || node.startsWith('#') ? '' : node
  const found = [id, device, named].find((name) => name !== '') ?? `disk${index}`
  return found.replaceAll(/[^A-Za-z0-9._-]/g, '-')
}

function uniqueName(name: string, taken: Set<string>): string {
  let unique = name
  for (let count = 2; taken.has(unique); count++) unique = `${name}-${count}`
  taken.add(unique)
  return unique
}

/** By name, each node's child that is called "file". */
async function readEdges(client: QmpClient): Promise<ReadonlyMap<string, string>> {
  const { nodes, edges } = (await client.execute('x-debug-query-block-graph')) as DebugGraph
  const names = new Map(nodes.filter(({ type }) => type === 'block-driver').map(({ id, name }) => [id, name]))
  const children = edges.flatMap(({ parent, child, name }): [string, string][] => {
    const from = names.get(parent)
    const to = names.get(child)
    return name === 'file' && from !== undefined && to !== undefined ? [[from, to]] : []
  })
  return new Map(children)
}
