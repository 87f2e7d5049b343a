// Changes the persistent bitmaps of a qcow2 image that nobody uses: the actions of `qemu-img bitmap`, one after the other, and a
// bitmap of what was found to differ.

import type { Bitmap } from '../bitmap/bitmap.ts'
import { BlockError } from '../block/error.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { openImageAlone, type OpenImageOptions } from './open-image.ts'

export type BitmapAction =
  /** `granularity` in bytes; the image's default unless told. */
  | { readonly kind: 'add'; readonly granularity: number | undefined }
  | { readonly kind: 'remove' | 'clear' | 'enable' | 'disable' }
  /** Adds what another bitmap has set: of the same image, or of `image`. */
  | { readonly kind: 'merge'; readonly bitmap: string; readonly image: OpenImageOptions | undefined }

/**
 * Does the actions on the bitmap `name` of the image, in order; durable on return. The first that fails ends it, and what was
 * done before it stays. Kinds: those of opening, 'unsupported' for a raw image, and those of `Bitmaps`.
 */
export async function editBitmap(
  image: OpenImageOptions,
  name: string,
  actions: readonly BitmapAction[],
): Promise<void> {
  await withImage(image, async (target) => {
    refuse(target, name, actions)
    for (const action of actions) {
      const merged = action.kind === 'merge' ? await readMerged(action, target) : undefined
      await target.setAccess('write')
      await act(target, name, action, merged)
    }
    await target.setAccess('read')
  })
}

/** Refuses what cannot be done before the image is touched. */
function refuse(target: Qcow2Image, name: string, actions: readonly BitmapAction[]): void {
  const { path } = target
  const found = target.bitmaps.find((bitmap) => bitmap.name === name)
  let state: 'none' | 'whole' | 'broken' = found === undefined ? 'none' : found.isConsistent ? 'whole' : 'broken'
  for (const { kind } of actions) {
    if (kind === 'add' && state !== 'none')
      throw new BlockError('exists', `${path} has a bitmap "${name}" already`, { path })
    if (kind !== 'add' && state === 'none')
      throw new BlockError('not-found', `${path} has no bitmap "${name}"`, { path })
    if (kind !== 'remove' && state === 'broken')
      throw new BlockError('corrupt', `${path}: the bitmap "${name}" is inconsistent and can only be removed`, { path })
    state = kind === 'remove' ? 'none' : 'whole'
  }
}

async function act(target: Qcow2Image, name: string, action: BitmapAction, merged: Bitmap | undefined): Promise<void> {
  const edits = target.bitmapEdits
  switch (action.kind) {
    case 'add':
      return edits.add(name, action.granularity, true)
    case 'remove':
      return edits.remove(name)
    case 'clear':
      return edits.clear(name)
    case 'enable':
      return edits.setRecording(name, true)
    case 'disable':
      return edits.setRecording(name, false)
    case 'merge':
      return edits.merge(name, merged as Bitmap)
  }
}

async function readMerged({ bitmap, image }: BitmapAction & { kind: 'merge' }, target: Qcow2Image): Promise<Bitmap> {
  const found = image === undefined ? await target.readBitmap(bitmap) : await readBitmap(image, bitmap)
  if (found.size === target.size) return found
  const message = `the bitmap "${bitmap}" is of a disk of ${found.size} bytes, and ${target.path} has ${target.size}`
  throw new BlockError('invalid-argument', message, { path: target.path })
}

/** A bitmap of an image. Kinds: those of opening, 'not-found', 'corrupt' when it is inconsistent. */
export async function readBitmap(image: OpenImageOptions, name: string): Promise<Bitmap> {
  let found: Bitmap | undefined
  await withImage(image, async (source) => {
    found = await source.readBitmap(name)
  })
  return found as Bitmap
}

/** Refuses a name that the image has a bitmap of already, and an image that has no bitmaps. Gives the disk's size. */
export async function checkNewBitmap(image: OpenImageOptions, name: string): Promise<number> {
  let size = 0
  await withImage(image, async (target) => {
    size = target.size
    if (target.bitmaps.every((bitmap) => bitmap.name !== name)) return
    throw new BlockError('exists', `${image.path} has a bitmap "${name}" already`, { path: image.path })
  })
  return size
}

/** Saves a bitmap under a new name, one that does not record; durable on return. */
export async function saveNewBitmap(image: OpenImageOptions, name: string, bits: Bitmap): Promise<void> {
  await withImage(image, async (target) => {
    await target.setAccess('write')
    await target.bitmapEdits.save([{ name, bits, isRecording: false }])
    await target.setAccess('read')
  })
}

async function withImage(image: OpenImageOptions, use: (image: Qcow2Image) => Promise<void>): Promise<void> {
  const layer = await openImageAlone(image)
  try {
    if (layer instanceof Qcow2Image) return await use(layer)
    const message = `${image.path} is a raw image, which has no bitmaps; qcow2 has`
    throw new BlockError('unsupported', message, { path: image.path })
  } finally {
    await layer.close()
  }
}
