// Converts images: what one or several sources show, in order, becomes one image in another format, size of cluster, or
// compressed. The target appears under its name when it is whole and durable; an existing one is filled in place only when
// that was asked for.

import os from 'node:os'
import { IMAGE_COMPRESSING_MAX, IMAGE_LANES, IMAGE_LOST_RANGES_MAX } from '../base/limits.ts'
import type { Layer } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { type Format, openChain } from '../chain/open.ts'
import { dataFilePath } from '../format/qcow2/data-file.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { withBackgroundFiles } from '../host/background.ts'
import type { Host } from '../host/host.ts'
import { withLateSync } from '../host/late-sync.ts'
import { Qcow2ClusterStore } from './cluster-store.ts'
import { type ConvertSource, openSource } from './convert-source.ts'
import { copyBitmaps } from './copy-bitmaps.ts'
import { copyImage } from './copy.ts'
import { createImage } from './create.ts'
import type { ImageSettings } from './create-options.ts'
import type { OpenImageOptions } from './open-image.ts'
import { makeWholeFile } from './whole-file.ts'

export interface ConvertOptions {
  readonly host: Host
  readonly sources: readonly OpenImageOptions[]
  /** Reads this internal snapshot of the one source, by its id or name. */
  readonly snapshot?: string | undefined
  readonly target: string
  readonly format: Format
  readonly allowedFolders?: readonly string[] | undefined
  /** Of the new image. With a backing file, that shows what the source does not own itself. */
  readonly settings?: ImageSettings | undefined
  /** Replaces a target that is there. */
  readonly force?: boolean | undefined
  /** Fills a target that is there, of any content; with 'zero' it is known to read as zeros. */
  readonly existing?: 'any' | 'zero' | undefined
  /** Writes compressed clusters; for a target of format qcow2. */
  readonly compress?: boolean | undefined
  /** Copies the persistent bitmaps of the one source; 'consistent' leaves out those that are not. */
  readonly bitmaps?: 'all' | 'consistent' | undefined
  /** Bytes of zeros that are left out, 4096 unless told; 0 writes everything. */
  readonly sparse?: number | undefined
  /** Pieces at work at once. */
  readonly lanes?: number | undefined
  readonly outOfOrder?: boolean | undefined
  /** Goes on over what cannot be read, as zeros. */
  readonly salvage?: boolean | undefined
  readonly signal?: AbortSignal | undefined
  readonly progress?: ((done: number, total: number) => void) | undefined
}

/** Bytes. */
export interface LostRange {
  readonly start: number
  readonly length: number
  readonly reason: string
}

export interface Converted {
  /** Bytes of the disk. */
  readonly size: number
  /** What could not be read and is zeros now: the first ones, and how many bytes they all are. */
  readonly lost: readonly LostRange[]
  readonly lostBytes: number
}

const SPARSE = 4096

/** How many threads of Node's pool a conversion that compresses uses. */
function compressingThreads(): number {
  return Math.min(IMAGE_COMPRESSING_MAX, os.availableParallelism())
}

/** Kinds: 'exists', 'invalid-argument', 'cancelled' by the signal, those of opening and of making images, and of copying. */
export async function convertImage(options: ConvertOptions): Promise<Converted> {
  const source = await openSource(
    options.compress === true ? options.sources : readAhead(options.sources),
    options.snapshot,
  )
  try {
    const { host, target, force, format, settings, allowedFolders = [] } = options
    if (options.existing !== undefined) return await fill(options, source, host, target, options.existing === 'zero')
    return await makeWholeFile({ host, path: target, force }, async (partial) => {
      const late = withLateSync(host)
      const sized = { ...settings, size: source.device.size }
      await createImage({ host: late, path: partial, format, settings: sized, allowedFolders })
      try {
        return await fill(options, source, late, partial, settings?.backingName === undefined)
      } catch (error) {
        if (settings?.dataFile !== undefined) await host.unlink(dataFilePath(partial, settings.dataFile))
        throw error
      }
    })
  } finally {
    await source.close()
  }
}

/** Reads in other threads, which leaves this one to write; they are not to be had where they compress. */
function readAhead(sources: readonly OpenImageOptions[]): OpenImageOptions[] {
  return sources.map((source) => ({ ...source, host: withBackgroundFiles(source.host) }))
}

/** Copies the source to the image at `imagePath`; `isZero` when that reads as zeros. */
async function fill(
  options: ConvertOptions,
  source: ConvertSource,
  host: Host,
  imagePath: string,
  isZero: boolean,
): Promise<Converted> {
  const { format, settings, allowedFolders = [] } = options
  const layers = await openChain({ host, path: imagePath, format, allowedFolders })
  try {
    const layer = layers.at(-1) as Layer
    if (layer.size < source.device.size) {
      const message = `${imagePath} has ${layer.size} bytes, and the source ${source.device.size}: make it larger first`
      throw new BlockError('invalid-argument', message, { path: imagePath })
    }
    await layer.setAccess('write')
    const owned = settings?.backingName === undefined ? undefined : source.owned
    const lost = await copy(options, source, layer, isZero, owned)
    if (options.bitmaps !== undefined) {
      if (source.image === undefined || !(layer instanceof Qcow2Image))
        throw new BlockError('invalid-argument', 'bitmaps can be copied from one qcow2 image to another one only')
      await copyBitmaps(source.image, layer, options.bitmaps === 'consistent')
    }
    await layer.setAccess('read')
    return { size: source.device.size, lost: lost.ranges, lostBytes: lost.bytes }
  } finally {
    for (const layer of layers.toReversed()) await layer.close()
  }
}

async function copy(
  options: ConvertOptions,
  source: ConvertSource,
  target: Layer,
  targetIsZero: boolean,
  extents: ConvertSource['owned'],
): Promise<LostRanges> {
  const { sparse = SPARSE, lanes = IMAGE_LANES, outOfOrder, signal, progress, salvage = false } = options
  const compressed = options.compress === true ? clusterStore(target) : undefined
  const ranges = new LostRanges()
  const lost = salvage ? (...range: Parameters<LostRanges['add']>) => ranges.add(...range) : undefined
  // One for each thread that compresses, and one that is read or written: more would only push each other out of the caches.
  const busy = compressed === undefined ? lanes : Math.min(lanes, compressingThreads() + 1)
  const to = { target, unit: target.clusterSize, targetIsZero, compressed }
  try {
    await copyImage({ source: source.device, extents, ...to, sparse, lanes: busy, outOfOrder, lost, signal, progress })
  } finally {
    compressed?.close()
  }
  return ranges
}

function clusterStore(target: Layer): Qcow2ClusterStore {
  if (target instanceof Qcow2Image) return new Qcow2ClusterStore(target)
  throw new BlockError('invalid-argument', `${target.path} is a raw image, which cannot be compressed; use -O qcow2`)
}

/** The ranges that could not be read, neighbours as one. */
class LostRanges {
  readonly ranges: { start: number; length: number; reason: string }[] = []
  bytes = 0

  add(start: number, length: number, error: unknown): void {
    this.bytes += length
    const reason = error instanceof Error ? error.message : String(error)
    const last = this.ranges.at(-1)
    if (last !== undefined && last.start + last.length === start) last.length += length
    else if (this.ranges.length < IMAGE_LOST_RANGES_MAX) this.ranges.push({ start, length, reason })
  }
}
