// Checks an image, and repairs it when told, in the fields of `qemu-img check --output=json`. Its backing files are neither
// needed nor looked at.

import { assert } from '../base/assert.ts'
import { BlockError } from '../block/error.ts'
import type { CheckResult } from '../format/qcow2/check.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { type RepairKind, repairQcow2 } from '../format/qcow2/repair.ts'
import { type OpenImageOptions, openMetadata, probeFormat } from './open-image.ts'

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
  /** After the repair, when there was one. */
  readonly report: CheckReport
  /** The first few findings, a sentence each. */
  readonly problems: readonly string[]
  /** Likewise, what was found before the repair. */
  readonly repaired: readonly string[]
}

export interface CheckFileOptions extends OpenImageOptions {
  /** Repairs too, and checks again: leaked space alone, or all that can be repaired. */
  readonly repair?: RepairKind | undefined
}

/**
 * Checks the image. Kinds: those of `openMetadata`, those of `repairQcow2`, and 'unsupported' for a raw image, which has
 * nothing to check.
 */
export async function checkFile(options: CheckFileOptions): Promise<Checked> {
  const { host, path, repair } = options
  const format = options.format ?? (await probeFormat(host, path))
  if (format !== 'qcow2')
    throw new BlockError('unsupported', `${path} is a ${format} image, which has nothing to check`, { path })
  if (repair === undefined) {
    const result = await checkOnly({ ...options, format })
    return { report: reportOf(path, result), problems: result.problems, repaired: [] }
  }
  if (options.forceShare === true) {
    const message = `${path} cannot be repaired while others use it: leave out -U`
    throw new BlockError('invalid-argument', message, { path })
  }
  if ((await host.status(path)) === undefined)
    throw new BlockError('not-found', `the image ${path} does not exist`, { path })
  const result = await repairQcow2(host, path, repair)
  const fixed = {
    ...nonZero('corruptions-fixed', result.corruptionsFixed),
    ...nonZero('leaks-fixed', result.leaksFixed),
  }
  return { report: { ...reportOf(path, result), ...fixed }, problems: result.problems, repaired: result.found }
}

async function checkOnly(options: OpenImageOptions): Promise<CheckResult> {
  const layer = await openMetadata(options)
  try {
    assert(layer instanceof Qcow2Image)
    return await layer.check()
  } finally {
    await layer.close()
  }
}

function reportOf(filename: string, result: CheckResult): CheckReport {
  return {
    filename,
    format: 'qcow2',
    'check-errors': result.checkErrors,
    ...nonZero('image-end-offset', result.imageEndOffset),
    ...nonZero('corruptions', result.corruptions),
    ...nonZero('leaks', result.leaks),
    ...nonZero('total-clusters', result.totalClusters),
    ...nonZero('allocated-clusters', result.allocatedClusters),
    ...nonZero('fragmented-clusters', result.fragmentedClusters),
    ...nonZero('compressed-clusters', result.compressedClusters),
  }
}

function nonZero(name: keyof CheckReport, count: number): Partial<CheckReport> {
  return count === 0 ? {} : { [name]: count }
}
