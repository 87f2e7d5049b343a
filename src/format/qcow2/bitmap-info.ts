// What others see of a persistent bitmap of a qcow2 image, and what they hand in to be saved as one.

import type { Bitmap } from '../../bitmap/bitmap.ts'

export interface BitmapInfo {
  readonly name: string
  /** Bytes of the disk for each bit. */
  readonly granularity: number
  /** True when every change of the disk is recorded, by any program that knows bitmaps. */
  readonly isRecording: boolean
  /** False when it may have missed a change; it can then only be removed. */
  readonly isConsistent: boolean
  /** The names that QEMU has for the flags. */
  readonly flags: readonly ('in-use' | 'auto')[]
  /** How many granules are set, where that is known without reading them: of what records, while the image is written. */
  readonly count: number | undefined
}

export interface BitmapToSave {
  readonly name: string
  /** Of the disk's size. */
  readonly bits: Bitmap
  readonly isRecording: boolean
}

/** Sets in `to` what `from` has set, as far as both go. */
export function copyRuns(from: Bitmap, to: Bitmap): void {
  from.runs(0, Math.min(from.size, to.size), Number.MAX_SAFE_INTEGER, (offset, length) => {
    to.set(offset, length)
    return true
  })
}
