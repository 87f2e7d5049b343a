// What all the work in one open repository shares: its store and keys, what is known to be there, and who does the hashing.

import { systemClock } from '../base/clock.ts'
import type { Inventory } from './inventory.ts'
import type { RepositoryConfig } from './manifest.ts'
import type { Squeezer } from './squeezer.ts'
import type { ObjectStore } from './store.ts'
import type { Vault } from './vault.ts'

export interface Core {
  readonly store: ObjectStore
  readonly vault: Vault
  readonly config: RepositoryConfig
  readonly inventory: Inventory
  readonly squeezer: Squeezer
  /** Milliseconds since 1970, by this host. */
  readonly now: () => number
  /** Written into manifests: program and version. */
  readonly tool: string
  /** For people: who is at work. */
  readonly holder: string
}

/** The store's clock, in milliseconds since 1970, a moment ago: when the object `key` was made, and what passed since. */
export async function storeClock(store: ObjectStore, key: string): Promise<() => number> {
  const madeMs = (await store.status(key))?.createdMs ?? 0
  const start = systemClock.now()
  return () => madeMs + systemClock.now() - start
}
