// Ways to damage a qcow2 image, by name, and small images to damage, made by QEMU: for the tests that compare what Varve and
// QEMU find in them, and what each repairs.

import fs from 'node:fs'
import path from 'node:path'
import { Random } from '../../src/base/random.ts'
import { peer } from './peer.ts'
import { addTo, type Anatomy, clearBits, setBits } from './qcow2-anatomy.ts'

const KIB = 1024

/** Damages `image`; gives it back when it became another buffer (shorter or longer). */
export type Damage = (image: Buffer, anatomy: Anatomy) => Buffer | void

const COPIED = 1n << 63n
const first = (places: readonly number[], what: string): number => {
  const place = places[0]
  if (place === undefined) throw new Error(`this image has no ${what}`)
  return place
}
const data = (anatomy: Anatomy): number => first(anatomy.dataEntries, 'data')
/** Where the 16-bit refcount of the cluster at `offset` is. */
const countAt = ({ refcountBlocks, clusterSize }: Anatomy, offset: number): number =>
  (refcountBlocks[0] as number) + (offset / clusterSize) * 2
const offsetOf = (image: Buffer, place: number): number => Number(image.readBigUInt64BE(place) & 0x00ff_ffff_ffff_fe00n)

/** For every image with refcounts of 16 bits. */
export const DAMAGES: Readonly<Record<string, Damage>> = {
  'nothing at all': () => undefined,
  'a copied flag is missing in an L2 entry': (image, anatomy) => clearBits(image, data(anatomy), COPIED),
  'a copied flag is missing in an L1 entry': (image, { l1 }) => clearBits(image, l1, COPIED),
  'a refcount is too high': (image, anatomy) => {
    image.writeUInt16BE(3, countAt(anatomy, offsetOf(image, data(anatomy))))
  },
  'the refcount of an L2 table is too high': (image, anatomy) => {
    image.writeUInt16BE(2, countAt(anatomy, first(anatomy.l2Tables, 'L2 table')))
  },
  'a refcount is zero': (image, anatomy) => {
    image.writeUInt16BE(0, countAt(anatomy, offsetOf(image, data(anatomy))))
  },
  'two entries lead to one cluster': (image, anatomy) => {
    image.copy(image, anatomy.dataEntries[1], data(anatomy), data(anatomy) + 8)
  },
  'an entry leads to the L1 table': (image, anatomy) => {
    image.writeBigUInt64BE(COPIED | BigInt(anatomy.l1), data(anatomy))
  },
  'an entry leads to the refcount block': (image, anatomy) => {
    image.writeBigUInt64BE(COPIED | BigInt(anatomy.refcountBlocks[0] as number), data(anatomy))
  },
  'reserved bits are set in an L2 entry': (image, anatomy) => setBits(image, data(anatomy), (1n << 58n) | 16n),
  'reserved bits are set in an L1 entry': (image, { l1 }) => setBits(image, l1, (1n << 57n) | 4n),
  'an L2 entry leads to no cluster’s start': (image, anatomy) => addTo(image, data(anatomy), 512),
  'an L2 entry leads past the end': (image, anatomy) => {
    image.writeBigUInt64BE(COPIED | (1n << 40n), data(anatomy))
  },
  'an L2 entry leads just past the end': (image, anatomy) => {
    image.writeBigUInt64BE(
      COPIED | BigInt(Math.ceil(image.length / anatomy.clusterSize) * anatomy.clusterSize),
      data(anatomy),
    )
  },
  'an L1 entry leads past the end': (image, { l1 }) => {
    image.writeBigUInt64BE(COPIED | (1n << 40n), l1)
  },
  'the L1 entry is gone': (image, { l1 }) => {
    image.writeBigUInt64BE(0n, l1)
  },
  'an L2 entry is gone': (image, anatomy) => {
    image.writeBigUInt64BE(0n, data(anatomy))
  },
  'the file is cut': (image, { clusterSize }) => image.subarray(0, image.length - 2 * clusterSize),
  'the file is cut within a cluster': (image) => image.subarray(0, image.length - 700),
  'the file is longer': (image, { clusterSize }) => Buffer.concat([image, Buffer.alloc(3 * clusterSize, 7)]),
  'the refcount block is zero': (image, { refcountBlocks, clusterSize }) => {
    image.fill(0, refcountBlocks[0], (refcountBlocks[0] as number) + clusterSize)
  },
  'the refcount table is zero': (image, { refcountTable, clusterSize }) => {
    image.fill(0, refcountTable, refcountTable + clusterSize)
  },
  'a refcount table entry leads past the end': (image, { refcountTable }) => {
    image.writeBigUInt64BE(1n << 40n, refcountTable)
  },
  'a refcount table entry leads to no cluster’s start': (image, { refcountTable }) => addTo(image, refcountTable, 512),
  'a refcount table entry has reserved bits': (image, { refcountTable }) => setBits(image, refcountTable, 3n),
  'a refcount table entry leads to the L1 table': (image, { refcountTable, l1 }) => {
    image.writeBigUInt64BE(BigInt(l1), refcountTable)
  },
  'two refcount table entries lead to one block': (image, { refcountTable }) => {
    image.copy(image, refcountTable + 8, refcountTable, refcountTable + 8)
  },
  'a second refcount block beyond all use': (image, { refcountTable, clusterSize }) => {
    const grown = Buffer.concat([image, Buffer.alloc(clusterSize)])
    grown.writeBigUInt64BE(BigInt(Math.ceil(image.length / clusterSize) * clusterSize), refcountTable + 8)
    return grown
  },
}

/** For images that have what is named. */
export const SPECIAL_DAMAGES: Readonly<Record<string, { readonly on: string; readonly damage: Damage }>> = {
  'a zero entry keeps a place at no cluster’s start': {
    on: 'plain',
    damage: (image, anatomy) => {
      addTo(image, data(anatomy), 512)
      setBits(image, data(anatomy), 1n)
    },
  },
  'a compressed entry is marked copied': {
    on: 'compressed',
    damage: (image, { compressedEntries }) => setBits(image, first(compressedEntries, 'compressed'), COPIED),
  },
  'a compressed entry leads elsewhere': {
    on: 'compressed',
    damage: (image, { compressedEntries }) => addTo(image, first(compressedEntries, 'compressed'), 5000),
  },
  'compressed data lies past the end': {
    on: 'compressed',
    damage: (image, { compressedEntries }) => setBits(image, first(compressedEntries, 'compressed'), 1n << 40n),
  },
  'a compressed entry takes more sectors': {
    on: 'compressed',
    damage: (image, { compressedEntries, clusterBits }) =>
      setBits(image, first(compressedEntries, 'compressed'), 0xfn << BigInt(62 - (clusterBits - 8))),
  },
  'subclusters are data and zeros at once': {
    on: 'extended L2',
    damage: (image, anatomy) => {
      image.writeUInt32BE(1, data(anatomy) + 8)
      image.writeUInt32BE(1, data(anatomy) + 12)
    },
  },
  'subclusters have data and no place': {
    on: 'extended L2',
    damage: (image, { emptyEntries }) => {
      image.writeUInt32BE(5, first(emptyEntries, 'empty entry') + 12)
    },
  },
  'a snapshot’s L1 table is at no cluster’s start': {
    on: 'snapshot',
    damage: (image, { snapshots }) => addTo(image, first(snapshots, 'snapshot'), 512),
  },
  'a snapshot’s L1 table is another place': {
    on: 'snapshot',
    damage: (image, { snapshots, clusterSize }) => addTo(image, first(snapshots, 'snapshot'), clusterSize),
  },
  'a snapshot’s L1 table is too long': {
    on: 'snapshot',
    damage: (image, { snapshots }) => {
      image.writeUInt32BE(0x1000_0000, first(snapshots, 'snapshot') + 8)
    },
  },
  'a snapshot is gone': {
    on: 'snapshot',
    damage: (image) => {
      image.writeUInt32BE(image.readUInt32BE(60) - 1, 60)
    },
  },
  'a bitmap table entry has reserved bits': {
    on: 'bitmap',
    damage: (image, { bitmapTables }) => setBits(image, first(bitmapTables, 'bitmap'), 2n),
  },
  'a bitmap table entry leads to no cluster’s start': {
    on: 'bitmap',
    damage: (image, { bitmapTables }) => addTo(image, first(bitmapTables, 'bitmap'), 512),
  },
  'the bitmaps’ extension is gone': {
    on: 'bitmap',
    damage: (image, { extensions }) => {
      image.writeUInt32BE(0x1234_5678, extensions.find(({ type }) => type === 0x2385_2875)?.at ?? 0)
    },
  },
}

/** Small images with 16-bit refcounts, by name: what to tell qemu-img and qemu-io. */
const IMAGES: Readonly<
  Record<string, { readonly options: string; readonly compressed?: true; readonly more?: Steps }>
> = {
  plain: { options: 'compat=1.1' },
  'version 2': { options: 'compat=0.10' },
  'clusters of 4 KiB': { options: 'cluster_size=4k' },
  compressed: { options: 'compression_type=zlib', compressed: true },
  'extended L2': { options: 'extended_l2=on' },
  snapshot: {
    options: 'cluster_size=16k',
    more: [
      ['qemu-img', 'snapshot', '-c', 'first', 'IMAGE'],
      ['qemu-io', '-f', 'qcow2', '-c', 'write -P 7 0 200k', 'IMAGE'],
      ['qemu-img', 'snapshot', '-c', 'second', 'IMAGE'],
    ],
  },
  bitmap: {
    options: 'compat=1.1',
    more: [
      ['qemu-img', 'bitmap', '-f', 'qcow2', '--add', '-g', '64k', 'IMAGE', 'changes'],
      ['qemu-io', '-f', 'qcow2', '-c', 'write -P 7 0 200k', 'IMAGE'],
    ],
  },
}
type Steps = readonly (readonly string[])[]

export const IMAGE_NAMES = Object.keys(IMAGES)

/** Makes the image of that name in the folder; gives its bytes. */
export function makeSmallImage(folder: string, name: string): Buffer {
  const made = IMAGES[name]
  if (made === undefined) throw new Error(`no image is named ${name}`)
  const raw = path.join(folder, 'source.raw')
  const bytes = Buffer.alloc(1536 * KIB)
  const random = new Random(5)
  for (let at = 0; at < bytes.length; at += 96 * KIB) {
    if (made.compressed) bytes.fill(`varve ${at} `, at, at + 70 * KIB)
    else random.fill(bytes.subarray(at, at + 70 * KIB))
  }
  fs.writeFileSync(raw, bytes)
  const image = path.join(folder, `small.qcow2`)
  const flags = made.compressed ? ['-c'] : []
  peer('qemu-img', 'convert', ...flags, '-f', 'raw', '-O', 'qcow2', '-o', made.options, raw, image)
  for (const [program, ...words] of made.more ?? [])
    peer(program as string, ...words.map((word) => (word === 'IMAGE' ? image : word)))
  return fs.readFileSync(image)
}
