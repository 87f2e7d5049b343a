// Lets the jobs go on that a restart found in the catalog: how each kind is launched again.

import { resumeBackups } from './backups.ts'
import type { JobRecord } from './catalog.ts'
import { launchCommit } from './commits.ts'
import { type EngineContext, findDisk } from './context.ts'
import { launchMirror } from './mirrors.ts'
import { resumeMigration } from './settling.ts'
import { launchOverwrite } from './overwrites.ts'
import { launchStream } from './streams.ts'
import { isVmJob } from './qemu-contact.ts'
import { endView } from './views.ts'
import { launchVmJob } from './vm-jobs.ts'

/** The jobs of one disk. */
const LAUNCH = {
  commit: launchCommit,
  stream: launchStream,
  restore: launchStream,
  overwrite: launchOverwrite,
  mirror: launchMirror,
} as const

/** Launches all of these; a job whose disk is not open waits for the next start. */
export async function resumeRows(context: EngineContext, all: readonly JobRecord[]): Promise<void> {
  const rows = all.filter(({ id }) => !context.jobs.has(id))
  await resumeBackups(
    context,
    rows.filter(({ spec }) => spec.kind === 'backup'),
  )
  for (const row of rows) {
    const { spec } = row
    if (spec.kind === 'backup') continue
    if (isVmJob(spec)) {
      launchVmJob(context, row)
      continue
    }
    if (spec.kind === 'view') {
      endView(context, row)
      continue
    }
    try {
      if (spec.kind === 'migrate') resumeMigration(context, row)
      else LAUNCH[spec.kind](context, findDisk(context, spec.disk), row)
    } catch (error) {
      // A disk that is missing today may be back tomorrow: the row stays.
      context.report(`job ${row.id} cannot go on now: ${(error as Error).message}`)
    }
  }
}
