// Opens a chain: the active image, its backing file, the backing file's, down to the base. The format of the active image is
// given, that of each backing file is read from the header above it: nothing is ever probed, since a guest could write
// an image header into a raw disk. Where backing files may live is the caller's list of folders.

import path from 'node:path'
import { CHAIN_LAYERS_MAX } from '../base/limits.ts'
import type { Layer } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { openQcow2 } from '../format/qcow2/image.ts'
import { openRaw } from '../format/raw/raw.ts'
import type { Host } from '../host/host.ts'

export const FORMATS = ['raw', 'qcow2'] as const
export type Format = (typeof FORMATS)[number]

/** Asked of a file that an image refers to as its own, by its real path, before it is opened; throws to refuse it. */
export type AdmitFile = (filePath: string) => void

/** Hears, as a sentence, what is given up of an image that is written: bitmaps of its own. */
export type Report = (message: string) => void

export interface OpenLayerOptions {
  /** Asked of an external data file; unless told, those in the image's folder or below are opened. */
  readonly admit?: AdmitFile | undefined
  readonly report?: Report | undefined
}

type OpenLayer = (
  host: Host,
  path: string,
  options: { name: string; admit: AdmitFile; report?: Report | undefined },
) => Promise<Layer>

const openers: Record<Format, OpenLayer> = { raw: openRaw, qcow2: openQcow2 }

export interface OpenChainOptions {
  readonly host: Host
  /** The active image. */
  readonly path: string
  readonly format: Format
  /** Backing and data files are opened only in these folders and below; the active image's own folder is always allowed. */
  readonly allowedFolders?: readonly string[]
  /** Of the disk, for messages. */
  readonly name?: string
  /** Asked of each image and data file, by its real path, before it is opened; throws to refuse it. */
  readonly admit?: (imagePath: string) => void
  readonly report?: Report | undefined
  /** What lies under the image whose header names this as its backing file, which is none. */
  readonly bottom?: { readonly name: string; readonly layer: Layer } | undefined
}

/** True for a format that Varve opens. */
export function isFormat(word: string): word is Format {
  return (FORMATS as readonly string[]).includes(word)
}

/**
 * Opens one image on its own, with access 'read' and without its backing file. Its external data file, if it has one, is opened when
 * `admit` lets it.
 */
export async function openLayer(
  host: Host,
  imagePath: string,
  format: Format,
  name: string,
  { admit, report }: OpenLayerOptions = {},
): Promise<Layer> {
  const folder = path.dirname(await host.realPath(imagePath))
  const inFolder: AdmitFile = (filePath) => refuseOutside(imagePath, filePath, [folder])
  const fullName = `${name}/${path.basename(imagePath)}`
  return openers[format](host, imagePath, { name: fullName, admit: admit ?? inFolder, report })
}

/**
 * The layers from base to active, each with access 'read' and its backing set. Kinds: 'not-found' for a missing backing
 * file, 'permission' for one outside the allowed folders, 'invalid-format' for a circle, a chain too long or a format that
 * the header does not say, 'unsupported' for json: and protocol names.
 */
export async function openChain(options: OpenChainOptions): Promise<Layer[]> {
  const { host, bottom } = options
  const name = options.name ?? path.basename(options.path)
  const seen = new Set<string>()
  const layers: Layer[] = []
  let imagePath = await realImage(host, options.path)
  let format: Format = options.format
  const allowed = await allowedFolders(host, imagePath, options.allowedFolders ?? [])
  try {
    for (;;) {
      if (seen.has(imagePath)) throw invalid(imagePath, `the backing files of ${name} form a circle at ${imagePath}`)
      if (layers.length >= CHAIN_LAYERS_MAX)
        throw invalid(imagePath, `${name} has more than ${CHAIN_LAYERS_MAX} layers`)
      seen.add(imagePath)
      options.admit?.(imagePath)
      const image = imagePath
      const admit: AdmitFile = (dataFile) => {
        refuseOutside(image, dataFile, allowed)
        if (seen.has(dataFile))
          throw invalid(image, `${image} has a data file that is part of ${name} already: ${dataFile}`)
        seen.add(dataFile)
        options.admit?.(dataFile)
      }
      const layer = await openLayer(host, image, format, name, { admit, report: options.report })
      layers.unshift(layer)
      const reference = layer.backingReference
      if (reference === undefined) break
      if (bottom?.name === reference.name) {
        layers.unshift(bottom.layer)
        break
      }
      imagePath = await resolveBacking(host, layer.path, reference.name, allowed)
      format = backingFormat(layer.path, reference.name, reference.format)
    }
  } catch (error) {
    for (const layer of layers) await layer.close()
    throw error
  }
  linkLayers(layers)
  return layers
}

/** Lets each layer show the one below it. */
export function linkLayers(layers: readonly Layer[]): void {
  layers.forEach((layer, index) => {
    layer.backing = layers[index - 1]
  })
}

/** How `image` names `backing` in its header: by the bare file name when both are in one folder, so that it can move. */
export function backingName(image: string, backing: string): string {
  return path.dirname(image) === path.dirname(backing) ? path.basename(backing) : backing
}

/** The path that a backing reference in the image at `imagePath` means. */
export function backingPath(imagePath: string, name: string): string {
  return path.resolve(path.dirname(imagePath), name)
}

async function allowedFolders(host: Host, imagePath: string, folders: readonly string[]): Promise<string[]> {
  const found = [path.dirname(imagePath)]
  for (const folder of folders) found.push(await host.realPath(folder))
  return found
}

async function realImage(host: Host, imagePath: string): Promise<string> {
  if ((await host.status(imagePath)) !== undefined) return host.realPath(imagePath)
  throw new BlockError('not-found', `the image ${imagePath} does not exist`, { path: imagePath })
}

async function resolveBacking(
  host: Host,
  imagePath: string,
  name: string,
  allowed: readonly string[],
): Promise<string> {
  if (/^(json:|[a-z][a-z0-9+.-]*:)/i.test(name)) {
    const message = `${imagePath}: the backing file ${name} is no path; Varve opens only paths: qemu-img rebase -u gives it one`
    throw new BlockError('unsupported', message, { path: imagePath })
  }
  const target = backingPath(imagePath, name)
  if ((await host.status(target)) === undefined) {
    throw new BlockError('not-found', `${imagePath}: its backing file ${target} does not exist`, { path: target })
  }
  const real = await host.realPath(target)
  refuseOutside(imagePath, real, allowed)
  return real
}

/** Refuses a file, by its real path, that the image refers to and that lies outside the allowed folders. */
function refuseOutside(imagePath: string, real: string, allowed: readonly string[]): void {
  if (allowed.some((folder) => real.startsWith(folder.endsWith('/') ? folder : `${folder}/`))) return
  const message = `${imagePath} refers to ${real}, which is outside the allowed folders ${allowed.join(', ')}`
  throw new BlockError('permission', message, { path: real })
}

function backingFormat(imagePath: string, name: string, format: string | undefined): Format {
  if (format !== undefined && isFormat(format)) return format
  const fix = `qemu-img rebase -u -b ${name} -F FORMAT ${imagePath}`
  if (format === undefined) throw invalid(imagePath, `${imagePath} does not say the format of its backing file: ${fix}`)
  const message = `${imagePath}: its backing file has format ${format}; Varve reads ${FORMATS.join(' and ')}`
  throw new BlockError('unsupported', message, { path: imagePath })
}

function invalid(imagePath: string, message: string): BlockError {
  return new BlockError('invalid-format', message, { path: imagePath })
}
