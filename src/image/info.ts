// What an image says of itself, in the fields that `qemu-img info --output=json` has. Nothing of the guest's data is read.

import path from 'node:path'
import type { Layer } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { isDirty, isMarkedCorrupt } from '../format/qcow2/header.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import type { Snapshot } from '../format/qcow2/snapshot-table.ts'
import { COMPAT_LAZY_REFCOUNTS } from '../format/qcow2/spec.ts'
import { openImage, type OpenImageOptions, openMetadata } from './open-image.ts'

/** Sizes in bytes. */
export interface ImageInfo {
  readonly filename: string
  readonly format: string
  readonly 'virtual-size': number
  /** What the file takes on the disk. */
  readonly 'actual-size': number
  readonly 'dirty-flag': boolean
  readonly 'cluster-size'?: number
  readonly 'backing-filename'?: string
  readonly 'full-backing-filename'?: string
  readonly 'backing-filename-format'?: string
  /** Internal ones. */
  readonly snapshots?: readonly SnapshotInfo[]
  readonly 'format-specific'?: { readonly type: 'qcow2'; readonly data: Qcow2Info }
}

export interface Qcow2Info {
  readonly compat: '0.10' | '1.1'
  readonly 'compression-type': 'zlib' | 'zstd'
  readonly 'refcount-bits': number
  readonly 'lazy-refcounts'?: boolean
  readonly corrupt?: boolean
  readonly 'extended-l2'?: boolean
  readonly 'data-file'?: string
  readonly 'data-file-raw'?: boolean
  readonly bitmaps?: readonly BitmapDescription[]
}

export interface SnapshotInfo {
  readonly id: string
  readonly name: string
  /** When it was taken: seconds since 1970, and nanoseconds of that second. */
  readonly 'date-sec': number
  readonly 'date-nsec': number
  /** How long the guest had run. */
  readonly 'vm-clock-sec': number
  readonly 'vm-clock-nsec': number
  /** Bytes of saved machine state. */
  readonly 'vm-state-size': number
  /** Instructions that the guest had run, where they were counted. */
  readonly icount?: number
}

export interface BitmapDescription {
  readonly name: string
  /** Bytes. */
  readonly granularity: number
  readonly flags: readonly ('in-use' | 'auto')[]
}

/** What the image at `options.path` says. Its backing files are not opened. Kinds as for `openMetadata`. */
export async function describeImage(options: OpenImageOptions): Promise<ImageInfo> {
  const layer = await openMetadata(options)
  try {
    return await describeLayer(options, layer, options.path)
  } finally {
    await layer.close()
  }
}

/** What each image of the chain says, the active one first. Kinds as for `openImage`. */
export async function describeChain(options: OpenImageOptions): Promise<ImageInfo[]> {
  const chain = await openImage(options)
  try {
    const found: ImageInfo[] = []
    let filename = options.path
    for (const layer of chain.layers.toReversed()) {
      const info = await describeLayer(options, layer, filename)
      found.push(info)
      filename = info['full-backing-filename'] ?? filename
    }
    return found
  } finally {
    await chain.close()
  }
}

async function describeLayer({ host }: OpenImageOptions, layer: Layer, filename: string): Promise<ImageInfo> {
  const status = await host.status(layer.path)
  if (status === undefined) throw new BlockError('not-found', `${filename} is gone`, { path: filename })
  const reference = layer.backingReference
  return {
    filename,
    format: layer.format,
    'virtual-size': layer.size,
    'actual-size': status.allocated,
    'dirty-flag': layer instanceof Qcow2Image && isDirty(layer.header),
    ...(layer instanceof Qcow2Image && {
      'cluster-size': layer.header.clusterSize,
      ...(layer.snapshots.length > 0 && { snapshots: layer.snapshots.map(describeSnapshot) }),
      'format-specific': { type: 'qcow2', data: describeQcow2(layer) },
    }),
    ...(reference !== undefined && {
      'backing-filename': reference.name,
      'full-backing-filename': fullBackingName(filename, reference.name),
    }),
    ...(reference?.format !== undefined && { 'backing-filename-format': reference.format }),
  }
}

/** A snapshot in the fields of qemu-img's JSON. */
export function describeSnapshot(snapshot: Snapshot): SnapshotInfo {
  return {
    id: snapshot.id,
    name: snapshot.name,
    'date-sec': snapshot.seconds,
    'date-nsec': snapshot.nanoseconds,
    'vm-clock-sec': snapshot.vmClockSeconds,
    'vm-clock-nsec': snapshot.vmClockNanoseconds,
    'vm-state-size': snapshot.vmStateSize,
    ...(snapshot.icount !== undefined && { icount: snapshot.icount }),
  }
}

function describeQcow2({ header, bitmaps }: Qcow2Image): Qcow2Info {
  const common = { 'compression-type': header.compression, 'refcount-bits': 2 ** header.refcountOrder }
  if (header.version === 2) return { compat: '0.10', ...common }
  return {
    compat: '1.1',
    ...common,
    'lazy-refcounts': ((header.compatible[7] as number) & COMPAT_LAZY_REFCOUNTS) !== 0,
    corrupt: isMarkedCorrupt(header),
    'extended-l2': header.extendedL2,
    ...(bitmaps.length > 0 && {
      bitmaps: bitmaps.map(({ name, granularity, flags }) => ({ name, granularity, flags })),
    }),
    ...(header.dataFile !== undefined && { 'data-file': header.dataFile.name, 'data-file-raw': header.dataFile.isRaw }),
  }
}

/** A relative name is meant from the image's folder. It is not resolved further, so that it reads as the user wrote it. */
function fullBackingName(filename: string, name: string): string {
  if (path.isAbsolute(name) || /^[a-z][a-z0-9+.-]*:/i.test(name)) return name
  return filename.slice(0, filename.lastIndexOf('/') + 1) + name
}
