// Makes the disk of an image larger or smaller. What is added reads as zeros; what is cut off is lost, so that has to be said.

import { roundUp } from '../base/round.ts'
import { BlockError } from '../block/error.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { RawImage } from '../format/raw/raw.ts'
import { openImage, type OpenImageOptions } from './open-image.ts'

export interface ResizeOptions extends OpenImageOptions {
  /** Bytes to set, to add or to take away; rounded up to whole sectors. */
  readonly change: { readonly kind: 'to' | 'by'; readonly bytes: number }
  readonly shrink?: boolean
  readonly preallocation?: 'off' | 'metadata' | 'falloc' | 'full'
}

/** A disk is a whole number of these, in bytes, since that is how other programs count it. */
const SECTOR = 512

/** The sizes before and after. Kinds: those of `openImage`, and 'invalid-argument' for a size that cannot be. */
export async function resizeImage(options: ResizeOptions): Promise<{ readonly from: number; readonly to: number }> {
  const { change, shrink = false, preallocation = 'off' } = options
  const chain = await openImage(options)
  try {
    const { active } = chain
    const from = active.size
    const to = roundUp(change.kind === 'to' ? change.bytes : from + change.bytes, SECTOR)
    const invalid = (what: string): BlockError =>
      new BlockError('invalid-argument', `${options.path} ${what}`, { path: options.path })
    if (to < 0) throw invalid(`has ${from} bytes, less than is to be taken away`)
    if (to < from && !shrink) throw invalid(`would lose what is past ${to} bytes; --shrink says that this is meant`)
    if (to < from && preallocation !== 'off') throw invalid('can only be preallocated when it grows')
    if (to === from) return { from, to }
    await active.setAccess('write')
    if (active instanceof RawImage) {
      if (preallocation === 'metadata') throw invalid('is raw and has no metadata to preallocate; use falloc or full')
      await active.resize(to, { shrink, preallocation })
    } else if (active instanceof Qcow2Image) {
      await active.resize(to, { shrink, preallocation })
    }
    return { from, to }
  } finally {
    await chain.close()
  }
}
