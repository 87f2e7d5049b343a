// What a conversion reads: an image with its backing files, one of its internal snapshots, or several images in a row.

import { type BlockDevice, type Layer, OWNED_ZERO, UNALLOCATED, ZERO } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { Chain } from '../chain/chain.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { LEFT_ALONE } from './copy.ts'
import type { AskExtents } from './extent-walk.ts'
import { JoinedDevice } from './joined-device.ts'
import { openImage, type OpenImageOptions } from './open-image.ts'

export interface ConvertSource {
  readonly device: BlockDevice
  /** What the image itself owns, in the bits of a copy; of several images none. */
  readonly owned: AskExtents | undefined
  /** The image, when it is one of format qcow2 and no snapshot of it is read. */
  readonly image: Qcow2Image | undefined
  close(): Promise<void>
}

/** Opens all, or none. Kinds as for `openImage`, 'not-found' for the snapshot, 'invalid-argument'. */
export async function openSource(
  images: readonly OpenImageOptions[],
  snapshot: string | undefined,
): Promise<ConvertSource> {
  const chains: Chain[] = []
  const close = async (): Promise<void> => {
    for (const chain of chains) await chain.close()
  }
  try {
    for (const image of images) chains.push(await openImage(image))
    const [first] = chains
    if (first === undefined) throw new BlockError('invalid-argument', 'name an image to convert')
    if (snapshot !== undefined) return await openSnapshot(chains, snapshot, close)
    if (chains.length > 1) return { device: new JoinedDevice(chains), owned: undefined, image: undefined, close }
    const { active } = first
    return { device: first, owned: ownedBy(active), image: active instanceof Qcow2Image ? active : undefined, close }
  } catch (error) {
    await close()
    throw error
  }
}

async function openSnapshot(
  chains: readonly Chain[],
  wanted: string,
  closeChains: () => Promise<void>,
): Promise<ConvertSource> {
  const [chain] = chains
  if (chain === undefined || chains.length > 1)
    throw new BlockError('invalid-argument', 'a snapshot can be converted of one image only')
  if (!(chain.active instanceof Qcow2Image)) {
    const { path } = chain.active
    throw new BlockError('unsupported', `${path} is a raw image, which has no internal snapshots`, { path })
  }
  const view = await chain.active.openSnapshot(wanted)
  const close = async (): Promise<void> => {
    await view.close()
    await closeChains()
  }
  return { device: view, owned: ownedBy(view), image: undefined, close }
}

/** What the layer owns is copied; the rest is left to the target's backing file. */
function ownedBy(layer: Layer): AskExtents {
  const bits = (ownership: number): number =>
    ownership === UNALLOCATED ? LEFT_ALONE : ownership === OWNED_ZERO ? ZERO : 0
  return (offset, length, visit) =>
    layer.allocation(offset, length, (piece, ownership) => visit(piece, bits(ownership)))
}
