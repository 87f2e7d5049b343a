// A backup's party for a disk of another shard: its moment is asked for by calls, its data is read over NBD from the view that the
// other shard exports, and what was read is given back there by TRIM, so that scratch stays as small as for a disk of one's own.

import { GRANULE } from '../base/limits.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import type { ExtentVisitor, Pending } from '../block/device.ts'
import type { BackupParty, Captured, DiskPlan, Outcome, PlanRequest } from '../engine/backup-party.ts'
import type { BackupView } from '../job/backup.ts'
import { connectNbd, type NbdClient } from '../nbd/client.ts'
import type { Remote } from './calls.ts'
import type { PartyFunctions, ViewStats } from './messages.ts'

export class RemoteParty implements BackupParty {
  readonly disk: string
  readonly #asker: number
  readonly #remote: Remote<PartyFunctions>

  /** `asker` is the number of this shard. */
  constructor(disk: string, asker: number, remote: Remote<PartyFunctions>) {
    this.disk = disk
    this.#asker = asker
    this.#remote = remote
  }

  plan(request: PlanRequest): Promise<DiskPlan> {
    const backups = request.backups?.map(({ id, moment, kind, labels, disks }) => ({
      id,
      moment,
      kind,
      labels,
      disks: disks.map(({ name, size }) => ({ name, size })),
    }))
    return this.#remote.partyPlan(this.disk, { ...request, backups })
  }

  freeze(): Promise<void> {
    return this.#remote.partyFreeze(this.disk, this.#asker)
  }

  async capture(plan: DiskPlan, backup: string): Promise<Captured> {
    const { socket, size, changed } = await this.#remote.partyCapture(this.disk, plan, backup)
    const durable = this.#remote.partyDurable(this.disk)
    durable.catch(() => undefined)
    const client = await connectNbd({ transport: 'unix', path: socket, name: '' })
    const view = new RemoteView(client, {
      restrict: (needed) => this.#remote.partyRestrict(this.disk, needed),
      stats: () => this.#remote.partyStats(this.disk),
    })
    return { view, changed: changed === undefined ? undefined : Bitmap.fromBytes(size, GRANULE, changed), durable }
  }

  thaw(): Promise<void> {
    return this.#remote.partyThaw(this.disk)
  }

  keepPart(bitmap: string, backup: string, part: string, rest: Bitmap): Promise<void> {
    return this.#remote.partyKeepPart(this.disk, { bitmap, backup, part, size: rest.size, rest: rest.toBytes() })
  }

  distrust(bitmap: string, backup: string, reason: string): Promise<void> {
    return this.#remote.partyDistrust(this.disk, bitmap, backup, reason)
  }

  settle(bitmap: string, backup: string, outcome: Outcome): Promise<void> {
    return this.#remote.partySettle(this.disk, bitmap, backup, outcome)
  }
}

interface ViewCalls {
  restrict(needed: Uint8Array): Promise<void>
  stats(): Promise<ViewStats>
}

class RemoteView implements BackupView {
  readonly #client: NbdClient
  readonly #calls: ViewCalls
  #stats: ViewStats = { savedBytes: 0, scratchPeak: 0 }
  #isAsking = false

  constructor(client: NbdClient, calls: ViewCalls) {
    this.#client = client
    this.#calls = calls
  }

  get size(): number {
    return this.#client.size
  }

  get savedBytes(): number {
    return this.#stats.savedBytes
  }

  get scratchPeak(): number {
    return this.#stats.scratchPeak
  }

  read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    return this.#client.read(offset, length, into, at)
  }

  extents(offset: number, length: number, visit: ExtentVisitor): Pending {
    return this.#client.extents(offset, length, visit)
  }

  restrict(needed: Bitmap): void {
    // Should it not arrive, scratch holds more than it must, and the reads that follow say what is wrong.
    this.#calls.restrict(needed.toBytes()).catch(() => undefined)
  }

  release(offset: number, length: number): void {
    this.#client.trim(offset, length, 0)?.catch(() => undefined)
    if (this.#isAsking) return
    this.#isAsking = true
    this.#calls
      .stats()
      .then((stats) => (this.#stats = stats))
      .catch(() => undefined)
      .finally(() => (this.#isAsking = false))
  }

  flushDisk(): Pending {
    return this.#client.flush()
  }

  close(): Promise<void> {
    return this.#client.close()
  }
}
