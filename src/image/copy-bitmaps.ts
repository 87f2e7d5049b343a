// Takes the persistent bitmaps of an image over into a new one that shows the same disk.

import { BlockError } from '../block/error.ts'
import type { BitmapToSave } from '../format/qcow2/bitmap-info.ts'
import type { Qcow2Image } from '../format/qcow2/image.ts'

/**
 * Copies the bitmaps of `source` to `target`, which is written. Kind 'corrupt' for one that is inconsistent, unless these are left
 * out, and 'unsupported' for disks of different sizes, for which no bitmap holds.
 */
export async function copyBitmaps(source: Qcow2Image, target: Qcow2Image, leaveOutBroken: boolean): Promise<void> {
  const copies: BitmapToSave[] = []
  for (const { name, isRecording, isConsistent } of source.bitmaps) {
    if (isConsistent) copies.push({ name, bits: await source.readBitmap(name), isRecording })
    else if (!leaveOutBroken) {
      const message = `${source.path}: the bitmap "${name}" is inconsistent; --skip-broken-bitmaps leaves it out`
      throw new BlockError('corrupt', message, { path: source.path })
    }
  }
  if (copies.length > 0 && source.size !== target.size) {
    const message = `${source.path} has ${source.size} bytes and ${target.path} ${target.size}: bitmaps cannot be copied`
    throw new BlockError('unsupported', message, { path: target.path })
  }
  await target.bitmapEdits.save(copies)
}
