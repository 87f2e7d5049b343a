// Makes a qcow2 image hold nothing of its own, so that its backing file shows everywhere. One write of zeros over the L1 table
// drops the whole map; any part of it that a crash keeps is as good, since who empties an image has its data elsewhere.
// Then the refcounts are counted anew, and the file keeps space for what is left alone: tables, snapshots and bitmaps.

import { Breather } from '../../base/breather.ts'
import { divideUp } from '../../base/round.ts'
import type { HostFile } from '../../host/host.ts'
import type { Allocator } from './allocator.ts'
import { checkImage } from './check.ts'
import type { Header } from './header.ts'
import { recoverRefcounts } from './recover.ts'
import type { Refcounts } from './refcounts.ts'
import * as spec from './spec.ts'
import type { Tables } from './tables.ts'

export interface Emptying {
  readonly file: HostFile
  readonly header: Header
  readonly tables: Tables
  readonly allocator: Allocator
  readonly isBlockDevice: boolean
}

/** The image is being written, flushed, and nothing is in flight. */
export async function emptyImage({ file, header, tables, allocator, isBlockDevice }: Emptying): Promise<void> {
  const nothing = new Uint8Array(header.l1Size * spec.ENTRY_SIZE)
  await file.write(header.l1Offset, nothing.length, nothing, 0)
  await file.sync()
  await tables.open()
  tables.forget()
  await recoverRefcounts(file, header, tables, allocator)
  const { imageEndOffset } = await checkImage({ file, header, l1: tables.l1 })
  if (!isBlockDevice) await file.truncate(imageEndOffset)
  await allocator.refcounts.open()
  if (!isBlockDevice) await punchFree(file, allocator.refcounts, header.clusterSize)
  await allocator.open()
}

/** Gives the space of free clusters between those in use back to the file system: nothing durable leads to them any more. */
async function punchFree(file: HostFile, refcounts: Refcounts, clusterSize: number): Promise<void> {
  const breather = new Breather()
  const end = divideUp(file.size(), clusterSize)
  for (const { start, count } of refcounts.pagesOf(0, end)) {
    const runs: number[] = []
    await refcounts.withPage(start, () => {
      for (let cluster = start; cluster < start + count; cluster++) {
        const isInRun = runs.length % 2 === 1
        if ((refcounts.get(cluster) === 0) !== isInRun) runs.push(cluster)
      }
    })
    if (runs.length % 2 === 1) runs.push(start + count)
    for (let i = 0; i < runs.length; i += 2) {
      const [first, stop] = [runs[i] as number, runs[i + 1] as number]
      await file.punch(first * clusterSize, (stop - first) * clusterSize)
    }
    await breather.pause()
  }
}
