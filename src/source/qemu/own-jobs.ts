// What QEMU does with the disks of a running guest by itself: overlays over all of them at one moment, the layers of a disk merged down or up, and a copy.
// Here is in which commands, and that a job which its caller lost is found again: its name says what it does to which node.
//
//   snapshot   blockdev-add overlay (no backing) of each disk -> one transaction of blockdev-snapshot
//   commit     block-commit -> ready -> job-complete: the guest has the lowest layer, what lay above it is no longer used
//   stream     block-stream: the guest's layer has all, what lay below it is no longer used
//   mirror     blockdev-mirror -> ready -> job-cancel: the target is of that moment

import { BlockError } from '../../block/error.ts'
import { jobsOf, type JobWatch, type QemuJob, reach } from './block-job.ts'
import { readGraph } from './block-graph.ts'
import type { QmpClient } from './qmp-client.ts'

export type OwnJobKind = 'commit' | 'stream' | 'mirror'

const JOB_PREFIX = 'varve-job-'
const LAYER_PREFIX = 'varve-layer-'

export interface Overlay {
  /** The node that the guest's device has. */
  readonly under: string
  /** A qcow2 image over that node's, which is there. */
  readonly file: string
}

/** Puts an overlay over each disk, all at one moment or none. Kinds as of commands. */
export async function takeSnapshot(client: QmpClient, overlays: readonly Overlay[]): Promise<void> {
  const stamp = Date.now().toString(36)
  const nodes: string[] = []
  try {
    for (const [index, { file }] of overlays.entries()) {
      const node = `${LAYER_PREFIX}${stamp}-${index}`
      const storage = { driver: 'file', filename: file, discard: 'unmap' }
      const layer = { driver: 'qcow2', 'node-name': node, file: storage, backing: null, discard: 'unmap' }
      await client.execute('blockdev-add', layer)
      nodes.push(node)
    }
    const actions = overlays.map(({ under }, index) => ({
      type: 'blockdev-snapshot',
      data: { node: under, overlay: nodes[index] },
    }))
    await client.execute('transaction', { actions })
  } catch (error) {
    for (const node of nodes) await client.execute('blockdev-del', { 'node-name': node }).catch(() => undefined)
    throw error
  }
}

export interface OwnJob extends JobWatch {
  readonly kind: OwnJobKind
  /** The guest's disk, as its machine calls it, and the node that its device has. */
  readonly disk: string
  readonly top: string
  /** Of a mirror: blockdev-add's arguments, without `node-name`. */
  readonly target?: Readonly<Record<string, unknown>>
  /** Bytes per second; 0 for no limit. */
  readonly speed: number
  /** It was begun before, and may have ended since. */
  readonly isAgain: boolean
  /** Whether it is left under way when it is waited for no longer: the same again finds it. Else it is ended, and has changed nothing that counts. */
  readonly isLeft: () => boolean
}

/** What QEMU calls it. */
export function ownJobId({ kind, disk }: Pick<OwnJob, 'kind' | 'disk'>): string {
  return `${JOB_PREFIX}${kind}-${disk}`
}

/**
 * Runs one of QEMU's jobs to its end, or goes on with the one of that kind that is there for this disk. Kinds: 'busy' when a job of another kind
 * is at the disk, and as of commands.
 */
export async function runOwnJob(client: QmpClient, job: OwnJob): Promise<void> {
  const id = ownJobId(job)
  const found = await findJob(client, job)
  const isDone = found?.status === 'concluded' && found.error === undefined && job.isAgain
  if (found?.status === 'concluded') await client.execute('job-dismiss', { id })
  if (!isDone) {
    const isThere = found !== undefined && found.status !== 'concluded'
    if (isThere) await takeOver(client, found, job.speed)
    else await START[job.kind](client, id, job)
    await toItsEnd(client, id, job)
  }
  await dropUnused(client)
}

/** Has it run as if it had been begun now. */
async function takeOver(client: QmpClient, { id, status }: QemuJob, speed: number): Promise<void> {
  await client.execute('block-job-set-speed', { device: id, speed })
  if (status === 'paused' || status === 'standby') await client.execute('block-job-resume', { device: id })
}

async function toItsEnd(client: QmpClient, id: string, job: OwnJob): Promise<void> {
  try {
    if (job.kind !== 'stream') await reach(client, id, 'ready', job)
    if (job.kind === 'commit') await client.execute('job-complete', { id })
    if (job.kind === 'mirror') await client.execute('block-job-cancel', { device: id })
    // Of a mirror that is ready a cancel is its orderly end.
    await reach(client, id, 'concluded', job)
  } catch (error) {
    if (!job.isLeft()) await abandon(client, id)
    throw error
  }
  await client.execute('job-dismiss', { id })
}

type Start = (client: QmpClient, id: string, job: OwnJob) => Promise<void>

const START: Readonly<Record<OwnJobKind, Start>> = {
  commit: async (client, id, { top, speed }) => {
    await client.execute('block-commit', { 'job-id': id, device: top, speed, 'auto-dismiss': false })
  },
  stream: async (client, id, { top, speed }) => {
    await client.execute('block-stream', { 'job-id': id, device: top, speed, 'auto-dismiss': false })
  },
  mirror: async (client, id, { top, speed, target }) => {
    const node = `${LAYER_PREFIX}${Date.now().toString(36)}-c`
    await client.execute('blockdev-add', { ...target, 'node-name': node })
    const options = { 'job-id': id, device: top, target: node, sync: 'full', speed, 'auto-dismiss': false }
    await client.execute('blockdev-mirror', options)
  },
}

async function findJob(client: QmpClient, { kind, disk }: OwnJob): Promise<QemuJob | undefined> {
  const ours = (await jobsOf(client)).filter(({ id }) => id.startsWith(JOB_PREFIX) && id.endsWith(`-${disk}`))
  const other = ours.find(({ id, status }) => id !== `${JOB_PREFIX}${kind}-${disk}` && status !== 'concluded')
  if (other === undefined) return ours.find(({ id }) => id === `${JOB_PREFIX}${kind}-${disk}`)
  throw new BlockError('busy', `${client.name}: ${other.id.slice(JOB_PREFIX.length)} is at work, ${other.status}`)
}

/** Ends one that is not whole. */
async function abandon(client: QmpClient, id: string): Promise<void> {
  await client.execute('block-job-cancel', { device: id, force: true }).catch(() => undefined)
  const never = { progress: () => undefined, signal: new AbortController().signal }
  await reach(client, id, 'concluded', never).catch(() => undefined)
  await client.execute('job-dismiss', { id }).catch(() => undefined)
  await dropUnused(client)
}

/** Has QEMU close what it opened for us and no longer needs: nobody's child, and no device's. */
async function dropUnused(client: QmpClient): Promise<void> {
  const { nodes } = await readGraph(client)
  // The monitor refuses the others.
  for (const node of nodes.keys())
    if (node.startsWith(LAYER_PREFIX))
      await client.execute('blockdev-del', { 'node-name': node }).catch(() => undefined)
}
