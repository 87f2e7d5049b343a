// What the commands share that have QEMU do something with the disks of a running machine: its monitor, held meanwhile, its disks, and a bar that
// ends with Ctrl-C.

import fs from 'node:fs'
import { BlockError } from '../block/error.ts'
import { disksOf, type QemuDisk, readGraph } from '../source/qemu/block-graph.ts'
import type { JobWatch } from '../source/qemu/block-job.ts'
import { removeMoves } from '../source/qemu/move-disk.ts'
import { QmpClient } from '../source/qemu/qmp-client.ts'
import { warn } from './context.ts'
import type { Cli } from './daemon-context.ts'
import { Progress } from './progress.ts'

/** A node that is there while a machine is backed up. */
const OF_A_BACKUP = /^varve-[0-9a-f]{6}-/
/** Of nodes that Varve puts into QEMU for a backup; no machine has this tag. */
const NO_TAG = ''

/** Does something with the disks of a machine. Kinds 'closed' when it is away, 'busy' while it is backed up, 'unsupported' for one of libvirt's. */
export async function withVm<T>(
  cli: Cli,
  vm: string,
  act: (client: QmpClient, disks: readonly QemuDisk[]) => Promise<T>,
): Promise<T> {
  const { qmp, libvirt, state, error } = await cli.api.call('showVm', { vm }, {})
  if (qmp === undefined)
    throw new BlockError(
      'unsupported',
      `${vm} is a machine of libvirt’s, which would not know of what is done to its disks: virsh -c ${libvirt?.connect} blockcopy, blockcommit, blockpull and snapshot-create do it`,
    )
  if (state === 'away') throw new BlockError('closed', `${vm} is away: ${error}`)
  const client = await QmpClient.open(qmp)
  try {
    const removed = await removeMoves(client)
    if (removed.length > 0) warn(`a move that broke off had left ${removed.join(', ')} in QEMU: removed`)
    const graph = await readGraph(client)
    if ([...graph.nodes.keys()].some((node) => OF_A_BACKUP.test(node)))
      throw new BlockError(
        'busy',
        `a backup of ${vm} is at work, or broke off: varve vm show ${vm} removes what that left`,
      )
    return await act(client, disksOf(graph, NO_TAG))
  } finally {
    client.close()
  }
}

/** Kind 'exists' when there is something at the path where an image is to be made. */
export function refuseExisting(image: string): void {
  if (fs.existsSync(image))
    throw new BlockError('exists', `${image} is there already: name another image`, { path: image })
}

/** Runs something with a bar, until it ends or Ctrl-C. */
export async function untilInterrupted<T>(title: string, act: (watch: JobWatch) => Promise<T>): Promise<T> {
  const stop = new AbortController()
  const interrupted = (): void => stop.abort(new BlockError('cancelled', 'interrupted'))
  process.once('SIGINT', interrupted)
  process.once('SIGTERM', interrupted)
  const bar = new Progress(title)
  try {
    return await act({ progress: bar.update.bind(bar), signal: stop.signal })
  } finally {
    bar.end()
    process.off('SIGINT', interrupted)
    process.off('SIGTERM', interrupted)
  }
}
