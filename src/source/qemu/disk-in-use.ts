// The disks of a machine that its guest can write, which alone are merged, copied and moved.

import { BlockError } from '../../block/error.ts'
import type { QemuDisk } from './block-graph.ts'

/** A disk that the guest can write. */
export type DiskInUse = QemuDisk & { readonly top: string }

/** The disk of that name. Kinds 'not-found', and 'unsupported' when the guest cannot write it. */
export function pick(vm: string, disks: readonly QemuDisk[], disk: string): DiskInUse {
  const found = disks.find(({ name }) => name === disk)
  if (found === undefined)
    throw new BlockError('not-found', `${vm} has no disk ${disk}, but ${disks.map(({ name }) => name).join(', ')}`)
  if (isInUse(found)) return found
  const reason = 'reason' in found.treatment ? found.treatment.reason : 'no image'
  throw new BlockError('unsupported', `disk ${disk} of ${vm} is left as it is: ${reason}`)
}

export function isInUse(disk: QemuDisk): disk is DiskInUse {
  return disk.top !== undefined && disk.treatment.kind !== 'skipped'
}
