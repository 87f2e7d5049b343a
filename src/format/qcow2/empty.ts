// Makes a qcow2 image hold nothing of its own, so that its backing file shows everywhere. One write of zeros over the L1 table
// drops the whole map; any part of it that a crash keeps is as good, since who empties an image has its data elsewhere.
// Then the refcounts are counted anew, and the file ends after what is left: tables, snapshots and bitmaps.

import type { HostFile } from '../../host/host.ts'
import type { Allocator } from './allocator.ts'
import { checkImage } from './check.ts'
import type { Header } from './header.ts'
import { recoverRefcounts } from './recover.ts'
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
  await allocator.open()
}
