// A machine of QEMU's in a backup: a party for each of its disks (backup-party.ts), and what they share, since a QEMU takes one moment of all its
// disks. Each disk has a bitmap that began to record at the last backup's moment and is called after it. It goes on recording while the next
// backup is made, whose own bitmap begins beside it:
//
//   varve-web1-5d0c4e2a-MONDAY     ##.#..  ##.##.      since monday; goes when tuesday's backup is visible
//   varve-web1-5d0c4e2a-TUESDAY            ....#.      since tuesday's moment; goes when tuesday's backup fails
//
// So no failure loses a bit, whenever it comes: the next backup takes the newest bitmap whose backup is in the repository, and removes the others.

import path from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { GRANULE } from '../base/limits.ts'
import { QMP_BITMAP_COARSE, QMP_BITMAP_FINE_MAX, QMP_MOMENT_CBW_S, QMP_SETTLE_AGAIN_MS } from '../base/qemu-limits.ts'
import { assert } from '../base/assert.ts'
import { formatSize } from '../base/size.ts'
import { BlockError, isBlockError, toBlockError } from '../block/error.ts'
import { disksOf, type QemuDisk, readGraph } from '../source/qemu/block-graph.ts'
import { exportMoment, type MomentDisk, type MomentOptions, prepareMoment, takeMoment } from '../source/qemu/moment.ts'
import { bitmapName, bitmapPrefix, frozenName, isBitmapOf, nodeNames } from '../source/qemu/names.ts'
import { listens } from '../source/qemu/nbd-probe.ts'
import { QmpClient } from '../source/qemu/qmp-client.ts'
import type { BackupParty, Captured, DiskPlan, Outcome, PlanRequest } from './backup-party.ts'
import type { EarlierBackup } from './backup-way.ts'
import type { EngineContext } from './context.ts'
import { makeImage } from './new-disk.ts'
import { type QemuMachineRecord, tidyQemu, withQemu } from './qemu-contact.ts'
import { type SkippedDisk, VmDiskPlans } from './vm-disk-plans.ts'
import { keepScratch, openMoment, type VmBackup, type VmMoment, VmParty } from './vm-party.ts'

/** A disk that is in the backup, as the monitor shows it. */
interface Taken extends QemuDisk {
  readonly top: string
  readonly node: string
  readonly device: string
}

export class QemuBackup implements VmBackup, VmMoment {
  readonly skipped: readonly SkippedDisk[]
  readonly #context: EngineContext
  readonly #record: QemuMachineRecord
  /** The id. */
  readonly #repository: string
  readonly #disks: readonly Taken[]
  readonly #ways: VmDiskPlans
  readonly #plans = new Map<string, DiskPlan>()
  readonly #name: MomentOptions['name']
  /** Bytes of the host's scratch that are kept for this moment, and files in use. */
  #kept = 0
  #files: string[] = []
  #client: QmpClient | undefined
  #options: MomentOptions | undefined
  #preparing: Promise<void> | undefined
  #moment: Promise<readonly string[]> | undefined
  #settling: Promise<void> | undefined
  #isDistrusted = false

  constructor(
    context: EngineContext,
    record: QemuMachineRecord,
    repository: string,
    found: readonly QemuDisk[],
    backups: readonly EarlierBackup[],
  ) {
    this.#context = context
    this.#record = record
    this.#repository = repository
    this.#ways = new VmDiskPlans(record.id, repository, backups)
    this.#disks = found.flatMap((disk) => (isTaken(disk) ? [disk] : []))
    this.#name = nodeNames(record.qemu.tag, Date.now())
    const skipped = found.flatMap(({ name, treatment }) =>
      treatment.kind === 'skipped' ? [{ name: this.#ways.fullName(name), reason: treatment.reason }] : [],
    )
    this.skipped = [...skipped, ...this.#ways.unplugged(found.map(({ name }) => name))]
  }

  /** Asks the machine's QEMU, and removes what an earlier backup left there. Kinds of reaching it; 'invalid-argument' without a disk to back up. */
  static async open(
    context: EngineContext,
    record: QemuMachineRecord,
    repository: string,
    backups: readonly EarlierBackup[],
  ): Promise<QemuBackup> {
    return withQemu(record, async (client) => {
      const removed = await tidyQemu(client, record, context.home)
      if (removed.length > 0)
        context.report(`machine ${record.id}: an earlier backup left ${removed.join(', ')} in QEMU: removed`)
      const disks = disksOf(await readGraph(client), record.qemu.tag)
      const backup = new QemuBackup(context, record, repository, disks, backups)
      if (backup.#disks.length > 0) return backup
      const why = backup.skipped.map(({ name, reason }) => `${name}: ${reason}`).join('; ')
      throw new BlockError('invalid-argument', `machine ${record.id} has no disk to back up (${why || 'it has none'})`)
    })
  }

  get parties(): readonly BackupParty[] {
    return this.#disks.map(({ name }) => new VmParty(this, this.#record.id, name))
  }

  plan(name: string, request: PlanRequest): DiskPlan {
    const disk = this.#disk(name)
    const marks = this.#own(disk).map((bitmap) => ({
      backup: this.#backupOf(bitmap.name),
      isWhole: !bitmap.inconsistent,
    }))
    const whyNone =
      disk.treatment.kind === 'transient'
        ? `QEMU was started again, and ${disk.treatment.reason}`
        : 'its image has no bitmap of an earlier backup: QEMU did not end cleanly, or another program removed it'
    const plan = this.#ways.plan({ name, size: disk.size, marks, whyNone }, request)
    this.#plans.set(name, plan)
    return plan
  }

  prepare(): Promise<void> {
    return (this.#preparing ??= this.#prepare())
  }

  async capture(name: string, plan: DiskPlan, backup: string): Promise<Captured> {
    const uris = await (this.#moment ??= this.#take(backup))
    const disk = this.#disk(name)
    const context = `qemu:dirty-bitmap:${frozenName(this.#record.id, this.#repository, backup)}`
    return openMoment(name, {
      uri: uris[this.#disks.indexOf(disk)] as string,
      size: disk.size,
      sizeBefore: this.#ways.sizeBefore(name, plan),
      context: plan.parent === undefined ? undefined : context,
      explain: (error) => this.#explain(error),
    })
  }

  /** QEMU has one answer for whatever cannot be read of a moment any more (NBD_EINVAL). */
  #explain(error: unknown): unknown {
    if (!isBlockError(error, 'invalid-argument')) return error
    const message = `the moment of machine ${this.#record.id} is broken: its scratch of ${formatSize(this.#kept)} is full, or saving to it took longer than ${QMP_MOMENT_CBW_S} s; the guest went on`
    return new BlockError('no-space', message, {}, error)
  }

  distrust(): void {
    this.#isDistrusted = true
  }

  settle(backup: string, outcome: Outcome): Promise<void> {
    return (this.#settling ??= this.#settle(backup, outcome))
  }

  #disk(name: string): Taken {
    const disk = this.#disks.find((one) => one.name === name)
    assert(disk !== undefined, 'a disk of the machine')
    return disk
  }

  /** The bitmaps of this repository's backups, newest first. */
  #own({ bitmaps }: Pick<QemuDisk, 'bitmaps'>): QemuDisk['bitmaps'] {
    const prefix = bitmapPrefix(this.#record.id, this.#repository)
    const own = bitmaps.filter(({ name }) => isBitmapOf(this.#record.id, name) && name.startsWith(prefix))
    return own.toSorted((a, b) => (a.name < b.name ? 1 : -1))
  }

  #backupOf(bitmap: string): string {
    return bitmap.slice(bitmapPrefix(this.#record.id, this.#repository).length)
  }

  async #prepare(): Promise<void> {
    this.#client = await QmpClient.open(this.#record.qemu.qmp)
    const disks: MomentDisk[] = []
    for (const [index, disk] of this.#disks.entries()) {
      const bytes = keepScratch(this.#context, disk.size)
      this.#kept += bytes
      const file = path.join(this.#context.home.qemuFolder(this.#record.id), `scratch-${index}.qcow2`)
      await this.#makeScratch(file, disk.size, bytes)
      disks.push(this.#momentDisk(disk, { path: file, bytes }))
    }
    this.#options = { disks, name: this.#name, socket: this.#context.home.qemuSocket(this.#record.id) }
    await this.#dropUseless(this.#client)
    await prepareMoment(this.#client, this.#options)
    // QEMU has them open: whatever becomes of it or of us, the space comes back.
    await this.#unlinkFiles()
  }

  #momentDisk({ top, node, device, name, size, treatment }: Taken, scratch: MomentDisk['scratch']): MomentDisk {
    const granularity = size <= QMP_BITMAP_FINE_MAX ? GRANULE : QMP_BITMAP_COARSE
    const parent = this.#plans.get(name)?.parent
    const of = parent === undefined ? undefined : bitmapName(this.#record.id, this.#repository, parent)
    return {
      top,
      node,
      device,
      scratch,
      bits: of === undefined ? undefined : { of, frozen: '' },
      recording: { name: '', granularity, persistent: treatment.kind === 'persistent' },
    }
  }

  async #take(backup: string): Promise<readonly string[]> {
    const client = this.#client
    const options = this.#options
    assert(client !== undefined && options !== undefined, 'a moment is prepared before it is taken')
    const { id } = this.#record
    const named: MomentOptions = {
      ...options,
      disks: options.disks.map(({ bits, recording, ...disk }) => ({
        ...disk,
        bits: bits && { of: bits.of, frozen: frozenName(id, this.#repository, backup) },
        recording: { ...recording, name: bitmapName(id, this.#repository, backup) },
      })),
    }
    await takeMoment(client, named)
    const uris = await exportMoment(client, named, await listens(options.socket))
    // The monitor is anybody's again while the backup is copied.
    client.close()
    return uris
  }

  /** Removes bitmaps that no backup needs: of one that did not become visible or is there no more, or that QEMU left inconsistent. */
  async #dropUseless(client: QmpClient): Promise<void> {
    const actions = this.#disks.flatMap(({ node, ...disk }) =>
      this.#own(disk).flatMap(({ name, inconsistent }) =>
        inconsistent || !this.#ways.isKnown(this.#backupOf(name)) ? [removal(node, name)] : [],
      ),
    )
    if (actions.length > 0) await client.execute('transaction', { actions })
  }

  async #settle(backup: string, outcome: Outcome): Promise<void> {
    this.#client?.close()
    try {
      for (const waitMs of QMP_SETTLE_AGAIN_MS) {
        const error = await this.#cleaned(backup, outcome)
        if (error === undefined) return
        const why = `machine ${this.#record.id}: its backup leaves something in QEMU: ${error.message}`
        this.#context.report(`${why}; ${waitMs === 0 ? 'it is removed at the next contact' : `again in ${waitMs} ms`}`)
        if (error.kind === 'not-found') return
        await delay(waitMs)
      }
    } finally {
      await this.#unlinkFiles()
      this.#context.scratchBudget.give(this.#kept)
      this.#kept = 0
    }
  }

  /** Removes all but the bitmaps that stay; why it could not, if it could not. */
  async #cleaned(backup: string, outcome: Outcome): Promise<BlockError | undefined> {
    try {
      await withQemu(this.#record, async (client) => {
        await tidyQemu(client, this.#record, this.#context.home)
        const mine = bitmapName(this.#record.id, this.#repository, backup)
        const stays = (name: string): boolean =>
          !this.#isDistrusted && !name.endsWith('.frozen') && (name === mine) === (outcome === 'kept')
        const disks = disksOf(await readGraph(client), this.#record.qemu.tag)
        const actions = disks.flatMap(({ node, ...disk }) =>
          this.#own(disk).flatMap(({ name }) => (node === undefined || stays(name) ? [] : [removal(node, name)])),
        )
        if (actions.length > 0) await client.execute('transaction', { actions })
      })
      return undefined
    } catch (error) {
      return toBlockError(error, `machine ${this.#record.id}`)
    }
  }

  async #makeScratch(file: string, size: number, bytes: number): Promise<void> {
    const { host } = this.#context
    await host.makeFolder(path.dirname(file))
    await host.unlink(file)
    this.#files.push(file)
    await makeImage(this.#context, file, 'qcow2', size)
    const opened = await host.open(file, { write: true })
    try {
      // All that QEMU may ever write of it; blocks are taken when it does.
      await opened.truncate(bytes)
    } finally {
      await opened.close()
    }
  }

  async #unlinkFiles(): Promise<void> {
    for (const file of this.#files.splice(0)) await this.#context.host.unlink(file)
  }
}

function removal(node: string, name: string): object {
  return { type: 'block-dirty-bitmap-remove', data: { node, name } }
}

function isTaken(disk: QemuDisk): disk is Taken {
  return disk.treatment.kind !== 'skipped' && disk.node !== undefined && disk.device !== undefined
}
