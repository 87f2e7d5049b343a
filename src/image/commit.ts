// Merges an overlay into a backing file, offline. Until the backing file holds everything, durably, the overlay stays as it is
// and is the authority: a crash at any point is harmless, and the commit can be run again. Then the overlay is emptied.
//
//   overlay  . B . .        overlay  . . . .
//   base     A a a A   ->   base     A B a A

import { isZero } from '../base/bytes.ts'
import { COPY_PIECE } from '../base/limits.ts'
import { type Layer, MAY_UNMAP } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { pool } from '../block/pool.ts'
import type { Chain } from '../chain/chain.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { findEntry } from './map.ts'
import { openImage, type OpenImageOptions } from './open-image.ts'

export interface CommitOptions extends OpenImageOptions {
  /** Path of the image of the chain that takes the data; the overlay's own backing file unless told. */
  readonly base?: string | undefined
  /** The overlay keeps its data. So it always is with a base further down, since the images in between have not changed. */
  readonly keep?: boolean | undefined
  readonly progress?: (done: number, total: number) => void
}

/** The image that took the data. Kinds: those of `openImage`, 'invalid-argument' where there is no such base, those of writing. */
export async function commitImage(options: CommitOptions): Promise<{ readonly base: string }> {
  const chain = await openImage(options)
  try {
    const layers = chain.layers.toReversed()
    const depth = await baseDepth(options, layers)
    const base = layers[depth] as Layer
    const overlay = chain.active
    const isEmptied = options.keep !== true && depth === 1
    // What cannot be emptied in the end is refused now.
    if (isEmptied) await overlay.setAccess('write')
    await base.setAccess('write')
    if (base.size < overlay.size) await base.grow(overlay.size)
    await copyDown(chain, layers, depth, options.progress)
    await base.flush()
    if (isEmptied && overlay instanceof Qcow2Image) await overlay.empty()
    return { base: base.path }
  } finally {
    await chain.close()
  }
}

async function baseDepth(options: CommitOptions, layers: readonly Layer[]): Promise<number> {
  const { path } = options
  const invalid = (message: string): BlockError => new BlockError('invalid-argument', message, { path })
  if (layers.length === 1) throw invalid(`${path} has no backing file to commit to`)
  if (options.base === undefined) return 1
  const wanted = await options.host.realPath(options.base)
  const depth = layers.findIndex((layer) => layer.path === wanted)
  if (depth > 0) return depth
  const below = layers.slice(1).map((layer) => layer.path)
  throw invalid(`${options.base} is no backing file of ${path}: those are ${below.join(', ')}`)
}

async function copyDown(
  chain: Chain,
  layers: readonly Layer[],
  depth: number,
  progress?: (done: number, total: number) => void,
): Promise<void> {
  const { active } = chain
  const base = layers[depth] as Layer
  const buffer = pool.take(COPY_PIECE)
  try {
    for (let at = 0; at < active.size; ) {
      const entry = await findEntry(layers, at, active.size - at)
      const end = at + entry.length
      // Zeros above the base are zeros in it, also those that a layer shows because the one below it is shorter.
      if (entry.depth < depth && entry.zero) await base.zero(at, entry.length, MAY_UNMAP)
      for (; entry.depth < depth && !entry.zero && at < end; at += COPY_PIECE) {
        const length = Math.min(COPY_PIECE, end - at)
        await active.read(at, length, buffer, 0)
        if (isZero(buffer, 0, length)) await base.zero(at, length, MAY_UNMAP)
        else await base.write(at, length, buffer, 0, 0)
        progress?.(at + length, active.size)
      }
      at = end
      progress?.(at, active.size)
    }
  } finally {
    pool.give(buffer)
  }
}
