// Takes out of a QEMU what Varve put into it, in whatever state: at the end of every moment, and at the next contact after a crash of either side.
// It goes by what is there, not by what should be, so that it may break off anywhere and be begun again. The guest's devices get
// their images back first of all that it could notice.

import { setTimeout as delay } from 'node:timers/promises'
import { QMP_EXPORT_GONE_MS, QMP_EXPORT_LOOK_MS } from '../../base/qemu-limits.ts'
import { BlockError } from '../../block/error.ts'
import { type BlockGraph, readGraph } from './block-graph.ts'
import { listens } from './nbd-probe.ts'
import { nodePrefix, roleOf } from './names.ts'
import type { QmpClient } from './qmp-client.ts'

/** Removes the nodes and exports of a machine; returns the names of all that there were. `socket` is where its moments are served. */
export async function removeLeftovers(client: QmpClient, tag: string, socket: string): Promise<string[]> {
  const exports = await removeExports(client, tag)
  const graph = await readGraph(client)
  const nodes = [...graph.nodes.keys()].filter((node) => roleOf(tag, node) !== undefined)
  const ofRole = (role: string): string[] => nodes.filter((node) => roleOf(tag, node) === role)
  // A filter lets go of its image only when nobody reads the moment.
  await deleteNodes(client, ofRole('view'))
  await bypass(client, graph, tag)
  for (const role of ['anchor', 'filter', 'scratch']) await deleteNodes(client, ofRole(role))
  if (await listens(socket)) await client.execute('nbd-server-stop')
  return [...exports, ...nodes]
}

/** Leads the devices past all that is ours. */
async function bypass(client: QmpClient, graph: BlockGraph, tag: string): Promise<void> {
  const isOurs = (node: string): boolean => roleOf(tag, node) !== undefined
  const under = (node: string): string => {
    let below: string | undefined = node
    while (below !== undefined && isOurs(below)) below = graph.child(below)
    if (below !== undefined) return below
    throw new BlockError('io', `${client.name}: nothing is below node ${node}, which Varve made: remove it by hand`)
  }
  const filtered = [...graph.nodes.keys()].filter(
    (node) => roleOf(tag, node) === 'anchor' && isOurs(graph.child(node) ?? ''),
  )
  const options = filtered.map((node) => ({ driver: 'raw', 'node-name': node, file: under(node) }))
  if (options.length > 0) await client.execute('blockdev-reopen', { options })
  for (const { info, top } of graph.devices) {
    if (top === undefined || !isOurs(top)) continue
    await client.execute('qom-set', { path: info.qdev, property: 'drive', value: under(top) })
  }
}

async function removeExports(client: QmpClient, tag: string): Promise<string[]> {
  const ours = async (): Promise<string[]> => {
    const found = (await client.execute('query-block-exports')) as readonly { readonly id: string }[]
    return found.map(({ id }) => id).filter((id) => id.startsWith(nodePrefix(tag)))
  }
  const first = await ours()
  for (const id of first) await client.execute('block-export-del', { id, mode: 'hard' })
  const until = performance.now() + QMP_EXPORT_GONE_MS
  for (let left = first; left.length > 0; left = await ours()) {
    if (performance.now() > until)
      throw new BlockError('timeout', `${client.name}: export ${left[0]} does not end: a request of it hangs`)
    await delay(QMP_EXPORT_LOOK_MS)
  }
  return first
}

async function deleteNodes(client: QmpClient, nodes: readonly string[]): Promise<void> {
  for (const node of nodes) await client.execute('blockdev-del', { 'node-name': node })
}
