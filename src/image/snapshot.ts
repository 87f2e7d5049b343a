// The internal snapshots of a qcow2 image, offline: lists, makes, applies and deletes them. How is format/qcow2's work.

import { BlockError } from '../block/error.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { describeSnapshot, type SnapshotInfo } from './info.ts'
import { openImageAlone, type OpenImageOptions } from './open-image.ts'

/** What to do; a snapshot is named by its id or, where no id is equal to it, by its name. */
export interface SnapshotChange {
  readonly kind: 'create' | 'apply' | 'delete'
  readonly snapshot: string
}

type Progress = (done: number, total: number) => void

const WORK: Readonly<
  Record<SnapshotChange['kind'], (image: Qcow2Image, name: string, progress: Progress) => Promise<unknown>>
> = {
  create: (image, name, progress) => image.createSnapshot(name, progress),
  apply: (image, name, progress) => image.applySnapshot(name, progress),
  delete: (image, name, progress) => image.deleteSnapshot(name, progress),
}

/** The internal snapshots, oldest first. Kinds: those of `openImageAlone`, and 'unsupported' for an image that has none. */
export async function listSnapshots(options: OpenImageOptions): Promise<SnapshotInfo[]> {
  const image = await openQcow2Alone(options)
  try {
    return image.snapshots.map(describeSnapshot)
  } finally {
    await image.close()
  }
}

/**
 * Makes, applies or deletes one; durable on return. `progress` hears of L2 tables done, and of how many there are. Kinds: those
 * of `openImageAlone`, 'busy', 'permission', and those of the image's `createSnapshot`, `applySnapshot` and `deleteSnapshot`.
 */
export async function changeSnapshots(
  options: OpenImageOptions,
  { kind, snapshot }: SnapshotChange,
  progress: Progress,
): Promise<void> {
  const image = await openQcow2Alone(options)
  try {
    await image.setAccess('write')
    await WORK[kind](image, snapshot, progress)
  } finally {
    await image.close()
  }
}

async function openQcow2Alone(options: OpenImageOptions): Promise<Qcow2Image> {
  const layer = await openImageAlone(options)
  if (layer instanceof Qcow2Image) return layer
  await layer.close()
  const message = `${options.path} is ${layer.format}, which has no internal snapshots; varve snapshot makes live ones of a disk`
  throw new BlockError('unsupported', message, { path: options.path })
}
