// Checks an image, and repairs it when told, in the fields of `qemu-img check --output=json`. Its backing files are neither
// needed nor looked at.

import { BlockError } from '../block/error.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { openImageAlone, type OpenImageOptions } from './open-image.ts'

/** Counts that are zero are left out, as qemu-img does. */
export interface CheckReport {
  readonly filename: string
  readonly format: string
  /** Parts of the image that could not be checked. */
  readonly 'check-errors': number
  /** Places that are wrong and may lose data. */
  readonly corruptions?: number
  /** Clusters that are counted and that nothing uses. */
  readonly leaks?: number
  readonly 'corruptions-fixed'?: number
  readonly 'leaks-fixed'?: number
  /** Bytes. */
  readonly 'image-end-offset'?: number
  readonly 'total-clusters'?: number
  readonly 'allocated-clusters'?: number
  readonly 'fragmented-clusters'?: number
  readonly 'compressed-clusters'?: number
}

export interface Checked {
  readonly report: CheckReport
  /** The first few findings, a sentence each. */
  readonly problems: readonly string[]
}

/** Checks the image. Kinds: those of `openImageAlone`, and 'unsupported' for a raw image, which has nothing to check. */
export async function checkFile(options: OpenImageOptions): Promise<Checked> {
  const layer = await openImageAlone(options)
  try {
    if (!(layer instanceof Qcow2Image)) {
      const message = `${options.path} is a ${layer.format} image, which has nothing to check`
      throw new BlockError('unsupported', message, { path: options.path })
    }
    const found = await layer.check()
    const report: CheckReport = {
      filename: options.path,
      format: layer.format,
      'check-errors': found.checkErrors,
      ...(found.imageEndOffset > 0 && { 'image-end-offset': found.imageEndOffset }),
      ...nonZero('corruptions', found.corruptions),
      ...nonZero('leaks', found.leaks),
      ...nonZero('total-clusters', found.totalClusters),
      ...nonZero('allocated-clusters', found.allocatedClusters),
      ...nonZero('fragmented-clusters', found.fragmentedClusters),
      ...nonZero('compressed-clusters', found.compressedClusters),
    }
    return { report, problems: found.problems }
  } finally {
    await layer.close()
  }
}

function nonZero(name: keyof CheckReport, count: number): Partial<CheckReport> {
  return count === 0 ? {} : { [name]: count }
}
