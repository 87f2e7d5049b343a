// A machine of libvirt's in a backup: its backup job in pull mode shows the moment of all disks, and begins a checkpoint with it. A checkpoint
// is called after the backup whose moment it is, and goes on recording while the next is made; so no failure loses a bit: the next backup
// counts from the newest whose backup is in the repository, and the others are deleted (qemu-backup.ts, whose bitmaps are kept likewise).
//
//   begin: backup job + checkpoint of TUESDAY -> pulled over NBD -> the job is ended -> one of the two checkpoints is deleted
//
// What libvirt's job has not is a limit of scratch, nor a way to say what was copied already: scratch is watched here, and the job ended when it takes more
// than was kept for it.

import path from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { QMP_SETTLE_AGAIN_MS, VIRSH_SCRATCH_LOOK_MS } from '../base/qemu-limits.ts'
import { assert } from '../base/assert.ts'
import { formatSize } from '../base/size.ts'
import { BlockError, isBlockError, toBlockError } from '../block/error.ts'
import { formatNbdUri } from '../nbd/uri.ts'
import { type Checkpoint, checkpointXml, deleteCheckpoint, readCheckpoints } from '../source/libvirt/checkpoints.ts'
import { backupXml, beginPull, DIRTY_CONTEXT, type PulledDisk } from '../source/libvirt/pull-backup.ts'
import { Virsh } from '../source/libvirt/virsh.ts'
import { bitmapName, bitmapPrefix, isBitmapOf } from '../source/qemu/names.ts'
import type { BackupParty, Captured, DiskPlan, Outcome, PlanRequest } from './backup-party.ts'
import type { EarlierBackup } from './backup-way.ts'
import type { EngineContext } from './context.ts'
import { type FoundDomain, findDomain, type SizedDomainDisk, tidyDomain } from './domain-contact.ts'
import type { DomainRecord } from './qemu-contact.ts'
import { type SkippedDisk, VmDiskPlans } from './vm-disk-plans.ts'
import { keepScratch, openMoment, type VmBackup, type VmMoment, VmParty } from './vm-party.ts'

export class LibvirtBackup implements VmBackup, VmMoment {
  readonly skipped: readonly SkippedDisk[]
  readonly #context: EngineContext
  readonly #record: DomainRecord
  /** The id. */
  readonly #repository: string
  readonly #virsh: Virsh
  /** All that the machine has, and those that are backed up. */
  readonly #all: readonly string[]
  readonly #disks: readonly SizedDomainDisk[]
  /** Of this repository's backups, newest first. */
  readonly #checkpoints: readonly Checkpoint[]
  readonly #ways: VmDiskPlans
  readonly #plans = new Map<string, DiskPlan>()
  /** Bytes of the host's scratch that are kept for this moment, and its files. */
  #kept = 0
  #files: string[] = []
  readonly #ended = new AbortController()
  #isTooMuch = false
  #preparing: Promise<void> | undefined
  #moment: Promise<void> | undefined
  #settling: Promise<void> | undefined
  #isDistrusted = false

  private constructor(
    context: EngineContext,
    record: DomainRecord,
    repository: string,
    found: Pick<FoundDomain, 'disks'> & { readonly checkpoints: readonly Checkpoint[] },
    backups: readonly EarlierBackup[],
  ) {
    this.#context = context
    this.#record = record
    this.#repository = repository
    this.#virsh = new Virsh(record.qemu)
    this.#ways = new VmDiskPlans(record.id, repository, backups)
    this.#checkpoints = found.checkpoints
    this.#all = found.disks.map(({ name }) => name)
    this.#disks = found.disks.filter(({ treatment }) => treatment.kind !== 'skipped')
    const skipped = found.disks.flatMap(({ name, treatment }) =>
      treatment.kind === 'skipped' ? [{ name: this.#ways.fullName(name), reason: treatment.reason }] : [],
    )
    this.skipped = [...skipped, ...this.#ways.unplugged(this.#all)]
  }

  /** See `openVmBackup`; kind 'busy' too, while libvirt copies a disk, or somebody else backs the machine up. */
  static async open(
    context: EngineContext,
    record: DomainRecord,
    repository: string,
    backups: readonly EarlierBackup[],
  ): Promise<LibvirtBackup> {
    const virsh = new Virsh(record.qemu)
    const { disks } = await findDomain(virsh, context.host)
    const removed = await tidyDomain(virsh, context.home.qemuSocket(record.id))
    if (removed.length > 0) context.report(`machine ${record.id}: an earlier backup left ${removed.join(', ')}: ended`)
    const copied = disks.find(({ job }) => job !== undefined)
    if (copied !== undefined) throw jobAtDisk(virsh, copied)
    const checkpoints = await ownCheckpoints(virsh, record, repository)
    const backup = new LibvirtBackup(context, record, repository, { disks, checkpoints }, backups)
    if (backup.#disks.length > 0) return backup
    const why = backup.skipped.map(({ name, reason }) => `${name}: ${reason}`).join('; ')
    throw new BlockError('invalid-argument', `machine ${record.id} has no disk to back up (${why || 'it has none'})`)
  }

  /** One that only settles. */
  static ended(context: EngineContext, record: DomainRecord, repository: string): LibvirtBackup {
    return new LibvirtBackup(context, record, repository, { disks: [], checkpoints: [] }, [])
  }

  get parties(): readonly BackupParty[] {
    return this.#disks.map(({ name }) => new VmParty(this, this.#record.id, name))
  }

  plan(name: string, request: PlanRequest): DiskPlan {
    const { size, treatment } = this.#disk(name)
    const marks = this.#checkpoints.flatMap(({ name: checkpoint, whole, broken }) => {
      const isMarked = whole.has(name) || broken.has(name)
      return isMarked ? [{ backup: this.#backupOf(checkpoint), isWhole: whole.has(name) }] : []
    })
    const whyNone =
      treatment.kind === 'compared'
        ? treatment.reason
        : 'it has no checkpoint of an earlier backup: somebody removed it, or the machine was defined anew'
    const plan = this.#ways.plan({ name, size, marks, whyNone }, request)
    this.#plans.set(name, plan)
    return plan
  }

  prepare(): Promise<void> {
    return (this.#preparing ??= this.#prepare())
  }

  async capture(name: string, plan: DiskPlan, backup: string): Promise<Captured> {
    await (this.#moment ??= this.#take(backup))
    return openMoment(name, {
      uri: formatNbdUri({ transport: 'unix', path: this.#socket, name }),
      size: this.#disk(name).size,
      sizeBefore: this.#ways.sizeBefore(name, plan),
      context: plan.parent === undefined ? undefined : DIRTY_CONTEXT,
      explain: (error) => this.#explain(error),
    })
  }

  distrust(): void {
    this.#isDistrusted = true
  }

  settle(backup: string, outcome: Outcome): Promise<void> {
    return (this.#settling ??= this.#settle(backup, outcome))
  }

  get #socket(): string {
    return this.#context.home.qemuSocket(this.#record.id)
  }

  #disk(name: string): SizedDomainDisk {
    const disk = this.#disks.find((one) => one.name === name)
    assert(disk !== undefined, 'a disk of the machine')
    return disk
  }

  #backupOf(checkpoint: string): string {
    return checkpoint.slice(bitmapPrefix(this.#record.id, this.#repository).length)
  }

  #report(message: string): void {
    this.#context.report(`machine ${this.#record.id}: ${message}`)
  }

  #inFolder(file: string): string {
    return path.join(this.#context.home.qemuFolder(this.#record.id), file)
  }

  async #prepare(): Promise<void> {
    const { host } = this.#context
    await host.makeFolder(this.#inFolder(''))
    for (const { name, size } of this.#disks) {
      this.#kept += keepScratch(this.#context, size)
      const file = this.#inFolder(`scratch-${name}.qcow2`)
      // libvirt makes it, and removes it when its job ends.
      await host.unlink(file)
      this.#files.push(file)
    }
    const useless = this.#checkpoints.filter(
      ({ name, whole }) => whole.size === 0 || !this.#ways.isKnown(this.#backupOf(name)),
    )
    for (const { name } of useless) await deleteCheckpoint(this.#virsh, name)
  }

  async #take(backup: string): Promise<void> {
    const disks = this.#disks.map(({ name }, index): PulledDisk => {
      const parent = this.#plans.get(name)?.parent
      const since = parent === undefined ? undefined : bitmapName(this.#record.id, this.#repository, parent)
      return { name, scratch: this.#files[index] as string, since }
    })
    const marked = new Set(
      this.#disks.filter(({ treatment }) => treatment.kind === 'persistent').map(({ name }) => name),
    )
    const job = await this.#describe('backup.xml', backupXml({ socket: this.#socket, all: this.#all, disks }))
    const checkpoint = checkpointXml(bitmapName(this.#record.id, this.#repository, backup), this.#all, marked)
    const mark = marked.size === 0 ? undefined : await this.#describe('checkpoint.xml', checkpoint)
    try {
      await beginPull(this.#virsh, job, mark)
    } catch (error) {
      if (!isBlockError(error, 'io')) throw error
      const advice = `QEMU must be able to make ${this.#socket} and files in ${this.#inFolder('')}, also by AppArmor or SELinux`
      throw new BlockError('io', `${error.message}. ${advice}`, {}, error)
    }
    this.#watchScratch().catch((error: unknown) => this.#report(toBlockError(error, 'its scratch').message))
  }

  /** virsh takes what it is to do as a file. */
  async #describe(name: string, text: string): Promise<string> {
    const { host } = this.#context
    const file = this.#inFolder(name)
    await host.unlink(file)
    const opened = await host.open(file, { write: true, create: 'exclusive' })
    try {
      const bytes = Buffer.from(text)
      await opened.write(0, bytes.length, bytes, 0)
    } finally {
      await opened.close()
    }
    this.#files.push(file)
    return file
  }

  /** Ends the job when it has saved more than was kept for it: the backup breaks then, and the guest goes on. */
  async #watchScratch(): Promise<void> {
    const { signal } = this.#ended
    while (!signal.aborted) {
      const found = await Promise.all(this.#files.map((file) => this.#context.host.status(file)))
      const used = found.reduce((sum, status) => sum + (status?.allocated ?? 0), 0)
      if (used > this.#kept) {
        this.#isTooMuch = true
        await tidyDomain(this.#virsh, this.#socket)
        return
      }
      await delay(VIRSH_SCRATCH_LOOK_MS, undefined, { signal }).catch(() => undefined)
    }
  }

  #explain(error: unknown): unknown {
    if (!isBlockError(error)) return error
    const moment = `the moment of machine ${this.#record.id} is gone`
    if (this.#isTooMuch) {
      const message = `${moment}: what its guest overwrote took more than ${formatSize(this.#kept)} of scratch; the guest went on`
      return new BlockError('no-space', message, {}, error)
    }
    if (error.kind !== 'closed') return error
    const message = `${moment}: somebody ended libvirt's backup job, or the machine ended`
    return new BlockError('closed', message, {}, error)
  }

  async #settle(backup: string, outcome: Outcome): Promise<void> {
    this.#ended.abort()
    try {
      for (const waitMs of QMP_SETTLE_AGAIN_MS) {
        const error = await this.#cleaned(backup, outcome)
        if (error === undefined) return
        const why = `its backup leaves something at libvirt: ${error.message}`
        // A machine that does not run has no job, and its checkpoints stay until it does.
        const isLast = waitMs === 0 || error.kind === 'closed'
        this.#report(`${why}; ${isLast ? 'it is removed at the next contact' : `again in ${waitMs} ms`}`)
        if (isLast) return
        await delay(waitMs)
      }
    } finally {
      for (const file of this.#files.splice(0)) await this.#context.host.unlink(file)
      this.#context.scratchBudget.give(this.#kept)
      this.#kept = 0
    }
  }

  /** Removes all but the checkpoint that stays; why it could not, if it could not. */
  async #cleaned(backup: string, outcome: Outcome): Promise<BlockError | undefined> {
    try {
      await tidyDomain(this.#virsh, this.#socket)
      const mine = bitmapName(this.#record.id, this.#repository, backup)
      const stays = (name: string): boolean => !this.#isDistrusted && (name === mine) === (outcome === 'kept')
      for (const { name } of await ownCheckpoints(this.#virsh, this.#record, this.#repository))
        if (!stays(name)) await deleteCheckpoint(this.#virsh, name)
      return undefined
    } catch (error) {
      return toBlockError(error, `machine ${this.#record.id}`)
    }
  }
}

/** The checkpoints of a repository's backups, newest first. */
async function ownCheckpoints(virsh: Virsh, { id }: DomainRecord, repository: string): Promise<Checkpoint[]> {
  const prefix = bitmapPrefix(id, repository)
  const own = await readCheckpoints(virsh, (name) => isBitmapOf(id, name) && name.startsWith(prefix))
  return own.toSorted((a, b) => (a.name < b.name ? 1 : -1))
}

function jobAtDisk({ name, place: { connect, domain } }: Virsh, disk: SizedDomainDisk): BlockError {
  const advice = `wait for its end, or end it: virsh -c ${connect} blockjob ${domain} ${disk.name} --abort`
  return new BlockError('busy', `${name}: a block job (${disk.job}) is at work on ${disk.name}; ${advice}`)
}
