// A to-do set that records the guest's writes, in the disk's log: that of an earlier run, or a new one that a scan fills. Recording
// begins before the scan looks, so that no write is in neither; a set whose scan a crash cut short is made anew. And how what is done
// leaves such a set.

import { Bitmap } from '../bitmap/bitmap.ts'
import type { Disk } from '../chain/disk.ts'
import type { LoggedBitmap } from '../dirtylog/dirty-log.ts'
import type { Settled } from './copier.ts'

const SCANNING = '{"scan":"running"}'
const COMPLETE = '{"scan":"complete"}'

/** The set of that name when an earlier run left it whole. */
export function savedTodo({ log }: Disk, name: string): LoggedBitmap | undefined {
  const saved = log.bitmaps.get(name)
  return saved !== undefined && saved.state === 'valid' && saved.meta === COMPLETE ? saved : undefined
}

/** A new set of that name, durable on return, with what `scan` sets and, when it is `recording`, what is written since. */
export async function scanTodo(
  disk: Disk,
  name: string,
  recording: boolean,
  scan: (todo: Bitmap) => Promise<void>,
): Promise<LoggedBitmap> {
  const { log } = disk
  if (log.bitmaps.has(name)) await log.edit([{ kind: 'remove', name }])
  // Under a drain: a write in flight, marked before and mapped after, would be in neither answer.
  await disk.drain()
  const begun = log.edit([{ kind: 'add', name, recording, fill: 'none', meta: SCANNING }])
  disk.undrain()
  await begun
  const found = new Bitmap(disk.size)
  await scan(found)
  const scanned = `${name}:scan`
  await log.edit([
    { kind: 'add', name: scanned, recording: false, fill: found, meta: SCANNING },
    { kind: 'merge', from: scanned, into: name },
    { kind: 'remove', name: scanned },
    { kind: 'meta', name, meta: COMPLETE },
  ])
  return log.bitmaps.get(name) as LoggedBitmap
}

/** Takes what is done out of the set of that name. */
export function settledIn({ log }: Disk, name: string): Settled {
  return {
    range: (offset, length) => log.clear(name, offset, length),
    many: (bits) => log.edit([{ kind: 'subtract', name, bits }]),
  }
}
