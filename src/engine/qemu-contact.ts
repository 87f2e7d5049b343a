// One machine's QEMU at a time: a connection to its monitor for as long as a piece of work takes, and no longer, since a monitor talks to one
// client. What Varve left in it, for instance when it was killed, goes first, unless a backup of the machine is under way.

import type { QmpLimits } from '../source/qemu/qmp-client.ts'
import { QmpClient } from '../source/qemu/qmp-client.ts'
import { BlockError } from '../block/error.ts'
import { checkAbilities } from '../source/qemu/abilities.ts'
import { removeLeftovers } from '../source/qemu/leftovers.ts'
import type { DomainPlace } from '../source/libvirt/virsh.ts'
import { VM_JOB_KINDS } from '../job/terms.ts'
import type { Catalog, JobSpec, MachineRecord, MonitorPlace, VmJobSpec } from './catalog.ts'
import type { Home } from './home.ts'

/** A machine that runs in a QEMU of its own, and is reached by its monitor, or by libvirt, which has that. */
export type QemuMachineRecord = MachineRecord & { readonly qemu: MonitorPlace }
export type DomainRecord = MachineRecord & { readonly qemu: DomainPlace }
export type VmRecord = QemuMachineRecord | DomainRecord

export function vmOf(catalog: Pick<Catalog, 'get'>, name: string | undefined): VmRecord | undefined {
  const record = name === undefined ? undefined : catalog.get('machine', name)
  if (record?.qemu === undefined) return undefined
  const { qemu } = record
  return 'qmp' in qemu ? { ...record, qemu } : { ...record, qemu }
}

export function isDomain(record: VmRecord): record is DomainRecord {
  return 'domain' in record.qemu
}

/** Does work with the machine's monitor. Kinds as of `QmpClient.open`, and of the work. */
export async function withQemu<T>(
  { qemu }: QemuMachineRecord,
  work: (client: QmpClient) => Promise<T>,
  limits: QmpLimits = {},
): Promise<T> {
  const client = await QmpClient.open(qemu.qmp, limits)
  try {
    return await work(client)
  } finally {
    client.close()
  }
}

/** Removes what earlier backups left; kind 'unsupported' for a QEMU that cannot show a moment. */
export async function tidyQemu(client: QmpClient, { id, qemu }: QemuMachineRecord, home: Home): Promise<string[]> {
  await checkAbilities(client)
  return removeLeftovers(client, qemu.tag, home.qemuSocket(id))
}

/** Kind 'busy' while a job works on the machine. */
export function refuseBusy(catalog: Pick<Catalog, 'list'>, machine: string): void {
  const job = jobOf(catalog, machine)
  if (job !== undefined)
    throw new BlockError('busy', `job ${job} is at work on machine ${machine}: varve job cancel ${job}`)
}

/** Kind 'busy' while a job of QEMU's own, which has the monitor, is at a disk of the machine. */
export function refuseVmJob(catalog: Pick<Catalog, 'list'>, machine: string): void {
  const job = catalog.list('job').find(({ spec }) => isVmJob(spec) && spec.machine === machine)
  if (job !== undefined)
    throw new BlockError('busy', `job ${job.id} has the monitor of machine ${machine}: varve job show ${job.id}`)
}

export function isVmJob(spec: JobSpec): spec is VmJobSpec {
  return (VM_JOB_KINDS as readonly string[]).includes(spec.kind)
}

/** The job that works on a machine, or waits to. */
export function jobOf(catalog: Pick<Catalog, 'list'>, machine: string): string | undefined {
  return catalog.list('job').find(({ spec }) => 'machine' in spec && spec.machine === machine)?.id
}
