// The places of shards in the control plane: a thread may die and be started again, its place and its disks stay.

import type { Worker } from 'node:worker_threads'
import type { Catalog } from '../engine/catalog.ts'
import type { Calls } from './calls.ts'
import { MACHINES_SEAT, type ShardFunctions } from './messages.ts'

/** One thread and how to reach it. */
export interface Shard {
  readonly number: number
  readonly worker: Worker
  readonly calls: Calls<ShardFunctions>
  /** Resolves when its disks are open. */
  ready: Promise<void>
}

/** A shard's place: the thread that is there now, and the disks that belong to it. */
export interface Seat {
  readonly number: number
  readonly disks: Set<string>
  shard: Shard | undefined
  /** Deaths in a row, and when the last one was. */
  deaths: number
  diedMs: number
}

/** Those that have disks, and that of machines in QEMUs of their own when there are any. */
export function seatsInUse(seats: readonly Seat[], catalog: Pick<Catalog, 'list'>): Seat[] {
  const hasMachines = catalog.list('machine').some(({ qemu }) => qemu !== undefined)
  return seats.filter(({ disks, number }) => disks.size > 0 || (hasMachines && number === MACHINES_SEAT))
}
