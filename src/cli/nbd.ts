// `varve nbd`: serves one image over NBD without a daemon, until it is told to stop. No jobs, no catalog; of bitmaps
// only one that the image itself holds. The image's own claim keeps other programs from writing to it meanwhile.

import path from 'node:path'
import { type Command, Option } from 'commander'
import { visitBits } from '../bitmap/visit-bits.ts'
import type { Layer } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { Chain } from '../chain/chain.ts'
import { type Format, FORMATS, openChain } from '../chain/open.ts'
import { Qcow2Image } from '../format/qcow2/image.ts'
import { metadataCache } from '../format/qcow2/metadata-cache.ts'
import { type CacheMode, warningOf, withCacheMode } from '../host/cache-mode.ts'
import { realHost } from '../host/real.ts'
import type { MetaContext } from '../nbd/server.ts'
import { cacheOption, metadataCacheOption, warn } from './context.ts'
import { addListenOptions, type ListenOptions, serveUntilStopped } from './nbd-listen.ts'

interface ServeImageOptions extends ListenOptions {
  /** Never guessed, since a guest could write an image header into a raw disk. */
  readonly format: Format
  readonly readOnly?: boolean
  /** A persistent bitmap of the image that clients see as "qemu:dirty-bitmap:NAME". */
  readonly bitmap?: string
  readonly cache: CacheMode
  /** Bytes for the maps of the image and its backing files. */
  readonly metadataCache?: number
}

export function addNbdCommand(program: Command): void {
  addListenOptions(program.command('nbd <image>'))
    .description('serve one image over NBD, without a daemon')
    .addOption(new Option('-f, --format <format>', 'format of the image').choices(FORMATS).makeOptionMandatory())
    .option('--read-only', 'refuse writes')
    .option('--bitmap <name>', 'let clients see this persistent bitmap of the image, as qemu:dirty-bitmap:NAME')
    .addOption(cacheOption())
    .addOption(metadataCacheOption())
    .action(serveImage)
}

/** Opens the image with its backing files, and serves it until it is told to stop; the image is then closed cleanly. */
async function serveImage(image: string, options: ServeImageOptions): Promise<void> {
  const { format, readOnly = false } = options
  if (options.metadataCache !== undefined) metadataCache.budget = options.metadataCache
  const name = path.basename(image)
  const host = withCacheMode(realHost, options.cache)
  await serveUntilStopped(options, async (atEnd) => {
    const warning = warningOf(options.cache)
    if (warning !== undefined) warn(`${name}: ${warning}`)
    const chain = new Chain(name, await openChain({ host, path: image, format, name, report: warn }))
    atEnd(() => chain.close())
    if (!readOnly) await chain.active.setAccess('write')
    const contexts = options.bitmap === undefined ? [] : [await bitmapContext(chain.active, options.bitmap)]
    return { description: chain.name, device: chain, readOnly, contexts }
  })
}

/** A persistent bitmap of the image, at each moment as it is. Kinds: 'unsupported', 'not-found', 'corrupt'. */
async function bitmapContext(image: Layer, name: string): Promise<MetaContext> {
  const { path: file } = image
  if (!(image instanceof Qcow2Image))
    throw new BlockError('unsupported', `${file} is a raw image, which has no bitmaps; qcow2 has`, { path: file })
  const names = image.bitmaps.map((bitmap) => JSON.stringify(bitmap.name))
  if (!names.includes(JSON.stringify(name))) {
    const there = names.length === 0 ? 'no bitmaps' : `only ${names.join(', ')}`
    throw new BlockError('not-found', `${file} has no bitmap ${JSON.stringify(name)}: it has ${there}`, { path: file })
  }
  const bits = await image.watchBitmap(name)
  return {
    name: `qemu:dirty-bitmap:${name}`,
    extents: (offset, length, visit) => {
      visitBits(bits(), offset, length, visit)
      return undefined
    },
  }
}
