// Deleting a snapshot: in which direction its layer and the one above are merged. Either way the disk and the other snapshots stay
// as they were, so the cheaper one is taken, unless the user says which: downward what the layer above owns is copied, upward
// what shows through it of the snapshot's own.
//
//   above   . A A A        downward 3 granules        upward 1
//   S       s s . .

import { formatSize } from '../base/size.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import type { Layer } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { Job } from '../job/job.ts'
import { addOwned } from '../job/merge.ts'
import type { JobTerms } from '../job/terms.ts'
import type { LayerRecord } from './catalog.ts'
import { type CommitPlan, startCommit } from './commits.ts'
import type { EngineContext, ManagedDisk } from './context.ts'
import { startStream, type StreamPlan } from './streams.ts'

export type Direction = 'auto' | 'down' | 'up'

interface Choice {
  readonly direction: 'down' | 'up'
  readonly reason: string
}

/** Begins to merge the layer of a snapshot of the chain with the one above it, as a job. Kind 'not-found', and those of the merges. */
export async function startDeletion(
  context: EngineContext,
  managed: ManagedDisk,
  snapshot: string,
  wanted: Direction,
  terms: JobTerms,
): Promise<Job> {
  const choice =
    wanted === 'auto' ? await choose(managed, find(managed, snapshot)) : { direction: wanted, reason: 'asked for' }
  const ends = [snapshot]
  const down = (): CommitPlan => {
    const index = find(managed, snapshot)
    return { from: index + 1, to: index, ends }
  }
  const up = (): StreamPlan => {
    const index = find(managed, snapshot)
    return { base: index - 1, to: index + 1, ends }
  }
  const job =
    choice.direction === 'down'
      ? await startCommit(context, managed, down, terms)
      : await startStream(context, managed, up, terms)
  job.describe({ ...choice })
  return job
}

/** The index of a snapshot's layer in the chain. */
function find({ record: { layers, name } }: ManagedDisk, snapshot: string): number {
  const index = layers.findIndex((layer) => layer.snapshot?.name === snapshot)
  if (index >= 0) return index
  throw new BlockError('not-found', `disk ${name} has no snapshot ${snapshot}: varve snapshot list shows them`)
}

async function choose({ disk, record }: ManagedDisk, index: number): Promise<Choice> {
  const { of } = record.layers[index] as LayerRecord
  if (of !== undefined) return { direction: 'up', reason: `the layer is that of disk ${of}` }
  if (index === 0) return { direction: 'down', reason: 'the image at the bottom stays' }
  const layer = disk.chain.layers[index] as Layer
  const above = disk.chain.layers[index + 1] as Layer
  const over = new Bitmap(disk.size)
  await addOwned(above, over)
  const under = new Bitmap(disk.size)
  await addOwned(layer, under)
  under.andNot(over)
  const [down, up] = [over.bytes, under.bytes]
  const costs = `${formatSize(down)} to copy downward, ${formatSize(up)} upward`
  return { direction: up < down ? 'up' : 'down', reason: costs }
}
