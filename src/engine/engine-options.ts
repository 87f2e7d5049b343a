// What an engine is given: the host and the home, how things are served and repositories opened, its budgets, and where it is one
// of several, what it must know of the others.

import type { ScratchBudget } from '../chain/scratch-budget.ts'
import type { Host } from '../host/host.ts'
import type { PartPace } from '../job/backup.ts'
import type { Bandwidth } from '../job/bandwidth.ts'
import type { MirrorPace } from '../job/mirror.ts'
import type { MergePaces } from '../job/settler.ts'
import type { Repository } from '../repository/repository.ts'
import type { BackupParty } from './backup-party.ts'
import type { Turn } from './backup-queue.ts'
import type { Catalog } from './catalog.ts'
import type { ServeDisk, ServeView } from './context.ts'
import type { FarEar } from './guest-ears.ts'
import type { GuestHold } from './guest-freezer.ts'
import type { Home } from './home.ts'
import type { Peers } from './peers.ts'

export interface EngineOptions {
  readonly host: Host
  readonly home: Home
  /** Called when the home is ours. */
  readonly openCatalog: () => Catalog
  readonly serve: ServeDisk
  readonly serveView: ServeView
  readonly openRepository: (location: string) => Promise<Repository>
  /** Other daemons, to migrate disks to; none unless given. */
  readonly peers?: Peers
  readonly report: (message: string, details?: Record<string, unknown>) => void
  /** How mirrors and merges copy; tests have small pieces. */
  readonly mirrorPace?: MirrorPace
  readonly mergePaces?: MergePaces
  /** When backups keep what they have so far; tests do it often. */
  readonly partPace?: PartPace | undefined
  /** Copy space of one backup and of all together, and how much of that is memory at most, in bytes. */
  readonly scratchBytes?: number
  readonly scratchHostBytes?: number
  readonly scratchMemoryBytes?: number
  /** For one engine of several that share a home; whoever has them locks the home. */
  readonly shard?: EngineShard
}

/** What an engine must know of the others. */
export interface EngineShard {
  /** True for a disk that is this engine's. */
  owns(diskId: string): boolean
  /** Backups of machines in QEMUs of their own are this engine's. */
  readonly hasMachines: boolean
  /** Who answers for a disk of another engine. */
  partyOf(disk: string): BackupParty
  /** Of the host, for the disks of all engines together. */
  readonly scratch: ScratchBudget
  readonly scratchMemory: ScratchBudget
  readonly bandwidth: Bandwidth
  readonly backupTurn: Turn
  readonly guests: GuestHold
  /** What the guests of a disk of another engine wait for. */
  readonly farEar: FarEar
}
