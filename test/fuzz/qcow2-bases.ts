// The sound qcow2 images that are damaged: those that QEMU and earlier builds made (test/golden), and small ones of this build with
// everything in one: snapshots, bitmaps, compressed clusters, subclusters.

import fs from 'node:fs'
import path from 'node:path'
import zlib from 'node:zlib'
import { Random } from '../../src/base/random.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { openQcow2 } from '../../src/format/qcow2/image.ts'
import { type Anatomy, dissect } from '../support/qcow2-anatomy.ts'
import { WatchedHost } from './watched-host.ts'

const KIB = 1024
const GOLDEN = path.join(import.meta.dirname, '..', 'golden')
/** Longer files would make a trial slow, and show nothing else. */
const LONGEST = 2048 * KIB

export interface Base {
  readonly name: string
  readonly bytes: Buffer
  readonly anatomy: Anatomy
  /** Its external data file, by name. */
  readonly dataFile: { readonly name: string; readonly bytes: Buffer } | undefined
}

/** All of them, always in the same order: a seed picks one by its place. */
export async function makeBases(): Promise<Base[]> {
  const bases: Base[] = []
  const add = (name: string, bytes: Buffer): void => {
    if (bytes.length <= LONGEST) bases.push({ name, bytes, anatomy: dissect(bytes), dataFile: dataFileOf(name) })
  }
  for (const name of fs.readdirSync(GOLDEN).sort()) {
    const file = path.join(GOLDEN, name)
    if (name.endsWith('.qcow2')) add(name, fs.readFileSync(file))
    if (name.endsWith('.qcow2.zst')) add(name, zlib.zstdDecompressSync(fs.readFileSync(file)))
  }
  for (const [name, make] of Object.entries(MADE_HERE)) add(name, await make())
  return bases
}

function dataFileOf(image: string): Base['dataFile'] {
  const name = image.replace('.qcow2.zst', '.data')
  const file = path.join(GOLDEN, `${name}.zst`)
  if (name === image || !fs.existsSync(file)) return undefined
  return { name, bytes: zlib.zstdDecompressSync(fs.readFileSync(file)) }
}

const MADE_HERE: Readonly<Record<string, () => Promise<Buffer>>> = {
  'new, clusters of 512': () => makeImage({ clusterSize: 512 }),
  'new, clusters of 4 KiB': () => makeImage({ clusterSize: 4 * KIB }),
  'new, extended L2': () => makeImage({ clusterSize: 16 * KIB, extendedL2: true }),
  'new and empty': async () => {
    const host = newHost()
    await createQcow2(host, '/image', { size: 256 * KIB })
    return host.bytesOf('/image')
  },
}

function newHost(): WatchedHost {
  return new WatchedHost({ operations: 100_000, fileBytes: 16 * KIB * KIB, slack: 0 })
}

async function makeImage(options: { readonly clusterSize: number; readonly extendedL2?: boolean }): Promise<Buffer> {
  const random = new Random(options.clusterSize)
  const host = newHost()
  host.watchesReads = false
  await createQcow2(host, '/image', { size: 256 * KIB, ...options })
  const image = await openQcow2(host, '/image', { name: 'base' })
  await image.setAccess('write')
  const write = async (count: number): Promise<void> => {
    for (let i = 0; i < count; i++) {
      const bytes = random.fill(Buffer.alloc(random.between(1, 8 * KIB)))
      await image.write(random.below(image.size - bytes.length), bytes.length, bytes, 0, 0)
    }
    await image.zero(random.below(128 * KIB), 20 * KIB, 0)
    await image.trim(random.below(128 * KIB), 20 * KIB, 0)
  }
  await write(6)
  const packed = zlib.deflateRawSync(Buffer.alloc(options.clusterSize, 'varve '), { windowBits: 12 })
  for (const cluster of [1, 2, 7]) {
    const plain = Buffer.alloc(options.clusterSize, 'varve ')
    await image.writeCompressed(cluster * options.clusterSize, packed, plain, 0, plain.length)
  }
  await image.createSnapshot('first')
  await image.bitmapEdits.add('changes', 4 * KIB, true)
  await write(4)
  await image.createSnapshot('second')
  await write(2)
  await image.close()
  return host.bytesOf('/image')
}
