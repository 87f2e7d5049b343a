// The external data file of a qcow2 image: where it is, and opening it. It holds the guest's data at the guest's own offsets; the
// image holds the map alone. What is written to it, and when, is the writer's affair.
//
//   image       | header | L1, L2 tables, refcounts |
//   data file   | cluster 0 | cluster 1 | cluster 2 | ...    as on the disk; one that is not mapped may hold anything, unless raw

import path from 'node:path'
import { BlockError, isBlockError } from '../../block/error.ts'
import type { Host, HostFile } from '../../host/host.ts'
import type { Header } from './header.ts'

/** Asked of a data file, by its real path, before it is opened; throws to refuse it. */
export type Admit = (dataFilePath: string) => void

export interface DataFile {
  readonly file: HostFile
  readonly isBlockDevice: boolean
}

/**
 * Opens the data file that the header of the image at `imagePath` names, as `openWritableOrNot` does. Kinds: 'not-found'; 'unsupported' for what
 * is no path; 'invalid-format' for a name that is missing or leads to the image, a device too small, and a raw one with a
 * backing file; whatever `admit` throws; and those of the host.
 */
export async function openDataFile(host: Host, imagePath: string, header: Header, admit?: Admit): Promise<DataFile> {
  const real = await findDataFile(host, imagePath, header)
  admit?.(real)
  const isBlockDevice = (await host.status(real))?.kind === 'block'
  const file = await openWritableOrNot(host, real)
  if (!isBlockDevice || file.size() >= header.size) return { file, isBlockDevice }
  const sizes = `${file.size()} bytes, and the disk ${header.size}`
  await file.close()
  throw invalid(imagePath, `its data file, the device ${real}, has ${sizes}; make it larger`)
}

/** In the place of a data file that is not opened: whoever asks the image for the disk's data is refused. */
export function unopenedDataFile(imagePath: string, header: Header): DataFile {
  const refuse = (): never => {
    const message = `${imagePath} was opened without its data file ${header.dataFile?.name}`
    throw new BlockError('unsupported', message, { path: imagePath })
  }
  const file: HostFile = {
    path: imagePath,
    writable: false,
    size: refuse,
    read: refuse,
    readNow: refuse,
    write: refuse,
    punch: refuse,
    zero: refuse,
    extents: refuse,
    truncate: refuse,
    sync: refuse,
    lock: refuse,
    close: () => Promise.resolve(),
  }
  return { file, isBlockDevice: false }
}

/** Opens an image, or what it refers to, with claim 'read', and so that it can be written later if it may be. */
export async function openWritableOrNot(host: Host, filePath: string): Promise<HostFile> {
  try {
    return await host.open(filePath, { write: true, lock: 'read' })
  } catch (error) {
    if (!isBlockError(error, 'permission') && !isBlockError(error, 'read-only')) throw error
    return host.open(filePath, { lock: 'read' })
  }
}

/**
 * Before the disk is written: what the last writer left unsynced becomes durable, and a raw data file that was cut off has the
 * disk's size again.
 */
export async function readyDataFile({ file, isBlockDevice }: DataFile, header: Readonly<Header>): Promise<void> {
  const isShort = !isBlockDevice && file.size() < header.size
  if (isShort && header.dataFile?.isRaw === true) await file.truncate(header.size)
  await file.sync()
}

/** The path that the name of a data file in the image at `imagePath` means: relative to the image's folder. */
export function dataFilePath(imagePath: string, name: string): string {
  return path.resolve(path.dirname(imagePath), name)
}

async function findDataFile(host: Host, imagePath: string, header: Header): Promise<string> {
  const name = header.dataFile?.name ?? ''
  const another = `name it with: qemu-img amend -f qcow2 -o data_file=PATH ${imagePath}`
  if (name === '') throw invalid(imagePath, `it has an external data file and does not say which; ${another}`)
  if (header.dataFile?.isRaw === true && header.backing !== undefined)
    throw invalid(imagePath, 'it has a raw data file and a backing file, which exclude each other')
  if (/^(json:|[a-z][a-z0-9+.-]*:)/i.test(name)) {
    const message = `${imagePath}: its data file ${name} is no path, and Varve opens only paths; ${another}`
    throw new BlockError('unsupported', message, { path: imagePath })
  }
  const target = dataFilePath(imagePath, name)
  if ((await host.status(target)) === undefined) {
    const message = `${imagePath}: its data file ${target} does not exist; bring it back, or ${another}`
    throw new BlockError('not-found', message, { path: target })
  }
  const real = await host.realPath(target)
  if (real === (await host.realPath(imagePath))) throw invalid(imagePath, 'it names itself as its data file')
  return real
}

function invalid(imagePath: string, what: string): BlockError {
  return new BlockError('invalid-format', `${imagePath}: ${what}`, { path: imagePath })
}
