// Restores a backup's disk to a new image, in this process. The image appears under its name only when it is whole.

import path from 'node:path'
import type { BlockDevice } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { type Format, openLayer } from '../chain/open.ts'
import { createQcow2 } from '../format/qcow2/create.ts'
import { createRaw } from '../format/raw/raw.ts'
import { realHost } from '../host/real.ts'
import { Job } from '../job/job.ts'
import { runRestore } from '../job/restore.ts'

/** Returns the bytes copied. Kind 'exists' when there is something at the path; on failure nothing is left there. */
export async function restoreToImage(
  source: BlockDevice,
  image: string,
  format: Format,
  progress: (done: number, total: number) => void,
): Promise<number> {
  if ((await realHost.status(image)) !== undefined) {
    throw new BlockError('exists', `${image} is there already: restore to another name`, { path: image })
  }
  const partial = `${image}.partial`
  if ((await realHost.status(partial)) !== undefined) {
    const message = `${partial} is there: another restore is at work, or one was killed; when none is, remove it`
    throw new BlockError('exists', message, { path: partial })
  }
  if (format === 'raw') await createRaw(realHost, partial, source.size)
  else await createQcow2(realHost, partial, { size: source.size })
  try {
    const bytes = await copy(source, partial, format, progress)
    await realHost.rename(partial, image)
    await realHost.syncFolder(path.dirname(image))
    return bytes
  } catch (error) {
    await realHost.unlink(partial)
    throw error
  }
}

async function copy(
  source: BlockDevice,
  image: string,
  format: Format,
  progress: (done: number, total: number) => void,
): Promise<number> {
  const target = await openLayer(realHost, image, format, 'restore')
  try {
    await target.setAccess('write')
    const job = new Job({ id: 'restore', kind: 'restore', subject: source.name })
    job.watch(({ status }) => progress(status.done, status.total))
    job.move('running')
    return await runRestore(job, source, target)
  } finally {
    await target.close()
  }
}
