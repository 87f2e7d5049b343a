// The host's part in backups: its limits, and what keeps them for all disks of all threads: the budget of scratch, the bandwidth, and the
// queue. There is one in a home, in the thread that has the catalog; the others get the cells of budget and bandwidth, and ask for turns.

import { ScratchBudget } from '../chain/scratch-budget.ts'
import { Bandwidth } from '../job/bandwidth.ts'
import { BackupQueue } from './backup-queue.ts'
import type { Catalog, CatalogChange } from './catalog.ts'
import type { EngineShard } from './engine-options.ts'
import { expectedScratch } from './forecast.ts'
import { GuestFreezer } from './guest-freezer.ts'
import { changeLimits, type HostChange, hostLimits, type HostLimits, type LimitDefaults } from './host-limits.ts'

/** The limits, and what is so now. */
export interface HostStatus extends HostLimits {
  /** Bytes that all points in time hold, and the most that they ever held since the daemon was started; and what memory is taken for that. */
  readonly scratch: { readonly used: number; readonly peak: number; readonly memory: number }
  /** Backups that have their turn, and how many wait. */
  readonly running: readonly { readonly job: string; readonly machine: string }[]
  readonly waiting: number
}

export interface HostDeskOptions {
  readonly catalog: Pick<Catalog, 'get' | 'list'>
  readonly commit: (changes: readonly CatalogChange[]) => Promise<void>
  readonly defaults: LimitDefaults
  /** Threads that have disks; the first cells are theirs. */
  readonly threads: number
  readonly report: (message: string) => void
}

export class HostDesk {
  readonly scratch: ScratchBudget
  readonly scratchMemory: ScratchBudget
  readonly bandwidth = new Bandwidth()
  readonly queue: BackupQueue
  readonly guests: GuestFreezer
  readonly #options: HostDeskOptions

  constructor(options: HostDeskOptions) {
    this.#options = options
    const { catalog, threads } = options
    this.scratch = ScratchBudget.of(this.#limits.scratchHostBytes, threads)
    this.scratchMemory = ScratchBudget.of(this.#limits.scratchMemoryBytes, threads)
    this.bandwidth.limit = this.#limits.bandwidth
    this.guests = new GuestFreezer(options)
    this.queue = new BackupQueue({
      limits: () => this.#limits,
      scratchUsed: () => this.scratch.used,
      expected: ({ machine, full }) => expectedScratch(catalog.get('forecast', machine), Date.now(), full),
    })
  }

  show(): HostStatus {
    const { scratch, scratchMemory, queue } = this
    return {
      ...this.#limits,
      scratch: { used: scratch.used, peak: scratch.peak, memory: scratchMemory.used },
      running: queue.running.map(({ id, machine }) => ({ job: id, machine })),
      waiting: queue.waiting,
    }
  }

  /** Holds at once, also for what runs: a smaller budget only for what is taken from now on. Kind 'invalid-argument'. */
  async set(change: HostChange): Promise<HostStatus> {
    const { catalog, commit } = this.#options
    await commit([changeLimits(catalog, change)])
    this.scratch.limit = this.#limits.scratchHostBytes
    this.scratchMemory.limit = this.#limits.scratchMemoryBytes
    this.bandwidth.limit = this.#limits.bandwidth
    this.queue.look()
    return this.show()
  }

  get #limits(): HostLimits {
    return hostLimits(this.#options.catalog, this.#options.defaults)
  }
}

/** What an engine has of the host that has the home for itself. */
export function hostOf(
  catalog: Catalog,
  defaults: LimitDefaults,
  report: (message: string) => void,
): Pick<EngineShard, 'scratch' | 'scratchMemory' | 'bandwidth' | 'backupTurn' | 'guests'> {
  const desk = new HostDesk({ catalog, commit: (changes) => catalog.commit(changes), defaults, threads: 1, report })
  desk.guests.recover()
  const { scratch, scratchMemory, bandwidth, queue, guests } = desk
  return { scratch, scratchMemory, bandwidth, backupTurn: queue, guests }
}
