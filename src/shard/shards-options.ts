// What the control plane is given: the host and the home, how other daemons are reached, and its budgets.

import type { Catalog } from '../engine/catalog.ts'
import type { Home } from '../engine/home.ts'
import { noPeers, type Peers } from '../engine/peers.ts'
import type { Host } from '../host/host.ts'

export interface ShardsOptions {
  readonly host: Host
  readonly home: Home
  /** Called when the home is ours. */
  readonly openCatalog: () => Catalog
  readonly report: (message: string, details?: Record<string, unknown>) => void
  /** None unless given. */
  readonly peers?: PeerCalls
  /** At most so many threads; one for each processor unless told. */
  readonly count?: number
  /** Copy space of one backup and of all together, and how much of that is memory at most, in bytes. */
  readonly scratchBytes?: number
  readonly scratchHostBytes?: number
  readonly scratchMemoryBytes?: number
  /** Memory for the maps of all open qcow2 images, in bytes; each thread has its part. */
  readonly metadataCacheBytes?: number
}

/** Other daemons, as the control plane reaches them: `socket` is a Unix socket of ours that leads to a disk there. */
export interface PeerCalls extends Omit<Peers, 'connect'> {
  socket(to: string, token: string): Promise<string>
}

export const noPeerCalls: PeerCalls = { ...noPeers, socket: async () => noPeers.connect('', '').then(() => '') }
