// Takes a disk out of the catalog. Its images stay where they are, clean for any other program; those of a copy that never became ours, and
// of one whose rest is in a backup, are deleted with it.

import path from 'node:path'
import { BlockError, toBlockError } from '../block/error.ts'
import { refuseUnsettled } from './authority.ts'
import { BACKUP_FORMAT } from './backup-layer.ts'
import { type DiskRecord, disksOf } from './catalog.ts'
import { layersOf, refuseClaimed } from './claims.ts'
import { type EngineContext, findAny, type ManagedDisk } from './context.ts'
import { closeManagedDisk } from './disk-opener.ts'
import { forget } from './hand-over.ts'
import { machineOf } from './machines.ts'
import { letGoOf } from './held-backup.ts'

/** Kind 'busy' while a job, a clone or another daemon needs the disk. Nobody else adds or removes disks meanwhile. */
export async function removeDisk(context: EngineContext, name: string): Promise<void> {
  const failed = context.failed.get(name)
  const record = failed?.record ?? findAny(context, name).record
  refuseUnsettled(record)
  const machine = machineOf(context.catalog, name)
  if (machine !== undefined)
    throw new BlockError('busy', `disk ${name} is of machine ${machine}: varve machine remove ${machine} ${name}`)
  const job = context.jobs.find(({ spec }) => disksOf(spec).includes(name))
  if (job !== undefined)
    throw new BlockError('busy', `disk ${name} is in use by job ${job.id}: varve job cancel ${job.id}`)
  const own = layersOf(record).filter(({ of }) => of === undefined)
  refuseClaimed(context.catalog, record, own, `removal of disk ${name}`)
  const managed = context.disks.get(name)
  if (managed !== undefined) await close(context, managed)
  const garbage = context.catalog.list('garbage').filter(({ disk }) => disk === record.id)
  // Merges of a disk that could not be opened wait for it; without the disk there is nothing to wait for.
  const jobs = context.catalog.list('job').filter(({ spec }) => 'disk' in spec && spec.disk === name)
  await context.catalog.commit([
    { remove: 'disk', id: record.id },
    { remove: 'guest', id: record.id },
    { remove: 'forecast', id: name },
    ...garbage.map(({ id }) => ({ remove: 'garbage' as const, id })),
    ...jobs.map(({ id }) => ({ remove: 'job' as const, id })),
  ])
  context.failed.delete(name)
  await removeFolder(context, record)
  if (record.away !== undefined) await forget(context, record)
  // Without the rest that is elsewhere nothing can be made of them.
  if (record.incoming === undefined && record.restoring === undefined) return
  for (const { path: image, format } of record.layers) if (format !== BACKUP_FORMAT) await context.host.unlink(image)
  if (record.restoring !== undefined) await letGoOf(context, record.restoring)
}

/** Closes a disk that stays in the catalog until further notice, as one that is not open. */
async function close(context: EngineContext, managed: ManagedDisk): Promise<void> {
  const { record } = managed
  let error: unknown = new BlockError('closed', `disk ${record.name} was closed: a restart of the daemon opens it`)
  try {
    await closeManagedDisk(context, managed)
  } catch (failure) {
    error = failure
    throw failure
  } finally {
    context.disks.delete(record.name)
    context.failed.set(record.name, { record, error: toBlockError(error, `disk ${record.name}`) })
  }
}

/** What Varve keeps of a disk beside its images. */
export async function removeFolder({ host, home }: EngineContext, record: DiskRecord): Promise<void> {
  const folder = home.diskFolder(record.id)
  for (const file of await host.list(folder)) await host.unlink(path.join(folder, file))
}
