// Makes the copied flags of a qcow2 image's active tables what was counted: set where a cluster has one reference, clear
// elsewhere. For repairs; while an image is written its tables keep their flags right by themselves.

import type { Pending } from '../../block/device.ts'
import type { Clashes } from './clashes.ts'
import { type Roots, walkReferences } from './references.ts'
import type { Tally } from './tally.ts'

/** Sets the flags of the entries that lead into the tally's window, or into a data file, where no clash is. A sync must follow. */
export async function setCopiedFlags(roots: Roots, tally: Tally, clashes: Clashes): Promise<void> {
  const { file, header } = roots
  const byte = new Uint8Array(1)
  const setFlag = async (place: number, isCopied: boolean): Promise<void> => {
    await file.read(place, 1, byte, 0)
    byte[0] = ((byte[0] as number) & 0x7f) | (isCopied ? 0x80 : 0)
    await file.write(place, 1, byte, 0)
  }
  await walkReferences(roots, {
    area: () => undefined,
    flaw: () => undefined,
    invalid: () => undefined,
    flag(place, target, isCopied): Pending {
      const cluster = Math.floor(target / header.clusterSize)
      if (cluster >= 0 && !tally.has(cluster)) return undefined
      const should = cluster < 0 || tally.count(cluster) === 1
      return should === isCopied || !clashes.mayWrite(place) ? undefined : setFlag(place, should)
    },
  })
}
