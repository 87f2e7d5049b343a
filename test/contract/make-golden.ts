// Makes the images of test/golden that are not there yet, and notes in images.json what each holds. It never makes one
// again: these are the bytes that a program wrote on its day, which every later build must read. golden.test.ts opens them.
//
//   NAME.qcow2.zst         the image, and beside it what it needs: NAME.base.zst, NAME.data.zst
//   images.json            for each image: who made it, its files, size, and the SHA-256 of what its disk held

import { createHash } from 'node:crypto'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import zlib from 'node:zlib'
import { MAY_UNMAP } from '../../src/block/device.ts'
import { type CreateOptions, createQcow2 } from '../../src/format/qcow2/create.ts'
import { ClusterCompressor } from '../../src/format/qcow2/cluster-compressor.ts'
import { openQcow2, type Qcow2Image } from '../../src/format/qcow2/image.ts'
import { realHost } from '../../src/host/real.ts'
import { peer, runPeer } from '../support/peer.ts'

const KIB = 1024
const SIZE = 512 * KIB
const FOLDER = path.join(import.meta.dirname, '..', 'golden')

/** Writes, zeros, a discard: as qemu-io commands. */
const CHANGES = ['write -P 0x11 0 40k', 'write -P 0x22 100k 3k', 'write -P 0x33 200k 140k', 'write -z 64k 20k', 'flush']
const MORE_CHANGES = ['write -z -u 224k 64k', 'discard 320k 64k', 'write -P 0x44 500k 12k']

interface Recipe {
  readonly by: 'QEMU' | 'Varve'
  readonly what: string
  /** Makes the image NAME.qcow2 in the working folder; other files begin with its name too. */
  readonly make: (name: string) => Promise<void> | void
}

/** `qemu-img create`, then qemu-io. */
function byQemu(what: string, options: string, script: readonly string[] = [...CHANGES, ...MORE_CHANGES]): Recipe {
  const make = (name: string): void => {
    qemuCreate(name, options.replaceAll('NAME', name))
    qemuIo(`${name}.qcow2`, script)
  }
  return { by: 'QEMU', what, make }
}

function qemuCreate(name: string, options: string, more: readonly string[] = []): void {
  peer('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', options, ...more, `${name}.qcow2`, String(SIZE))
}

function qemuIo(file: string, script: readonly string[]): void {
  peer('qemu-io', '-f', 'qcow2', ...script.flatMap((command) => ['-c', command]), file)
}

/** A raw disk with something in it, longer than the image over it. */
function rawBase(name: string): string[] {
  const bytes = Buffer.alloc(SIZE + 100 * KIB)
  for (let offset = 0; offset < bytes.length; offset += 3 * KIB) bytes.fill(offset / KIB, offset, offset + 2 * KIB)
  fs.writeFileSync(`${name}.base`, bytes)
  return ['-b', `${name}.base`, '-F', 'raw']
}

/** An overlay over a raw base that is longer than it. */
function overlayByQemu(what: string, options: string, script: readonly string[]): Recipe {
  const make = (name: string): void => {
    qemuCreate(name, options, rawBase(name))
    qemuIo(`${name}.qcow2`, script)
  }
  return { by: 'QEMU', what, make }
}

/** An image whose process was killed while it wrote: qemu-io ends by a signal. */
function killedByQemu(name: string): void {
  qemuCreate(name, 'lazy_refcounts=on,cluster_size=4k')
  const script = [...CHANGES, ...MORE_CHANGES, 'abort'].flatMap((command) => ['-c', command])
  runPeer('qemu-io', ['-f', 'qcow2', ...script, `${name}.qcow2`])
}

function snapshotsByQemu(name: string): void {
  const image = `${name}.qcow2`
  qemuCreate(name, 'cluster_size=4k')
  qemuIo(image, CHANGES)
  peer('qemu-img', 'snapshot', '-c', 'first', image)
  peer('qemu-img', 'resize', '-q', image, String(SIZE + 64 * KIB))
  qemuIo(image, MORE_CHANGES)
  peer('qemu-img', 'snapshot', '-c', 'second', image)
  qemuIo(image, ['write -P 0x55 0 100k'])
}

function bitmapsByQemu(name: string): void {
  const image = `${name}.qcow2`
  qemuCreate(name, 'cluster_size=4k')
  peer('qemu-img', 'bitmap', '--add', '-g', '4096', '-f', 'qcow2', image, 'fine')
  qemuIo(image, CHANGES)
  peer('qemu-img', 'bitmap', '--add', '-g', '65536', '-f', 'qcow2', image, 'coarse')
  qemuIo(image, MORE_CHANGES)
  peer('qemu-img', 'bitmap', '--disable', '-f', 'qcow2', image, 'coarse')
}

function chainByQemu(name: string): void {
  rawBase(name)
  const layer = (file: string, below: string, format: string, options: string, script: readonly string[]): void => {
    const backing = ['-b', below, '-F', format]
    peer('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', options, ...backing, file, String(SIZE))
    qemuIo(file, script)
  }
  layer(`${name}.lower`, `${name}.base`, 'raw', 'compat=0.10,cluster_size=4k', ['write -P 0x11 0 40k'])
  layer(`${name}.upper`, `${name}.lower`, 'qcow2', 'cluster_size=64k', ['write -P 0x22 30k 40k', 'discard 128k 64k'])
  layer(`${name}.qcow2`, `${name}.upper`, 'qcow2', 'cluster_size=512', ['write -P 0x33 60k 40k', 'write -z 200k 9k'])
}

function markedCorrupt(name: string): void {
  qemuCreate(name, 'cluster_size=4k')
  qemuIo(`${name}.qcow2`, CHANGES)
  const bytes = fs.readFileSync(`${name}.qcow2`)
  const INCOMPATIBLE_FEATURES_LOW_BYTE = 79
  bytes[INCOMPATIBLE_FEATURES_LOW_BYTE] = (bytes[INCOMPATIBLE_FEATURES_LOW_BYTE] as number) | 2
  fs.writeFileSync(`${name}.qcow2`, bytes)
}

const PACKED = ['write -c -P 0x66 0 64k', 'write -c -P 0x77 128k 64k', 'write -P 0x88 192k 20k', 'write -z 400k 10k']

async function varveChanges(image: Qcow2Image): Promise<void> {
  const bytes = new Uint8Array(SIZE)
  for (let offset = 0; offset < SIZE; offset += KIB) bytes.fill(offset / KIB, offset, offset + KIB)
  await image.write(0, 40 * KIB, bytes, 0, 0)
  await image.write(100 * KIB + 7, 3 * KIB, bytes, 0, 0)
  await image.write(200 * KIB, 140 * KIB, bytes, 200 * KIB, 0)
  await image.zero(64 * KIB, 20 * KIB, 0)
  await image.zero(224 * KIB, 64 * KIB, MAY_UNMAP)
  await image.trim(320 * KIB, 64 * KIB, 0)
  await image.flush()
  await image.write(500 * KIB, 12 * KIB, bytes, 0, 0)
}

interface VarveRecipe {
  readonly options?: Partial<CreateOptions>
  /** Before the changes, and after them; the image is open to be written. */
  readonly before?: (image: Qcow2Image) => Promise<unknown>
  readonly after?: (image: Qcow2Image) => Promise<unknown>
  /** The file is taken as it is while it is being written. */
  readonly isKilled?: boolean
}

/** `createQcow2`, then changes. */
function byVarve(what: string, { options, before, after, isKilled = false }: VarveRecipe): Recipe {
  const make = async (name: string): Promise<void> => {
    const file = path.resolve(`${name}.qcow2`)
    const dataFile = options?.dataFile?.replaceAll('NAME', name)
    await createQcow2(realHost, file, { size: SIZE, ...options, ...(dataFile === undefined ? {} : { dataFile }) })
    const image = await openQcow2(realHost, file, { name })
    await image.setAccess('write')
    await before?.(image)
    await varveChanges(image)
    await after?.(image)
    if (isKilled) fs.copyFileSync(file, `${file}.left`)
    await image.close()
    if (isKilled) fs.renameSync(`${file}.left`, file)
  }
  return { by: 'Varve', what, make }
}

async function packByVarve(image: Qcow2Image): Promise<void> {
  const { compression, clusterSize } = image.header
  const compressor = new ClusterCompressor(compression, clusterSize)
  for (const offset of [0, 256 * KIB, 384 * KIB]) {
    const cluster = Buffer.alloc(clusterSize, `packed at ${offset} `)
    await image.writeCompressed(offset, await compressor.compress(cluster), cluster, 0, clusterSize)
  }
  compressor.close()
}

const RECIPES: Readonly<Record<string, Recipe>> = {
  'qemu-512': byQemu('clusters of 512, refcounts of 64 bits', 'cluster_size=512,refcount_bits=64'),
  'qemu-2m': byQemu('clusters of 2 MiB, refcounts of 1 bit', 'cluster_size=2M,refcount_bits=1'),
  'qemu-lazy': byQemu('lazy refcounts of 32 bits', 'lazy_refcounts=on,refcount_bits=32,cluster_size=4k'),
  'qemu-killed': { by: 'QEMU', what: 'lazy refcounts, killed while it was written', make: killedByQemu },
  'qemu-preallocated': byQemu('preallocated metadata', 'preallocation=metadata,cluster_size=4k'),
  'qemu-v2-overlay': overlayByQemu('version 2 over a longer raw disk', 'compat=0.10', ['write -P 0x11 10k 40k']),
  'qemu-extl2': overlayByQemu('extended L2 entries over a longer raw disk', 'extended_l2=on,cluster_size=16k', [
    ...CHANGES,
    ...MORE_CHANGES,
    'write -P 0x99 130k 512',
  ]),
  'qemu-extl2-zstd': byQemu('extended L2 entries, zstd', 'extended_l2=on,compression_type=zstd', PACKED),
  'qemu-data': byQemu('an external data file', 'data_file=NAME.data'),
  'qemu-data-raw': byQemu('an external data file that is raw', 'data_file=NAME.data,data_file_raw=on', CHANGES),
  'qemu-snapshots': { by: 'QEMU', what: 'two internal snapshots, of two sizes', make: snapshotsByQemu },
  'qemu-bitmaps': { by: 'QEMU', what: 'two bitmaps, one disabled', make: bitmapsByQemu },
  'qemu-chain': { by: 'QEMU', what: 'three layers over a raw disk, of versions 2 and 3', make: chainByQemu },
  'qemu-corrupt': { by: 'QEMU', what: 'marked corrupt, and not so', make: markedCorrupt },
  'varve-v3': byVarve('version 3', {}),
  'varve-512': byVarve('clusters of 512', { options: { clusterSize: 512 } }),
  'varve-2m': byVarve('clusters of 2 MiB', { options: { clusterSize: 2048 * KIB } }),
  'varve-killed': byVarve('killed while it was written', { options: { clusterSize: 4 * KIB }, isKilled: true }),
  'varve-v2': byVarve('version 2', { options: { version: 2, clusterSize: 4 * KIB } }),
  'varve-extl2': byVarve('extended L2 entries', { options: { extendedL2: true, clusterSize: 16 * KIB } }),
  'varve-data-raw': byVarve('a raw data file', { options: { dataFile: 'NAME.data', dataFileRaw: true } }),
  'varve-packed': byVarve('clusters compressed with zlib', { after: packByVarve }),
  'varve-snapshots': byVarve('two internal snapshots', {
    before: (image) => image.createSnapshot('first'),
    after: (image) => image.createSnapshot('second'),
  }),
  'varve-bitmaps': byVarve('a bitmap', { before: (image) => image.bitmapEdits.add('fine', 4096, true) }),
}

export interface GoldenImage {
  /** The program and its version. */
  readonly by: string
  readonly what: string
  /** The first is the image. */
  readonly files: readonly string[]
  readonly size: number
  readonly sha256: string
  /** By name, what each internal snapshot holds. */
  readonly snapshots?: Readonly<Record<string, string>>
}

function hashOf(name: string, ...more: string[]): { size: number; sha256: string } {
  peer('qemu-img', 'convert', ...more, '-f', 'qcow2', '-O', 'raw', `${name}.qcow2`, 'content')
  const bytes = fs.readFileSync('content')
  fs.unlinkSync('content')
  return { size: bytes.length, sha256: createHash('sha256').update(bytes).digest('hex') }
}

function describeImage(name: string, { by, what }: Recipe, version: string): GoldenImage {
  const files = fs.readdirSync('.').filter((file) => file.startsWith(`${name}.`))
  files.sort((a, b) => Number(b.endsWith('.qcow2')) - Number(a.endsWith('.qcow2')) || a.localeCompare(b))
  // An image that was killed is read by QEMU from a copy, which it repairs.
  const image = `${name}.qcow2`
  fs.copyFileSync(image, `${image}.copy`)
  const info = JSON.parse(peer('qemu-img', 'info', '-U', '--output=json', image)) as {
    snapshots?: readonly { name: string }[]
  }
  const content = hashOf(name)
  const names = (info.snapshots ?? []).map((snapshot) => snapshot.name)
  const snapshots = Object.fromEntries(
    names.map((snapshot) => [snapshot, hashOf(name, '-l', `snapshot.name=${snapshot}`).sha256]),
  )
  fs.renameSync(`${image}.copy`, image)
  return { by: `${by} ${version}`, what, files, ...content, ...(names.length > 0 ? { snapshots } : {}) }
}

async function main(): Promise<void> {
  const listFile = path.join(FOLDER, 'images.json')
  const known = fs.existsSync(listFile)
    ? (JSON.parse(fs.readFileSync(listFile, 'utf8')) as Record<string, GoldenImage>)
    : {}
  const packageFile = JSON.parse(fs.readFileSync(path.join(FOLDER, '..', '..', 'package.json'), 'utf8')) as {
    version: string
  }
  const versions = {
    QEMU: /version ([\d.]+)/.exec(peer('qemu-img', '--version'))?.[1] ?? 'unknown',
    Varve: packageFile.version,
  }
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'varve-golden-'))
  process.chdir(folder)
  try {
    for (const [name, recipe] of Object.entries(RECIPES)) {
      if (name in known) continue
      await recipe.make(name)
      const found = describeImage(name, recipe, versions[recipe.by])
      for (const file of found.files)
        fs.writeFileSync(path.join(FOLDER, `${file}.zst`), zlib.zstdCompressSync(fs.readFileSync(file)))
      known[name] = found
      process.stdout.write(`made ${name}\n`)
    }
    fs.writeFileSync(listFile, `${JSON.stringify(known, undefined, 2)}\n`)
  } finally {
    fs.rmSync(folder, { recursive: true })
  }
}

await main()
