// The target of a mirror: an image file or host block device, made for it or there before, or an NBD export. Here is what must be
// true of it before a byte is written, each refusal in words of its own; the copying is job/mirror.ts.

import path from 'node:path'
import { GRANULE, MIRROR_CONNECTIONS, MIRROR_STALL_MS } from '../base/limits.ts'
import type { BlockDevice, Layer } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { backingName, backingPath, openLayer } from '../chain/open.ts'
import { StallFilter } from '../filter/stall.ts'
import { dataFilePath } from '../format/qcow2/data-file.ts'
import { createQcow2 } from '../format/qcow2/create.ts'
import { readQcow2Info } from '../format/qcow2/image.ts'
import { createRaw } from '../format/raw/raw.ts'
import type { FileStatus } from '../host/host.ts'
import { connectNbd } from '../nbd/client.ts'
import { parseNbdUri } from '../nbd/uri.ts'
import { sideOf } from './branches.ts'
import type { MirrorSpec } from './catalog.ts'
import { type EngineContext, imageHost, type ManagedDisk } from './context.ts'

export interface MirrorTarget {
  readonly device: BlockDevice
  /** The image, when it is one; a disk can go on there. */
  readonly layer: Layer | undefined
  close(): Promise<void>
}

export function isNbdTarget(target: string): boolean {
  return /^nbds?(\+unix)?:/.test(target)
}

/** An image's path as the catalog has it. Kind 'not-found' when its folder does not exist. */
export async function targetPath({ host }: EngineContext, target: string): Promise<string> {
  if ((await host.status(target)) !== undefined) return host.realPath(target)
  const folder = path.dirname(path.resolve(target))
  if ((await host.status(folder))?.kind !== 'folder')
    throw new BlockError('not-found', `the folder ${folder} of the target does not exist`, { path: folder })
  return path.join(await host.realPath(folder), path.basename(target))
}

/** Kind 'busy' when the target is a file of a disk, by this name or another, the disk itself, or the target of another mirror. */
export async function refuseUsedTarget(context: EngineContext, disk: string, target: string): Promise<void> {
  const other = context.catalog.list('job').find(({ spec }) => spec.kind === 'mirror' && spec.target === target)
  if (other !== undefined) throw new BlockError('busy', `${target} is the target of job ${other.id} already`)
  if (isNbdTarget(target)) return refuseItself(context, disk, target)
  const status = await context.host.status(target)
  for (const record of context.catalog.list('disk')) {
    for (const { path: image, format } of [...record.layers, ...sideOf(record)]) {
      for (const file of [image, ...(await dataFiles(context, image, format))]) {
        if (file !== target && !isSame(status, await context.host.status(file))) continue
        const name = file === target ? target : `${target} is the same file as ${file}, which`
        throw new BlockError('busy', `${name} belongs to disk ${record.name}: mirror it to another place`, {
          path: file,
        })
      }
    }
  }
}

function isSame(one: FileStatus | undefined, other: FileStatus | undefined): boolean {
  return one !== undefined && one.identity === other?.identity
}

async function dataFiles({ host }: EngineContext, image: string, format: string): Promise<string[]> {
  if (format !== 'qcow2' || (await host.status(image)) === undefined) return []
  const { dataFile } = await readQcow2Info(host, image)
  return dataFile === undefined ? [] : [dataFilePath(image, dataFile.name)]
}

/** What is written to a disk that is mirrored to itself would be to copy for ever. */
function refuseItself({ home }: EngineContext, disk: string, target: string): void {
  const uri = parseNbdUri(target)
  if (uri.transport === 'unix' && uri.path === home.nbdSocket(disk))
    throw new BlockError('busy', `${target} is disk ${disk} itself: mirror it to another place`)
}

/** Makes the image, of the disk's size, where nothing may be. With sync 'top' it lies on what the active layer lies on. */
export async function makeTarget(context: EngineContext, managed: ManagedDisk, spec: MirrorSpec): Promise<void> {
  const { disk } = managed
  if (spec.format === 'raw') return createRaw(context.host, spec.target, disk.size)
  const below = spec.sync === 'top' ? disk.chain.layers.at(-2) : undefined
  const backing = below && { name: backingName(spec.target, below.path), format: below.format }
  await createQcow2(context.host, spec.target, { size: disk.size, ...(backing === undefined ? {} : { backing }) })
}

/** Opens the target for writing. Nothing is written unless all that must be true of it is. */
export async function openTarget(
  context: EngineContext,
  managed: ManagedDisk,
  spec: MirrorSpec,
): Promise<MirrorTarget> {
  const target = isNbdTarget(spec.target) ? await openExport(spec.target) : await openImage(context, managed, spec)
  try {
    checkTarget(managed, spec, target)
    return target
  } catch (error) {
    await target.close()
    throw error
  }
}

async function openExport(uri: string): Promise<MirrorTarget> {
  const client = await connectNbd(uri, { connections: MIRROR_CONNECTIONS })
  const device = new StallFilter(client, MIRROR_STALL_MS, () => {
    const message = `${client.name} has not answered for ${MIRROR_STALL_MS / 1000} s`
    client.abandon(new BlockError('timeout', message, { device: client.name }))
  })
  return { device, layer: undefined, close: () => device.close() }
}

async function openImage(context: EngineContext, managed: ManagedDisk, spec: MirrorSpec): Promise<MirrorTarget> {
  const { record, disk } = managed
  if ((await context.host.status(spec.target)) === undefined)
    throw new BlockError('not-found', `the target ${spec.target} does not exist`, { path: spec.target })
  const host = imageHost(context, record)
  const layer = await openLayer(host, spec.target, spec.format ?? 'raw', record.name, { report: context.report })
  try {
    const reference = layer.backingReference
    if (reference !== undefined) {
      const below = disk.chain.layers.at(-2)
      const named = backingPath(spec.target, reference.name)
      if (spec.sync !== 'top' || named !== below?.path) {
        const wanted =
          spec.sync === 'top' && below !== undefined ? `one on ${below.path}` : 'one without a backing file'
        const message = `${spec.target} lies on ${named}: a mirror with --sync ${spec.sync} needs ${wanted}`
        throw new BlockError('invalid-argument', message, { path: spec.target })
      }
      layer.backing = below
    }
    // The claim may change the image, so its size is looked at before.
    checkSize(managed, spec, layer)
    await layer.setAccess('write')
    return { device: layer, layer, close: () => layer.close() }
  } catch (error) {
    await layer.close()
    throw error
  }
}

function checkTarget(managed: ManagedDisk, spec: MirrorSpec, { device, layer }: MirrorTarget): void {
  const { disk } = managed
  const { write, minimumBlock } = device.can
  checkSize(managed, spec, device)
  if (!write) throw new BlockError('read-only', `${device.name} is served read-only: nothing can be mirrored to it`)
  if (disk.size % minimumBlock !== 0 || minimumBlock > GRANULE) {
    const message = `${device.name} takes multiples of ${minimumBlock} bytes, and disk ${disk.name} has ${disk.size}`
    throw new BlockError('unsupported', message)
  }
  if (spec.finish === 'pivot') checkPivot(managed, spec, layer, device.size)
}

function checkSize({ disk }: ManagedDisk, { target }: MirrorSpec, { size }: BlockDevice): void {
  if (size >= disk.size) return
  const message = `${target} has ${size} bytes, and disk ${disk.name} ${disk.size}: make it larger first`
  throw new BlockError('invalid-argument', message)
}

/** Whether the disk could go on at the target. Kinds 'unsupported', 'invalid-argument', and 'busy' for layers that others hold. */
export function checkPivot(
  { disk, record }: ManagedDisk,
  spec: MirrorSpec,
  layer: Layer | undefined,
  size: number,
): void {
  const { target } = spec
  if (layer === undefined) {
    const message = `${target}: a disk goes on at an image or a block device only; end without --pivot, and attach the guest there`
    throw new BlockError('unsupported', message)
  }
  if (size !== disk.size) {
    const message = `${target} has ${size} bytes, and disk ${disk.name} ${disk.size}: to go on there, both need the same size`
    throw new BlockError('invalid-argument', message)
  }
  if (spec.sync === 'top' && layer.backingReference === undefined && record.layers.length > 1) {
    const message = `${target} has only what the active layer of disk ${disk.name} owns, and lies on nothing: the disk cannot go on there`
    throw new BlockError('invalid-argument', message)
  }
}
