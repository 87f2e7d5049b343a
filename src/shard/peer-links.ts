// Other daemons, as a shard sees them: it asks through the control plane, which alone speaks to them, and has their exports behind a Unix
// socket of our own.

import { MIRROR_CONNECTIONS } from '../base/limits.ts'
import type { PeerLink, Peers } from '../engine/peers.ts'
import { connectNbd } from '../nbd/client.ts'
import type { Remote } from './calls.ts'
import type { ControlFunctions } from './messages.ts'

export function peersThrough(control: Remote<ControlFunctions>): Peers {
  return {
    prepare: (to, request) => control.peerPrepare(to, request),
    step: (to, token, step) => control.peerStep(to, token, step),
    connect: async (to, token) => linkAt(await control.peerSocket(to, token), token),
  }
}

async function linkAt(path: string, token: string): Promise<PeerLink> {
  const client = await connectNbd({ transport: 'unix', path, name: token }, { connections: MIRROR_CONNECTIONS })
  return { device: client, lost: () => client.failure, abandon: (error) => client.abandon(error) }
}
