// Makes an image file that is not there yet, or in the place of one that is: the name then leads to the old image until the new
// one is whole. What failed half done is removed.

import path from 'node:path'
import { roundUp } from '../base/round.ts'
import { BlockError } from '../block/error.ts'
import { backingPath, type Format } from '../chain/open.ts'
import { createQcow2 } from '../format/qcow2/create.ts'
import { createRaw } from '../format/raw/raw.ts'
import type { Host } from '../host/host.ts'
import type { ImageSettings } from './create-options.ts'
import { openImage } from './open-image.ts'
import { makeWholeFile } from './whole-file.ts'

export interface CreateImageOptions {
  readonly host: Host
  readonly path: string
  readonly format: Format
  /** What -o said, with size and backing file as the other options gave them. */
  readonly settings: ImageSettings
  /** Takes the place of a file that is there. */
  readonly force?: boolean
  /** Does not look at the backing file; the size must then be given. */
  readonly unsafe?: boolean
  /** Where the backing file's own backing files may be. */
  readonly allowedFolders?: readonly string[]
}

/** A disk is a whole number of these, in bytes, since that is how other programs count it. */
const SECTOR = 512

/**
 * Makes the image, durable on return; its size in bytes. Without a size it has the backing file's. Kinds: 'exists',
 * 'invalid-argument', 'not-found' (the backing file), 'busy' (what is to be replaced), and those of the format and the host.
 */
export async function createImage(options: CreateImageOptions): Promise<number> {
  const { host, format, settings } = options
  const target = path.resolve(options.path)
  const backing = await findBacking(options, target)
  const asked = settings.size ?? backing?.size
  if (asked === undefined) {
    const message = `${options.path}: say how large the disk shall be, such as 10G`
    throw new BlockError('invalid-argument', message, { path: target })
  }
  const size = roundUp(asked, SECTOR)
  await putInPlace(host, target, options.force === true, async (place) => {
    if (format === 'raw') await createRaw(host, place, size, settings.preallocation)
    else await createQcow2(host, place, { ...settings, size, ...(backing && { backing: backing.reference }) })
  })
  return size
}

interface Backing {
  readonly reference: { readonly name: string; readonly format: Format }
  /** Undefined when it was not looked at. */
  readonly size: number | undefined
}

async function findBacking(options: CreateImageOptions, target: string): Promise<Backing | undefined> {
  const { backingName: name, backingFormat } = options.settings
  const invalid = (message: string): BlockError => new BlockError('invalid-argument', message, { path: target })
  if (name === undefined) {
    if (backingFormat === undefined) return undefined
    throw invalid(`${options.path}: a backing format without a backing file; give -b too`)
  }
  if (options.format === 'raw') throw invalid(`${options.path}: a raw image cannot have a backing file; use -f qcow2`)
  if (backingFormat === undefined) throw invalid(`${options.path}: say the format of ${name} with -F raw or -F qcow2`)
  const reference = { name, format: backingFormat }
  if (options.unsafe === true) return { reference, size: undefined }
  const { host, allowedFolders } = options
  const chain = await openImage({ host, path: backingPath(target, name), format: backingFormat, allowedFolders })
  try {
    return { reference, size: chain.size }
  } finally {
    await chain.close()
  }
}

/**
 * Runs `make` for the path, or with `force` for a path beside it that then takes its name. What is replaced must be a file that
 * nobody uses.
 */
async function putInPlace(
  host: Host,
  target: string,
  force: boolean,
  make: (place: string) => Promise<void>,
): Promise<void> {
  if ((await host.status(target)) === undefined) return make(target)
  await makeWholeFile({ host, path: target, force }, make)
}
