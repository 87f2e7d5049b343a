// Gives an overlay another backing file, or none. In safe mode the disk reads as before: where the old and the new backing file
// differ and the overlay holds nothing, the old content is copied into the overlay. Only when all of that is durable does the
// header change, so that a crash at any point leaves the disk as it was.

import { equalBytes, isZero } from '../base/bytes.ts'
import { COPY_PIECE } from '../base/limits.ts'
import { type BlockDevice, type Layer, MAY_UNMAP, UNALLOCATED } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { MemoryDevice } from '../block/memory.ts'
import { pool } from '../block/pool.ts'
import type { Chain } from '../chain/chain.ts'
import { backingPath, type Format } from '../chain/open.ts'
import { PaddedFilter } from '../filter/padded.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { findEntry } from './map.ts'
import { openImage, openImageAlone, type OpenImageOptions } from './open-image.ts'

export interface RebaseOptions extends OpenImageOptions {
  /** The new backing file, as the header shall name it; undefined for none, which makes the image whole in itself. */
  readonly backing: { readonly name: string; readonly format: Format } | undefined
  /** Changes the name alone, and looks at no backing file: for one that was moved or renamed. */
  readonly unsafe?: boolean
  readonly progress?: (done: number, total: number) => void
}

/** Kinds: those of `openImage` for the image and for the new backing file, and those of writing. */
export async function rebaseImage(options: RebaseOptions): Promise<void> {
  if (options.unsafe === true) {
    const layer = await openImageAlone(options)
    try {
      await rename(overlayOf(layer, options.path), options.backing)
    } finally {
      await layer.close()
    }
    return
  }
  const chain = await openImage(options)
  try {
    const overlay = overlayOf(chain.active, options.path)
    const below = await openNewBacking(options, chain)
    try {
      await overlay.setAccess('write')
      // Where nothing shows through, the overlay would keep no zeros; but under the new backing file it may need them.
      overlay.backing = new PaddedFilter(overlay.backing ?? new MemoryDevice(0), overlay.size)
      await new Difference(overlay, chain, below, options.progress).copy()
      await overlay.flush()
    } finally {
      await below?.close()
    }
    await rename(overlay, options.backing)
  } finally {
    await chain.close()
  }
}

function overlayOf(layer: Layer, path: string): Qcow2Image {
  if (layer instanceof Qcow2Image) return layer
  const message = `${path} is a ${layer.format} image, which cannot have a backing file; convert it to qcow2`
  throw new BlockError('unsupported', message, { path })
}

async function rename(overlay: Qcow2Image, backing: RebaseOptions['backing']): Promise<void> {
  await overlay.setAccess('write')
  await overlay.setBackingReference(backing)
}

async function openNewBacking(options: RebaseOptions, old: Chain): Promise<Chain | undefined> {
  const { host, backing, allowedFolders } = options
  if (backing === undefined) return undefined
  const path = backingPath(old.active.path, backing.name)
  const below = await openImage({ host, path, format: backing.format, allowedFolders })
  if (below.layers.every((layer) => layer.path !== old.active.path)) return below
  await below.close()
  const message = `${options.path} cannot be based on ${backing.name}, which is the image itself or based on it`
  throw new BlockError('invalid-argument', message, { path })
}

/** What the overlay must take over, so that it reads over the new backing file as over the old. */
class Difference {
  readonly #overlay: Layer
  /** Version 2 keeps no zeros: it would leave a range alone that reads as zeros now. */
  readonly #hasZeros: boolean
  readonly #old: readonly Layer[]
  readonly #new: readonly Layer[]
  readonly #progress: ((done: number, total: number) => void) | undefined

  constructor(
    overlay: Qcow2Image,
    chain: Chain,
    below: Chain | undefined,
    progress?: (done: number, total: number) => void,
  ) {
    this.#overlay = overlay
    this.#hasZeros = overlay.header.version === 3
    this.#old = chain.layers.toReversed().slice(1)
    this.#new = below?.layers.toReversed() ?? []
    this.#progress = progress
  }

  async copy(): Promise<void> {
    const { size } = this.#overlay
    for (let at = 0; at < size; ) {
      const { length, isOwned } = await this.#ownership(at, size - at)
      if (!isOwned) await this.#copyRange(at, at + length)
      at += length
      this.#progress?.(at, size)
    }
  }

  async #ownership(at: number, length: number): Promise<{ length: number; isOwned: boolean }> {
    let found = { length, isOwned: false }
    await this.#overlay.allocation(at, length, (piece, ownership) => {
      found = { length: piece, isOwned: ownership !== UNALLOCATED }
      return false
    })
    return found
  }

  async #copyRange(at: number, end: number): Promise<void> {
    while (at < end) {
      const before = await source(this.#old, at, Math.min(end - at, COPY_PIECE))
      const after = await source(this.#new, at, before.length)
      // The same file shows the same bytes at the same place, whatever lies between it and the overlay.
      const isSame = before.device === after.device || before.path === after.path
      if (!isSame) await this.#copyDifferent(at, after.length, before.device, after.device)
      at += after.length
      this.#progress?.(at, this.#overlay.size)
    }
  }

  async #copyDifferent(at: number, length: number, before?: BlockDevice, after?: BlockDevice): Promise<void> {
    const old = pool.take(length)
    const fresh = pool.take(length)
    try {
      await readOrZero(before, at, length, old)
      await readOrZero(after, at, length, fresh)
      const unit = this.#overlay.clusterSize
      for (let done = 0; done < length; ) {
        // Up to the next start of a cluster, which is what the overlay takes as a whole anyway.
        const piece = Math.min(length - done, unit - ((at + done) % unit))
        if (!equalBytes(old.subarray(done, done + piece), fresh.subarray(done, done + piece))) {
          if (this.#hasZeros && isZero(old, done, piece)) await this.#overlay.zero(at + done, piece, MAY_UNMAP)
          else await this.#overlay.write(at + done, piece, old, done, 0)
        }
        done += piece
      }
    } finally {
      pool.give(old)
      pool.give(fresh)
    }
  }
}

/** Who shows the beginning of the range: nobody where it reads as zeros. */
interface Source {
  readonly length: number
  readonly device: BlockDevice | undefined
  readonly path: string | undefined
}

async function source(layers: readonly Layer[], at: number, length: number): Promise<Source> {
  const top = layers[0]
  if (top === undefined || at >= top.size) return { length, device: undefined, path: undefined }
  const entry = await findEntry(layers, at, Math.min(length, top.size - at))
  const layer = entry.zero ? undefined : layers[entry.depth]
  return { length: entry.length, device: layer, path: layer?.path }
}

async function readOrZero(
  device: BlockDevice | undefined,
  at: number,
  length: number,
  into: Uint8Array,
): Promise<void> {
  if (device === undefined) into.fill(0, 0, length)
  else await device.read(at, length, into, 0)
}
