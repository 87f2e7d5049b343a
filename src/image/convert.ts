// Converts images: what one or several sources show, in order, becomes one image in another format, size of cluster, or
// compressed. The target appears under its name when it is whole and durable; an existing one is filled in place only when
// that was asked for.

import type { Chain } from '../chain/chain.ts'
import { type Format, openChain } from '../chain/open.ts'
import { IMAGE_LANES, IMAGE_LOST_RANGES_MAX } from '../base/limits.ts'
import { type BlockDevice, OWNED_ZERO, UNALLOCATED, ZERO } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import type { Host } from '../host/host.ts'
import { copyImage, LEFT_ALONE } from './copy.ts'
import { createImage } from './create.ts'
import type { ImageSettings } from './create-options.ts'
import type { AskExtents } from './extent-walk.ts'
import { JoinedDevice } from './joined-device.ts'
import { openImage, type OpenImageOptions } from './open-image.ts'
import { makeWholeFile } from './whole-file.ts'

export interface ConvertOptions {
  readonly host: Host
  readonly sources: readonly OpenImageOptions[]
  readonly target: string
  readonly format: Format
  readonly allowedFolders?: readonly string[] | undefined
  /** Of the new image. With a backing file, that shows what the source does not own itself. */
  readonly settings?: ImageSettings | undefined
  /** Replaces a target that is there. */
  readonly force?: boolean | undefined
  /** Fills a target that is there, of any format; with 'zero' it is known to read as zeros. */
  readonly existing?: 'any' | 'zero' | undefined
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

/** Kinds: 'exists', 'invalid-argument', 'cancelled' by the signal, those of opening and of making images, and of copying. */
export async function convertImage(options: ConvertOptions): Promise<Converted> {
  const source = await openSources(options)
  try {
    const { host, target, force } = options
    if (options.existing !== undefined) return await fill(options, source, target, false)
    return await makeWholeFile({ host, path: target, force }, async (partial) => {
      const { format, settings, allowedFolders = [] } = options
      await createImage({
        host,
        path: partial,
        format,
        settings: { ...settings, size: source.device.size },
        allowedFolders,
      })
      return fill(options, source, partial, settings?.backingName === undefined)
    })
  } finally {
    await source.device.close()
  }
}

interface Source {
  readonly device: BlockDevice
  /** With a backing file behind the target: what the source owns itself. */
  readonly owned: AskExtents | undefined
}

async function openSources({ sources, settings }: ConvertOptions): Promise<Source> {
  const chains: Chain[] = []
  try {
    for (const source of sources) chains.push(await openImage(source))
  } catch (error) {
    for (const chain of chains) await chain.close()
    throw error
  }
  const [first] = chains
  if (first === undefined) throw new BlockError('invalid-argument', 'name an image to convert')
  if (chains.length === 1)
    return { device: first, owned: settings?.backingName === undefined ? undefined : ownedBy(first) }
  return { device: new JoinedDevice(chains), owned: undefined }
}

/** What the active layer owns; the rest is left to the target's backing file. */
function ownedBy({ active }: Chain): AskExtents {
  const bits = (ownership: number): number =>
    ownership === UNALLOCATED ? LEFT_ALONE : ownership === OWNED_ZERO ? ZERO : 0
  return (offset, length, visit) =>
    active.allocation(offset, length, (piece, ownership) => visit(piece, bits(ownership)))
}

async function fill(options: ConvertOptions, source: Source, imagePath: string, isNew: boolean): Promise<Converted> {
  const { host, format, allowedFolders = [], sparse = SPARSE, lanes = IMAGE_LANES } = options
  const target = await openChain({ host, path: imagePath, format, allowedFolders })
  const layer = target.at(-1) as (typeof target)[0]
  const lost = new LostRanges()
  try {
    if (layer.size < source.device.size) {
      const message = `${imagePath} has ${layer.size} bytes, and the source ${source.device.size}: make it larger first`
      throw new BlockError('invalid-argument', message, { path: imagePath })
    }
    await layer.setAccess('write')
    await copyImage({
      source: source.device,
      target: layer,
      unit: layer.clusterSize,
      sparse,
      lanes,
      outOfOrder: options.outOfOrder,
      targetIsZero: isNew || options.existing === 'zero',
      extents: source.owned,
      lost: options.salvage === true ? (...range) => lost.add(...range) : undefined,
      signal: options.signal,
      progress: options.progress,
    })
    await layer.setAccess('read')
  } finally {
    for (const each of target.toReversed()) await each.close()
  }
  return { size: source.device.size, lost: lost.ranges, lostBytes: lost.bytes }
}

/** The ranges that could not be read, neighbours with one reason as one. */
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
