// The party of a disk in a shard, for a snapshot of disks in several of them. The control plane asks; a shard that dies answers
// with kind 'closed', and what it had prepared is removed when its disks are opened again.

import type { SnapshotParty } from '../engine/snapshot-party.ts'
import type { Remote } from './calls.ts'
import type { ShardFunctions } from './messages.ts'

export function remoteSnapshotParty(disk: string, shard: Remote<ShardFunctions>): SnapshotParty {
  return {
    disk,
    prepare: (name) => shard.snapshotPrepare(disk, name),
    freeze: () => shard.snapshotFreeze(disk),
    apply: () => shard.snapshotApply(disk),
    undo: () => shard.snapshotUndo(disk),
  }
}
