// Opens an image for the offline tools, with the backing files that it shows or on its own. It decides what may be opened as
// what; chain/open.ts follows the backing files.
//
// A format that was not given is looked for in the first bytes. A guest could have written those bytes into a raw disk, so an
// image that was recognized may not lead to other files: to follow those, the user says the format.

import path from 'node:path'
import type { Layer } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { Chain } from '../chain/chain.ts'
import { type AdmitFile, FORMATS, type Format, openChain, openLayer, type Report } from '../chain/open.ts'
import { openQcow2 } from '../format/qcow2/image.ts'
import { openRaw } from '../format/raw/raw.ts'
import type { Host } from '../host/host.ts'
import { withoutClaims } from '../host/unclaimed.ts'

export interface OpenImageOptions {
  readonly host: Host
  readonly path: string
  /** Looked for in the image's first bytes unless told. */
  readonly format?: Format | undefined
  /** Backing files are opened only in these folders, in the image's own, and below. */
  readonly allowedFolders?: readonly string[] | undefined
  /** Also reads what another process writes to. What is read may then be half of a change; nothing can be written. */
  readonly forceShare?: boolean | undefined
  /** Hears what is given up of an image that is written: bitmaps of its own. */
  readonly report?: Report | undefined
}

/**
 * The image with its backing and data files, all with access 'read'. Kinds: those of `openChain`, 'busy' when another process writes
 * to it, and 'permission' for an image that was recognized as qcow2 and leads to another file.
 */
export async function openImage(options: OpenImageOptions): Promise<Chain> {
  const { format, allowedFolders = [], report } = options
  const host = hostFor(options)
  const name = path.basename(options.path)
  if (format !== undefined)
    return new Chain(name, await openChain({ host, path: options.path, format, name, allowedFolders, report }))
  const probed = await probeFormat(host, options.path)
  const admit: AdmitFile = (dataFile) => {
    throw refuseToFollow(options.path, `the data file ${dataFile}`)
  }
  const layer = await openLayer(host, options.path, probed, name, { admit, report })
  if (layer.backingReference === undefined) return new Chain(name, [layer])
  await layer.close()
  throw refuseToFollow(options.path, `the backing file ${layer.backingReference.name}`)
}

/** The image without its backing files: what it does not own reads as zeros. Kinds as for `openImage`. */
export async function openImageAlone(options: OpenImageOptions): Promise<Layer> {
  const host = hostFor(options)
  const format = options.format ?? (await probeFormat(host, options.path))
  return openLayer(host, options.path, format, path.basename(options.path), { report: options.report })
}

/** What the image says, and no other file: the data of a disk with a data file cannot be read. Kinds as for `openImage`. */
export async function openMetadata(options: OpenImageOptions): Promise<Layer> {
  const host = hostFor(options)
  const name = path.basename(options.path)
  const format = options.format ?? (await probeFormat(host, options.path))
  if ((await host.status(options.path)) === undefined) throw notFound(options.path)
  return format === 'raw'
    ? openRaw(host, options.path, { name })
    : openQcow2(host, options.path, { name, withoutData: true })
}

function hostFor({ host, forceShare }: OpenImageOptions): Host {
  return forceShare === true ? withoutClaims(host) : host
}

function notFound(imagePath: string): BlockError {
  return new BlockError('not-found', `the image ${imagePath} does not exist`, { path: imagePath })
}

function refuseToFollow(imagePath: string, what: string): BlockError {
  const message = `${imagePath} names ${what}, and a guest can write such a header into a raw disk: -f qcow2 follows it`
  return new BlockError('permission', message, { path: imagePath })
}

interface Signature {
  readonly format: string
  readonly at: number
  readonly bytes: string
}

/** The first bytes of formats that are worth telling from a raw disk. */
const SIGNATURES: readonly Signature[] = [
  { format: 'qcow2', at: 0, bytes: 'QFI\xfb' },
  { format: 'vmdk', at: 0, bytes: 'KDMV' },
  { format: 'vmdk', at: 0, bytes: 'COWD' },
  { format: 'vhdx', at: 0, bytes: 'vhdxfile' },
  { format: 'vpc', at: 0, bytes: 'conectix' },
  { format: 'qed', at: 0, bytes: 'QED\0' },
  { format: 'luks', at: 0, bytes: 'LUKS\xba\xbe' },
  { format: 'parallels', at: 0, bytes: 'WithoutFreeSpace' },
  { format: 'vdi', at: 0x40, bytes: '\x7f\x10\xda\xbe' },
]
const PROBED_BYTES = 512

/** What the image's first bytes say; 'raw' when they say nothing. Kind 'unsupported' for a format that Varve does not open. */
export async function probeFormat(host: Host, imagePath: string): Promise<Format> {
  if ((await host.status(imagePath)) === undefined) throw notFound(imagePath)
  const file = await host.open(imagePath)
  const start = Buffer.alloc(PROBED_BYTES)
  try {
    await file.read(0, start.length, start, 0)
  } finally {
    await file.close()
  }
  const text = start.toString('latin1')
  const found = SIGNATURES.find(({ at, bytes }) => text.startsWith(bytes, at))?.format ?? 'raw'
  const format = FORMATS.find((known) => known === found)
  if (format !== undefined) return format
  const message = `${imagePath} looks like a ${found} image, which Varve does not open; -f raw takes it as a plain disk`
  throw new BlockError('unsupported', message, { path: imagePath })
}
