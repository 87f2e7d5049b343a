// Makes a new, empty qcow2 image: header, refcount table, refcount blocks and L1 table, one after the other (new-header.ts says
// where). The clusters of the guest's data are allocated as it writes (writer.ts), unless they are preallocated.

import path from 'node:path'
import { setUint64, utf8 } from '../../base/bytes.ts'
import { divideUp } from '../../base/round.ts'
import type { Host, HostFile } from '../../host/host.ts'
import { dataFilePath } from './data-file.ts'
import { encodeHeader, type Header } from './header.ts'
import { openQcow2 } from './image.ts'
import { type CreateOptions, newHeader } from './new-header.ts'
import { setCount } from './refcounts.ts'
import * as spec from './spec.ts'

export type { CreateOptions } from './new-header.ts'

/**
 * Makes an image at `path`, where nothing may be; it and its name are durable on return.
 * Kinds: 'exists', 'invalid-argument' (what cannot be, by name), and those of the host.
 */
export async function createQcow2(host: Host, imagePath: string, options: CreateOptions): Promise<void> {
  const header = newHeader(imagePath, options)
  const makeImage = async (): Promise<void> => {
    await makeFile(host, imagePath, (file) => writeImage(file, header))
    if ((options.preallocation ?? 'off') !== 'off' || options.dataFileRaw === true)
      await orUnlink(host, imagePath, () => preallocate(host, imagePath, options))
  }
  if (options.dataFile === undefined) return makeImage()
  // The image leads to its data file, so that comes first.
  const dataPath = dataFilePath(imagePath, options.dataFile)
  await makeFile(host, dataPath, async (data) => {
    await data.truncate(header.size)
    await data.sync()
  })
  await orUnlink(host, dataPath, makeImage)
}

/** Makes a file, where none may be, which is durable with its name on return, and gone when `fill` fails. */
async function makeFile(host: Host, filePath: string, fill: (file: HostFile) => Promise<void>): Promise<void> {
  const file = await host.open(filePath, { write: true, create: 'exclusive' })
  await orUnlink(host, filePath, async () => {
    try {
      await fill(file)
    } finally {
      await file.close()
    }
    await host.syncFolder(path.dirname(filePath))
  })
}

async function orUnlink(host: Host, filePath: string, work: () => Promise<void>): Promise<void> {
  try {
    await work()
  } catch (error) {
    await host.unlink(filePath)
    throw error
  }
}

async function preallocate(host: Host, imagePath: string, options: CreateOptions): Promise<void> {
  const image = await openQcow2(host, imagePath, { name: path.basename(imagePath) })
  try {
    await image.setAccess('write')
    await image.preallocate(0, options.preallocation ?? 'off')
  } finally {
    await image.close()
  }
}

async function writeImage(file: HostFile, header: Header): Promise<void> {
  const { clusterSize } = header
  const clusters = header.l1Offset / clusterSize + divideUp(header.l1Size * spec.ENTRY_SIZE, clusterSize)
  await file.truncate(clusters * clusterSize)
  const blocksOffset = header.refcountTableOffset + header.refcountTableClusters * clusterSize
  const blocks = (header.l1Offset - blocksOffset) / clusterSize
  const table = new Uint8Array(blocks * spec.ENTRY_SIZE)
  for (let i = 0; i < blocks; i++) setUint64(table, i * spec.ENTRY_SIZE, blocksOffset + i * clusterSize)
  await file.write(header.refcountTableOffset, table.length, table, 0)
  const bits = 2 ** header.refcountOrder
  const counts = new Uint8Array(blocks * clusterSize)
  for (let i = 0; i < clusters; i++) setCount(counts, i, bits, 1)
  await file.write(blocksOffset, counts.length, counts, 0)
  if (header.backing !== undefined) {
    const name = utf8.encode(header.backing.name)
    await file.write(header.backingNameOffset, name.length, name, 0)
  }
  const bytes = encodeHeader(header)
  await file.write(0, bytes.length, bytes, 0)
  await file.sync()
}
