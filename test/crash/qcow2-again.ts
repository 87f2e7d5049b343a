// A crash during the repair that follows a crash: the repair of a state is recorded as a run of its own, in which the disk, what is
// kept beside it and the header's reference must stay what they were found to be.

import { Content, CrashDisk } from './crash-disk.ts'
import { backingOf, type Entry, openImage, readAll, type Recording, REFERENCES } from './qcow2-run.ts'
import { idsOf, worldOf } from './qcow2-worlds.ts'
import type { Act } from './sector-model.ts'

/**
 * Records how the image on `disk`, a state of the run `first` that may be in the worlds that are `allowed`, is opened, repaired and
 * closed. The disk stays as it is.
 */
export async function recordRepair(
  first: Recording,
  disk: CrashDisk,
  allowed: (id: number) => boolean,
): Promise<Recording> {
  const log: Entry[] = []
  const copy = new CrashDisk({ isDevice: disk.isDevice, log })
  for (const [name, content] of disk.files) copy.files.set(name, new Content(content))
  const start = new Map(Array.from(copy.files, ([name, content]) => [name, new Content(content)]))
  const image = await openImage(copy, backingOf(first.setting))
  const content = await readAll(image)
  const world = worldOf(image, first.worlds, allowed)
  const reference = REFERENCES.findIndex((name) => name === image.backingReference?.name)
  const was = (id: number): Act => ({ id, issued: 0, done: 0, isSure: true })
  log.push(
    { kind: 'resizing', act: was(content.length) },
    { kind: 'keeping', act: was(first.worlds.indexOf(world)) },
    { kind: 'referring', act: was(Math.max(0, reference)) },
    { kind: 'acked', act: was(0) },
    { kind: 'seen', first: 0, ids: idsOf(content), issued: 0 },
  )
  log.push({ kind: 'flushed', upTo: log.length })
  try {
    await image.setAccess('write')
  } finally {
    await image.close()
  }
  return { ...first, log, start, isAfterLoss: true }
}
