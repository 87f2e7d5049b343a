// The backup of a machine in a QEMU of its own, by whatever way it is reached: its monitor (qemu-backup.ts) or libvirt (libvirt-backup.ts).

import type { EarlierBackup } from './backup-way.ts'
import type { JobRecord } from './catalog.ts'
import type { EngineContext } from './context.ts'
import { LibvirtBackup } from './libvirt-backup.ts'
import { QemuBackup } from './qemu-backup.ts'
import { isDomain, refuseVmJob, vmOf, type VmRecord } from './qemu-contact.ts'
import type { VmBackup } from './vm-party.ts'

/**
 * Asks the machine, and removes what an earlier backup left there. `backups` are those of the repository, which is named by its id. Kinds of
 * reaching it; 'invalid-argument' without a disk to back up.
 */
export async function openVmBackup(
  context: EngineContext,
  record: VmRecord,
  repository: string,
  backups: readonly EarlierBackup[],
): Promise<VmBackup> {
  refuseVmJob(context.catalog, record.id)
  if (isDomain(record)) return LibvirtBackup.open(context, record, repository, backups)
  return QemuBackup.open(context, record, repository, backups)
}

/** Ends a backup that a crash of ours left in the machine's QEMU, after it had become visible: a backup of Varve's own disks has nothing there. */
export async function settleVm(
  context: EngineContext,
  { spec }: JobRecord,
  repository: string,
  backup: string,
): Promise<void> {
  const record = vmOf(context.catalog, 'machine' in spec ? spec.machine : undefined)
  if (record === undefined) return
  if (isDomain(record)) await LibvirtBackup.ended(context, record, repository).settle(backup, 'kept')
  else await new QemuBackup(context, record, repository, [], []).settle(backup, 'kept')
}
