// One disk of a machine in a QEMU of its own, as a party of its backup (backup-party.ts). All disks of such a machine have one moment, which is taken
// and settled for all of them at once, whichever of them asks first.

import { GRANULE, VIEW_CONNECTIONS } from '../base/limits.ts'
import { QMP_SCRATCH_MIN } from '../base/qemu-limits.ts'
import { roundDown, roundUp } from '../base/round.ts'
import type { Bitmap } from '../bitmap/bitmap.ts'
import { BlockError } from '../block/error.ts'
import { dirtyBits, NbdView } from '../job/nbd-view.ts'
import { connectNbd } from '../nbd/client.ts'
import type { BackupParty, Captured, DiskPlan, Outcome, PlanRequest } from './backup-party.ts'
import type { EngineContext } from './context.ts'
import { limitsOf } from './host-limits.ts'
import type { SkippedDisk } from './vm-disk-plans.ts'

/** A backup of all disks of a machine. */
export interface VmBackup {
  readonly skipped: readonly SkippedDisk[]
  readonly parties: readonly BackupParty[]
}

/** The moment that its disks share; each is named as the machine calls it. */
export interface VmMoment {
  plan(disk: string, request: PlanRequest): DiskPlan
  /** Makes all ready for the moment. */
  prepare(): Promise<void>
  /** Takes the moment, of all disks at once, and opens the view of one. */
  capture(disk: string, plan: DiskPlan, backup: string): Promise<Captured>
  /** What says which changes there were was proved wrong: none of it stays. */
  distrust(): void
  /** Leaves of the moment nothing in QEMU but the marks that the outcome asks for, of all disks or of none. */
  settle(backup: string, outcome: Outcome): Promise<void>
}

export class VmParty implements BackupParty {
  readonly disk: string
  readonly #moment: VmMoment
  readonly #name: string

  constructor(moment: VmMoment, machine: string, name: string) {
    this.disk = `${machine}.${name}`
    this.#moment = moment
    this.#name = name
  }

  async plan(request: PlanRequest): Promise<DiskPlan> {
    return this.#moment.plan(this.#name, request)
  }

  freeze(): Promise<void> {
    return this.#moment.prepare()
  }

  capture(plan: DiskPlan, backup: string): Promise<Captured> {
    return this.#moment.capture(this.#name, plan, backup)
  }

  /** The moment held nobody. */
  async thaw(): Promise<void> {}

  /** A backup of QEMU's disks that breaks is begun anew: its bitmap says what changed in all of the disk, not what a part lacks. */
  async keepPart(): Promise<void> {}

  async distrust(): Promise<void> {
    this.#moment.distrust()
  }

  settle(_bitmap: string | undefined, backup: string, outcome: Outcome): Promise<void> {
    return this.#moment.settle(backup, outcome)
  }
}

/** Where the moment of a disk is read. */
export interface MomentExport {
  readonly uri: string
  /** Of the disk when its backup was planned, and in the backup before. */
  readonly size: number
  readonly sizeBefore: number
  /** The context that says what changed; undefined for a full. */
  readonly context: string | undefined
  /** Says of errors of its reads what they mean. */
  readonly explain: (error: unknown) => unknown
}

/** Opens the view of a disk. Kind 'busy' when it is not as large as it was. */
export async function openMoment(disk: string, at: MomentExport): Promise<Captured> {
  const { uri, size, sizeBefore, context, explain } = at
  const contexts = context === undefined ? [] : [context]
  const client = await connectNbd(uri, { contexts, connections: VIEW_CONNECTIONS })
  let changed: Bitmap | undefined
  try {
    if (client.size !== size)
      throw new BlockError('busy', `${disk} was resized while its backup was prepared: ask again`)
    changed = context === undefined ? undefined : await dirtyBits(client, context)
    // What it grew by is in no bitmap until the guest writes there.
    const before = roundDown(sizeBefore, GRANULE)
    if (before < size) changed?.set(before, size - before)
  } catch (error) {
    await client.close()
    throw error
  }
  return { view: new NbdView(client, changed, explain), changed, durable: Promise.resolve() }
}

/** What a qcow2 image of so many bytes needs besides its data, at most. */
const QCOW2_OVERHEAD = 1 / 512
const QCOW2_OVERHEAD_MIN = 2 ** 20
const CLUSTER = 65_536

/** Takes of the host's scratch what the moment of a disk may need, or less where there is less; returns the bytes. Kind 'no-space' for next to nothing. */
export function keepScratch(context: EngineContext, size: number): number {
  const perDisk = limitsOf(context).scratchBytes
  const whole = roundUp(size + size * QCOW2_OVERHEAD + QCOW2_OVERHEAD_MIN, CLUSTER)
  let bytes = Math.min(whole, Math.floor(perDisk / CLUSTER) * CLUSTER)
  for (; !context.scratchBudget.take(bytes); bytes = Math.floor(bytes / 2 / CLUSTER) * CLUSTER)
    if (bytes < QMP_SCRATCH_MIN)
      throw new BlockError('no-space', 'the scratch of the host is in use: varve host shows by whom')
  return bytes
}
