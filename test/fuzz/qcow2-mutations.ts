// Damages a qcow2 image where it hurts: a structure is picked, and its numbers become ones that are wrong in an interesting way.
// The same seed damages the same image alike.

import type { Random } from '../../src/base/random.ts'
import type { Anatomy } from '../support/qcow2-anatomy.ts'

const COPIED = 1n << 63n
const COMPRESSED = 1n << 62n
const MASK_64 = (1n << 64n) - 1n

interface Patient {
  bytes: Buffer
  readonly anatomy: Anatomy
  readonly random: Random
}

type Mutation = (patient: Patient) => void

/** Bytes and kinds of the header's fields. */
const FIELDS: readonly (readonly [at: number, bytes: 4 | 8])[] = [
  [0, 4],
  [4, 4],
  [8, 8],
  [16, 4],
  [20, 4],
  [24, 8],
  [32, 4],
  [36, 4],
  [40, 8],
  [48, 8],
  [56, 4],
  [60, 4],
  [64, 8],
  [72, 8],
  [80, 8],
  [88, 8],
  [96, 4],
  [100, 4],
  [104, 4],
]

const MUTATIONS: Readonly<Record<string, Mutation>> = {
  'header field'(patient) {
    const [at, bytes] = patient.random.pick(FIELDS)
    if (bytes === 4) put32(patient, at, number32(patient, at))
    else put64(patient, at, number64(patient, at))
  },
  'feature bit'(patient) {
    const at = patient.random.pick([72, 80, 88])
    put64(patient, at, get64(patient, at) ^ (1n << BigInt(patient.random.below(patient.random.chance(0.8) ? 6 : 64))))
  },
  extension(patient) {
    const { anatomy, random } = patient
    if (anatomy.extensions.length === 0) return
    const { at } = random.pick(anatomy.extensions)
    const place = at + 4 * random.below(8)
    put32(
      patient,
      place,
      random.chance(0.3) ? random.pick([0, 0xe279_2aca, 0x2385_2875, 0x4441_5441]) : number32(patient, place),
    )
  },
  'L1 entry'(patient) {
    const { l1, l1Size } = patient.anatomy
    const at = l1 + 8 * patient.random.below(Math.max(1, Math.min(l1Size, 8)))
    put64(patient, at, entry(patient, at))
  },
  'L2 entry': (patient) => mutateEntry(patient, entriesOf(patient)),
  'L2 entries in a row'(patient) {
    const places = entriesOf(patient)
    const start = patient.random.below(Math.max(1, places.length))
    const value = entry(patient, places[start] ?? 0)
    const step = BigInt(patient.random.pick([0, 0, patient.anatomy.clusterSize, 512]))
    places.slice(start, start + 8).forEach((at, index) => put64(patient, at, value + step * BigInt(index)))
  },
  'compressed entry'(patient) {
    const { compressedEntries } = patient.anatomy
    if (compressedEntries.length === 0) return
    const at = patient.random.pick(compressedEntries)
    put64(patient, at, get64(patient, at) ^ (1n << BigInt(patient.random.below(62))))
  },
  subclusters(patient) {
    const { anatomy, random } = patient
    if (anatomy.entrySize !== 16) return
    const at = random.pick(entriesOf(patient)) + 8 + 4 * random.below(2)
    put32(patient, at, random.pick([0, 1, 0xffff_ffff, 0x8000_0000, random.next()]))
  },
  'refcount table entry'(patient) {
    const at = patient.anatomy.refcountTable + 8 * patient.random.below(4)
    put64(patient, at, entry(patient, at) & ~(COPIED | COMPRESSED))
  },
  refcounts(patient) {
    const { anatomy, random } = patient
    const block = anatomy.refcountBlocks[0]
    if (block === undefined) return
    for (let i = random.between(1, 8); i > 0; i--)
      put8(patient, block + random.below(128), random.pick([0, 0, 1, 2, 0xff]))
  },
  snapshot(patient) {
    const { anatomy, random } = patient
    if (anatomy.snapshots.length === 0) return
    const at = random.pick(anatomy.snapshots) + 4 * random.below(14)
    put32(patient, at, number32(patient, at))
  },
  'bitmap directory'(patient) {
    const { anatomy, random } = patient
    if (anatomy.bitmapDirectory === undefined) return
    const at = anatomy.bitmapDirectory + 4 * random.below(10)
    put32(patient, at, number32(patient, at))
  },
  'bitmap table'(patient) {
    const { anatomy, random } = patient
    if (anatomy.bitmapTables.length === 0) return
    const at = random.pick(anatomy.bitmapTables) + 8 * random.below(3)
    put64(patient, at, entry(patient, at))
  },
  'bit flip in metadata'(patient) {
    const { random } = patient
    const at = random.pick(structures(patient)) + random.below(512)
    put8(patient, at, (patient.bytes[at] ?? 0) ^ (1 << random.below(8)))
  },
  'bit flip'(patient) {
    const at = patient.random.below(patient.bytes.length)
    put8(patient, at, (patient.bytes[at] ?? 0) ^ (1 << patient.random.below(8)))
  },
  'words swapped'(patient) {
    const [a, b] = [word(patient), word(patient)]
    const kept = get64(patient, a)
    put64(patient, a, get64(patient, b))
    put64(patient, b, kept)
  },
  'cluster over another'(patient) {
    const { anatomy, random, bytes } = patient
    const from = Math.min(bytes.length, random.pick(structures(patient)))
    bytes.copy(bytes, Math.min(bytes.length, random.pick(structures(patient))), from, from + anatomy.clusterSize)
  },
  'cluster of noise or zeros'(patient) {
    const { anatomy, random, bytes } = patient
    const at = random.pick(structures(patient))
    const cluster = bytes.subarray(at, at + anatomy.clusterSize)
    if (random.chance(0.5)) cluster.fill(0)
    else random.fill(cluster.subarray(0, 512))
  },
  cut(patient) {
    const { random, bytes, anatomy } = patient
    const length = random.chance(0.5)
      ? random.below(bytes.length)
      : random.below(bytes.length / anatomy.clusterSize) * anatomy.clusterSize
    patient.bytes = bytes.subarray(0, length)
  },
  'longer file'(patient) {
    patient.bytes = Buffer.concat([patient.bytes, Buffer.alloc(patient.random.below(100_000), patient.random.below(3))])
  },
}

const NAMES = Object.keys(MUTATIONS)

/** Gives a damaged copy of the image, and what was damaged. */
export function mutate(image: Buffer, anatomy: Anatomy, random: Random): { bytes: Buffer; damage: string } {
  const patient: Patient = { bytes: Buffer.from(image), anatomy, random }
  const done: string[] = []
  for (let i = random.pick([1, 1, 1, 2, 3, 6]); i > 0; i--) {
    const name = random.pick(NAMES)
    MUTATIONS[name]?.(patient)
    done.push(name)
  }
  return { bytes: Buffer.from(patient.bytes), damage: done.join(', ') }
}

function mutateEntry(patient: Patient, places: readonly number[]): void {
  if (places.length === 0) return
  const at = patient.random.pick(places)
  put64(patient, at, entry(patient, at))
}

function entriesOf({ anatomy, random }: Patient): readonly number[] {
  const all = [anatomy.dataEntries, anatomy.compressedEntries, anatomy.zeroEntries, anatomy.emptyEntries.slice(0, 20)]
  const some = all.filter((places) => places.length > 0)
  return some.length === 0 ? [anatomy.l1] : random.pick(some)
}

/** Where the structures begin. */
function structures({ anatomy }: Patient): number[] {
  const { l1, refcountTable, refcountBlocks, l2Tables, snapshots, bitmapDirectory, bitmapTables } = anatomy
  const some = [0, l1, refcountTable, ...refcountBlocks, ...l2Tables, ...snapshots.slice(0, 1), ...bitmapTables]
  return bitmapDirectory === undefined ? some : [...some, bitmapDirectory]
}

function word(patient: Patient): number {
  return patient.random.pick(structures(patient)) + 8 * patient.random.below(16)
}

/** An entry of a table: somewhere it should not lead. */
function entry(patient: Patient, at: number): bigint {
  const { random, anatomy, bytes } = patient
  const { clusterSize } = anatomy
  const place = random.pick<() => number>([
    () => 0,
    () => Math.floor(at / clusterSize) * clusterSize,
    () => random.pick(structures(patient)),
    () => random.below(Math.ceil(bytes.length / clusterSize) + 2) * clusterSize,
    () => random.below(bytes.length),
    () => bytes.length + random.below(4) * clusterSize,
    () => 2 ** random.between(30, 55),
  ])()
  const flags = random.pick([
    0n,
    COPIED,
    COPIED,
    COMPRESSED,
    COPIED | COMPRESSED,
    1n,
    COPIED | 1n,
    1n << BigInt(random.below(64)),
  ])
  return random.chance(0.2) ? get64(patient, at) ^ flags : BigInt(place) | flags
}

function number32(patient: Patient, at: number): number {
  const { random } = patient
  const old = at + 4 <= patient.bytes.length ? patient.bytes.readUInt32BE(at) : 0
  const other = random.pick(FIELDS)[0]
  return random.pick([
    0,
    1,
    old + 1,
    old - 1,
    old * 2,
    old ^ (1 << random.below(32)),
    0x7fff_ffff,
    0xffff_ffff,
    2 ** random.below(32),
    random.below(100),
    random.next(),
    patient.bytes.length,
    other + 4 <= patient.bytes.length ? patient.bytes.readUInt32BE(other) : 0,
  ])
}

function number64(patient: Patient, at: number): bigint {
  const { random } = patient
  const old = get64(patient, at)
  return random.pick([
    0n,
    1n,
    old + 1n,
    old - 1n,
    old ^ (1n << BigInt(random.below(64))),
    old + BigInt(patient.anatomy.clusterSize),
    MASK_64,
    (1n << 63n) - 1n,
    1n << BigInt(random.below(64)),
    BigInt(random.pick(structures(patient))),
    BigInt(patient.bytes.length),
    BigInt(random.below(patient.bytes.length)),
    get64(patient, random.pick([8, 24, 40, 48, 64])),
  ])
}

function get64({ bytes }: Patient, at: number): bigint {
  return at + 8 <= bytes.length ? bytes.readBigUInt64BE(at) : 0n
}

function put64({ bytes }: Patient, at: number, value: bigint): void {
  if (at + 8 <= bytes.length) bytes.writeBigUInt64BE(value & MASK_64, at)
}

function put32({ bytes }: Patient, at: number, value: number): void {
  if (at + 4 <= bytes.length) bytes.writeUInt32BE(value >>> 0, at)
}

function put8({ bytes }: Patient, at: number, value: number): void {
  if (at < bytes.length) bytes[at] = value
}
