// How the disks of a machine in a QEMU of its own are backed up, and why: by the marks that earlier backups left in its images, bitmaps of QEMU's
// or checkpoints of libvirt's, each of which is called after the backup since which it knows what changed. Pure.

import { formatSize } from '../base/size.ts'
import { BlockError } from '../block/error.ts'
import type { DiskPlan, PlanRequest } from './backup-party.ts'
import { type EarlierBackup, type Way, wayByComparison, wayFrom } from './backup-way.ts'

/** A disk of the machine that is not in the backup, and why. */
export interface SkippedDisk {
  readonly name: string
  readonly reason: string
}

export interface MarkedDisk {
  /** As the machine calls it. */
  readonly name: string
  /** Bytes. */
  readonly size: number
  /** Of this repository's backups, newest first. */
  readonly marks: readonly { readonly backup: string; readonly isWhole: boolean }[]
  /** Why it has no mark of a backup that knows the disk. */
  readonly whyNone: string
}

export class VmDiskPlans {
  readonly #machine: string
  /** The repository's own, by id. */
  readonly #repository: string
  readonly #backups: readonly EarlierBackup[]
  readonly #known: ReadonlyMap<string, EarlierBackup>

  constructor(machine: string, repository: string, backups: readonly EarlierBackup[]) {
    this.#machine = machine
    this.#repository = repository
    this.#backups = backups
    this.#known = new Map(backups.map((info) => [info.id, info]))
  }

  /** What a disk is called in backups. */
  fullName(disk: string): string {
    return `${this.#machine}.${disk}`
  }

  isKnown(backup: string): boolean {
    return this.#known.has(backup)
  }

  /** By its newest mark whose backup is there, or all of it. Kind 'unsupported' for what is for Varve's own disks. */
  plan(disk: MarkedDisk, { full, checkpoints = {} }: PlanRequest): DiskPlan {
    if (checkpoints.since !== undefined || checkpoints.checkpoint !== undefined)
      throw new BlockError(
        'unsupported',
        `machine ${this.#machine} runs in QEMU: checkpoints are for Varve's own disks`,
      )
    const { size } = disk
    const way = this.#wayOf(disk, full)
    const plan: DiskPlan = { ...way, size, bitmap: `backup:${this.#repository}`, moves: true, whole: false }
    const before = this.sizeBefore(disk.name, plan)
    if (before === size) return plan
    return { ...plan, reason: `${way.reason}; grown from ${formatSize(before)} to ${formatSize(size)}` }
  }

  /** Bytes of the disk in the backup that this one goes on from, or is compared with; as many as it has where there is none. */
  sizeBefore(disk: string, { parent, compared, size }: Pick<DiskPlan, 'parent' | 'compared' | 'size'>): number {
    const before = this.#known.get(parent ?? compared ?? '')?.disks.find(({ name }) => name === this.fullName(disk))
    return Math.min(size, before?.size ?? size)
  }

  /** The disks that the last backup has, and the machine, which has these, no more. */
  unplugged(found: readonly string[]): SkippedDisk[] {
    const names = new Set(found.map((name) => this.fullName(name)))
    const last = this.#backups.findLast(({ disks }) => disks.some(({ name }) => this.#isOurs(name)))
    const gone = last?.disks.filter(({ name }) => this.#isOurs(name) && !names.has(name)) ?? []
    return gone.map(({ name }) => ({ name, reason: `unplugged since ${last?.id}` }))
  }

  #isOurs(name: string): boolean {
    return name.startsWith(this.fullName(''))
  }

  #wayOf(disk: MarkedDisk, full: boolean): Way {
    if (full) return { parent: undefined, kind: 'full', reason: 'asked for' }
    const sized = { name: this.fullName(disk.name), size: disk.size }
    const last = disk.marks.find(({ backup, isWhole }) => isWhole && this.#known.has(backup))
    if (last !== undefined) return wayFrom(sized, this.#known, last.backup)
    return wayByComparison(sized, this.#known, this.#whyFull(disk, sized.name))
  }

  #whyFull({ marks, whyNone }: MarkedDisk, fullName: string): string {
    const isKnown = this.#backups.some(({ disks }) => disks.some(({ name }) => name === fullName))
    const isMachineKnown = this.#backups.some(({ disks }) => disks.some(({ name }) => this.#isOurs(name)))
    if (marks.some(({ isWhole }) => !isWhole))
      return 'QEMU did not end cleanly, and its bitmap is inconsistent: a new one takes its place'
    if (!isKnown && isMachineKnown) return 'added since the last backup'
    if (!isKnown) return 'no earlier backup of this disk in this repository is known'
    return whyNone
  }
}
