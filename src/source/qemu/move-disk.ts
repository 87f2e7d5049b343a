// Moves a disk of a running guest to another node of its QEMU by QEMU's own mirror, while the guest writes: onto a disk of Varve's, or off one.
// Until QEMU has switched the guest over, it is on its old disk, whatever dies; afterwards on the new one, which holds all it wrote.
//
//   blockdev-add target -> blockdev-mirror -> ready -> job-complete -> concluded: the guest's device has the target -> blockdev-del old
//
// What this puts into a QEMU is called varve-move-..., and the node of a target that the guest has got keeps its name. Whatever else of that is found
// the next time was left by one that died, and goes.

import { setTimeout as delay } from 'node:timers/promises'
import { QMP_MOVE_LOOK_MS } from '../../base/qemu-limits.ts'
import { BlockError, toBlockError } from '../../block/error.ts'
import { jobsOf, type JobWatch, reach } from './block-job.ts'
import { readGraph } from './block-graph.ts'
import type { QmpClient } from './qmp-client.ts'

const PREFIX = 'varve-move-'

export interface DiskMove extends JobWatch {
  /** The node that the guest's device has. */
  readonly from: string
  /** blockdev-add's arguments for the target, without `node-name`. It is as large, and reads as zeros or is overwritten whole. */
  readonly target: Readonly<Record<string, unknown>>
  /** Bytes per second; 0 for no limit. */
  readonly speed: number
}

export type MoveOutcome =
  /** The guest has the target; `left` says why QEMU still has the old image open. */
  | { readonly is: 'moved'; readonly left?: string }
  /** The guest has its old disk, and nothing of the move is in its QEMU, if that lives. */
  | { readonly is: 'stayed'; readonly error: BlockError }
  /** QEMU was lost while it switched over: either disk may be the last that the guest wrote. */
  | { readonly is: 'unknown'; readonly error: BlockError }

/** Copies, and switches the guest over. Throws nothing that QEMU or the line to it can cause. */
export async function moveDisk(client: QmpClient, move: DiskMove): Promise<MoveOutcome> {
  const target = `${PREFIX}${Date.now().toString(36)}`
  const job = `${target}-job`
  let isSwitching = false
  try {
    await client.execute('blockdev-add', { ...move.target, 'node-name': target })
    const options = { 'job-id': job, device: move.from, target, sync: 'full', speed: move.speed }
    await client.execute('blockdev-mirror', { ...options, 'filter-node-name': `${target}-f`, 'auto-dismiss': false })
    await reach(client, job, 'ready', move)
    isSwitching = true
    await client.execute('job-complete', { id: job })
    await reach(client, job, 'concluded', move)
    if (await isOn(client, target)) return { is: 'moved', ...(await tidyMoved(client, job, move.from)) }
    throw new BlockError('io', `${client.name}: the mirror ended and the guest did not get its target`)
  } catch (failure) {
    const error = toBlockError(failure, client.name)
    try {
      if (await isOn(client, target)) return { is: 'moved', ...(await tidyMoved(client, job, move.from)) }
      await removeMoves(client)
      // It may have switched over while it was being cancelled.
      if (await isOn(client, target)) return { is: 'moved', ...(await tidyMoved(client, job, move.from)) }
      return { is: 'stayed', error }
    } catch {
      return { is: isSwitching ? 'unknown' : 'stayed', error }
    }
  }
}

/** Removes what moves that died have left: jobs, and nodes that no guest's device has. Returns their names. */
export async function removeMoves(client: QmpClient): Promise<string[]> {
  const jobs = (await jobsOf(client)).filter(({ id }) => id.startsWith(PREFIX))
  for (const { id, status } of jobs) {
    if (status !== 'concluded') await client.execute('job-cancel', { id })
    while ((await jobsOf(client)).some((job) => job.id === id && job.status !== 'concluded'))
      await delay(QMP_MOVE_LOOK_MS)
    await client.execute('job-dismiss', { id })
  }
  const { nodes, devices } = await readGraph(client)
  const used = new Set(devices.map(({ top }) => top))
  const left = [...nodes.keys()].filter((node) => node.startsWith(PREFIX) && !used.has(node))
  for (const node of left) await client.execute('blockdev-del', { 'node-name': node })
  return [...jobs.map(({ id }) => id), ...left]
}

async function isOn(client: QmpClient, node: string): Promise<boolean> {
  const { devices } = await readGraph(client)
  return devices.some(({ top }) => top === node)
}

/** Ends the job, and has QEMU close the old image: a drive of `-drive` goes by itself, a node of `-blockdev` when it is told to. */
async function tidyMoved(client: QmpClient, job: string, old: string): Promise<{ readonly left?: string }> {
  try {
    if ((await jobsOf(client)).some(({ id }) => id === job)) await client.execute('job-dismiss', { id: job })
    const { nodes } = await readGraph(client)
    if (nodes.has(old)) await client.execute('blockdev-del', { 'node-name': old })
    return {}
  } catch (error) {
    return { left: `QEMU keeps the old image open as node ${old}: ${toBlockError(error, client.name).message}` }
  }
}
