// Backups that are queued: a row in the catalog for each machine, all in one transaction, so that a restart finds the whole queue. When
// each of them begins is the queue's (backup-queue.ts), and what it does then is backups.ts.

import { BACKUPS_QUEUED_MAX } from '../base/limits.ts'
import { BlockError } from '../block/error.ts'
import { newProof } from '../job/proof.ts'
import type { JobTerms } from '../job/terms.ts'
import { checkpointWish } from './checkpoints.ts'
import type { BackupSpec, Catalog, JobRecord } from './catalog.ts'
import { JobTable } from './job-table.ts'
import type { Machines } from './machines.ts'

export interface QueueRequest extends JobTerms {
  /** Names of machines, or of disks that are one by themselves; all of the home unless given. */
  readonly machines?: readonly string[] | undefined
  readonly repository: string
  readonly full: boolean
  /** As of a BackupRequest. */
  readonly prove?: number | undefined
  /** As of a CheckpointWish, for the disks of each machine. */
  readonly since?: string | undefined
  readonly checkpoint?: string | undefined
}

/**
 * The rows of what is asked for, in its order, behind all that is queued. Kinds: 'not-found' for a machine or disk that is not there,
 * 'invalid-argument' for one that is named twice or when there is none at all, 'busy' when too many are queued.
 */
export function queueRows(catalog: Pick<Catalog, 'list'>, machines: Machines, request: QueueRequest): JobRecord[] {
  const { repository, full, prove } = request
  const asked = { repository, full, ...newProof(prove), ...checkpointWish(request) }
  const wanted = request.machines === undefined ? machines.all() : request.machines.map((name) => machines.named(name))
  if (wanted.length === 0)
    throw new BlockError('invalid-argument', 'there is no disk to back up: varve disk add takes one')
  const twice = wanted.find(({ name }, index) => wanted.findIndex((other) => other.name === name) < index)
  if (twice !== undefined) throw new BlockError('invalid-argument', `${twice.name} is named twice`)
  const places = catalog.list('job').flatMap(({ spec }) => (spec.kind === 'backup' ? (spec.queued ?? []) : []))
  if (places.length + wanted.length > BACKUPS_QUEUED_MAX)
    throw new BlockError('busy', `${places.length} backups are queued already, of at most ${BACKUPS_QUEUED_MAX}`)
  const first = Math.max(Date.now(), ...places.map((place) => place + 1))
  return wanted.map(({ name, disks }, index) => {
    const machine = disks.includes(name) ? {} : { machine: name }
    const spec: BackupSpec = { kind: 'backup', disks, ...machine, ...asked, queued: first + index }
    return JobTable.newRow(spec, request)
  })
}
