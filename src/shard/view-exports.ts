// The parties of this shard's disks in backups that other shards make: each disk's moment as an NBD export on a socket of its own.
// Reads and extents are those of the view, TRIM releases, FLUSH flushes the disk itself; nothing can be written. A guest is not
// held for longer than a limit, whatever becomes of the shard that asked.

import { GRANULE, REMOTE_FREEZE_MS } from '../base/limits.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import { BlockError } from '../block/error.ts'
import type { BackupParty, Captured } from '../engine/backup-party.ts'
import { realHost } from '../host/real.ts'
import { ViewDevice } from '../job/view-device.ts'
import { type Export, NbdServer } from '../nbd/server.ts'
import type { PartyFunctions } from './messages.ts'

/** A disk that takes part in another shard's backup. */
interface Taking {
  readonly party: BackupParty
  /** The shard that makes the backup. */
  readonly asker: number
  readonly server: NbdServer
  readonly socket: string
  readonly timer: NodeJS.Timeout
  captured: (Captured & { readonly size: number }) | undefined
}

export class ViewExports {
  readonly #partyOf: (disk: string) => BackupParty
  readonly #socketOf: (disk: string) => string
  readonly #taking = new Map<string, Taking>()

  /** `socketOf` gives the path of a disk's view. */
  constructor(partyOf: (disk: string) => BackupParty, socketOf: (disk: string) => string) {
    this.#partyOf = partyOf
    this.#socketOf = socketOf
  }

  /** Kind 'busy' while the disk takes part in a backup. */
  checkFree(disk: string): void {
    if (this.#taking.has(disk)) throw new BlockError('busy', `disk ${disk} is in use by a backup of several disks`)
  }

  /** What other shards may call. */
  readonly functions: PartyFunctions = {
    partyPlan: (disk, request) => this.#partyOf(disk).plan(request),
    partyFreeze: (disk, asker) => this.#freeze(disk, asker),
    partyCapture: async (disk, plan, backup) => {
      const taking = this.#of(disk)
      const captured = await taking.party.capture(plan, backup)
      taking.captured = { ...captured, size: plan.size }
      return { socket: taking.socket, size: plan.size, changed: captured.changed?.toBytes() }
    },
    partyDurable: async (disk) => void (await this.#of(disk).captured?.durable),
    partyThaw: async (disk) => {
      const taking = this.#taking.get(disk)
      clearTimeout(taking?.timer)
      await taking?.party.thaw()
      if (taking !== undefined && taking.captured === undefined) await this.#end(disk, taking)
    },
    partyRestrict: (disk, needed) => {
      const captured = this.#of(disk).captured
      if (captured !== undefined) captured.view.restrict(Bitmap.fromBytes(captured.size, GRANULE, needed))
    },
    partyStats: (disk) => {
      const view = this.#taking.get(disk)?.captured?.view
      return { savedBytes: view?.savedBytes ?? 0, scratchPeak: view?.scratchPeak ?? 0 }
    },
    partyKeepPart: async (disk, { bitmap, backup, part, size, rest }) =>
      this.#of(disk).party.keepPart(bitmap, backup, part, Bitmap.fromBytes(size, GRANULE, rest)),
    partyDistrust: async (disk, bitmap, backup, reason) => this.#of(disk).party.distrust(bitmap, backup, reason),
    partySettle: async (disk, bitmap, backup, outcome) => {
      const taking = this.#taking.get(disk)
      if (taking !== undefined) await this.#end(disk, taking)
      // Also without a party that captured: after a restart of this shard its bits are pending all the same.
      await (taking?.party ?? this.#partyOf(disk)).settle(bitmap, backup, outcome)
    },
  }

  /** The shard that made a backup is gone: its guests go on, its views end. Their bits are settled by whoever knows how it ended. */
  async askerDied(asker: number): Promise<void> {
    for (const [disk, taking] of this.#taking) if (taking.asker === asker) await this.#end(disk, taking)
  }

  /** Ends every view. */
  async close(): Promise<void> {
    for (const [disk, taking] of this.#taking) await this.#end(disk, taking)
  }

  async #freeze(disk: string, asker: number): Promise<void> {
    const old = this.#taking.get(disk)
    if (old !== undefined) await this.#end(disk, old)
    const party = this.#partyOf(disk)
    const socket = this.#socketOf(disk)
    const served = (): Export | undefined => {
      const view = this.#taking.get(disk)?.captured?.view
      return view === undefined
        ? undefined
        : { name: '', device: new ViewDevice(`${disk} (view)`, view, { acknowledges: true }) }
    }
    const server = new NbdServer({ find: served, list: () => [] })
    await server.listenUnix(socket)
    try {
      await party.freeze()
    } catch (error) {
      await server.close()
      await realHost.unlink(socket)
      throw error
    }
    const timer = setTimeout(() => void party.thaw(), REMOTE_FREEZE_MS)
    this.#taking.set(disk, { party, asker, server, socket, timer, captured: undefined })
  }

  async #end(disk: string, { party, server, socket, timer, captured }: Taking): Promise<void> {
    this.#taking.delete(disk)
    clearTimeout(timer)
    await party.thaw()
    await server.close()
    await realHost.unlink(socket)
    await captured?.view.close()
  }

  #of(disk: string): Taking {
    const taking = this.#taking.get(disk)
    if (taking !== undefined) return taking
    throw new BlockError('closed', `disk ${disk} does not take part in a backup any more`, { device: disk })
  }
}
