// One machine of libvirt's at a time: what it has of disks, and what Varve left in it. What a backup left goes first, unless one is under way.

import { BlockError } from '../block/error.ts'
import type { Host } from '../host/host.ts'
import { type DomainDisk, OLD_QCOW2, readDomain, readSizes } from '../source/libvirt/domain.ts'
import { deleteCheckpoint, readCheckpoints } from '../source/libvirt/checkpoints.ts'
import { endPull } from '../source/libvirt/pull-backup.ts'
import type { Virsh } from '../source/libvirt/virsh.ts'
import { isBitmapOf } from '../source/qemu/names.ts'

/** A disk, with its bytes; 0 for an empty drive. */
export type SizedDomainDisk = DomainDisk & { readonly size: number }

export interface FoundDomain {
  readonly disks: readonly SizedDomainDisk[]
  readonly hasAgent: boolean
}

/** Kind 'closed' when it does not run, and those of asking. */
export async function findDomain(virsh: Virsh, host: Host): Promise<FoundDomain> {
  const { isRunning, disks, hasAgent } = await readDomain(virsh)
  const { domain, connect } = virsh.place
  if (!isRunning) throw new BlockError('closed', `${virsh.name} does not run: virsh -c ${connect} start ${domain}`)
  const sizes = await readSizes(virsh)
  const sized = disks.map(async (disk) => {
    const isOld = disk.treatment.kind === 'persistent' && disk.isLocal && (await isOldQcow2(host, disk.file))
    return { ...disk, size: sizes.get(disk.name) ?? 0, ...(isOld ? { treatment: OLD_QCOW2 } : {}) }
  })
  return { hasAgent, disks: await Promise.all(sized) }
}

/** Ends the backup job that an earlier backup left, which served at this socket; says what it removed. Kind 'busy' for another's. */
export async function tidyDomain(virsh: Virsh, socket: string): Promise<string[]> {
  return (await endPull(virsh, socket)) ? ['libvirt’s backup job'] : []
}

/** Takes all of Varve's out of it, its checkpoints too. */
export async function clearDomain(virsh: Virsh, machine: string, socket: string): Promise<void> {
  await tidyDomain(virsh, socket)
  const own = await readCheckpoints(virsh, (name) => isBitmapOf(machine, name))
  for (const { name } of own) await deleteCheckpoint(virsh, name)
}

/** By its header (docs/interop/qcow2 in QEMU); what cannot be read from here is left to libvirt to refuse. */
async function isOldQcow2(host: Host, file: string): Promise<boolean> {
  const header = Buffer.alloc(8)
  try {
    const opened = await host.open(file)
    try {
      await opened.read(0, header.length, header, 0)
    } finally {
      await opened.close()
    }
  } catch {
    return false
  }
  return header.readUInt32BE(4) < 3
}
