// The kinds of image, host and use that crash states are made of: a table. The name of a setting, a seed and a number of operations
// say a run; with a place in its log and an index, a state.

import { SECTOR } from './crash-disk.ts'
import type { Setting } from './qcow2-run.ts'

const KIB = 1024

type Use = Pick<Setting, 'isLate' | 'isDevice' | 'hasBacking' | 'keeps' | 'shrinks'>

const PLAIN: Use = { isLate: false, isDevice: false, hasBacking: false, keeps: false, shrinks: false }
const LATE: Use = { ...PLAIN, isLate: true }
const BACKED: Use = { ...PLAIN, hasBacking: true }
const LATE_BACKED: Use = { ...BACKED, isLate: true }
const DEVICE: Use = { ...LATE_BACKED, isDevice: true }
const KEEPS: Use = { ...LATE, keeps: true }
const DEVICE_KEEPS: Use = { ...BACKED, isDevice: true, keeps: true }
const SHRINKS: Use = { ...LATE_BACKED, shrinks: true }
const KEEPS_SHRINKS: Use = { ...KEEPS, shrinks: true }

interface Shape {
  readonly name: string
  readonly create: Setting['create']
  readonly uses: readonly Use[]
}

const ALL = [PLAIN, BACKED, KEEPS, LATE_BACKED, DEVICE, DEVICE_KEEPS]

/** Sizes end within a cluster. The smallest clusters make L1 tables of several entries, refcount blocks of a few clusters. */
const SMALL = { clusterSize: 512, size: 64 * KIB + SECTOR }
const MIDDLE = { clusterSize: KIB, size: 96 * KIB + SECTOR }
const LARGE = { clusterSize: 4 * KIB, size: 128 * KIB + 3 * SECTOR }
const EXTENDED = { clusterSize: 16 * KIB, size: 192 * KIB + 5 * SECTOR, extendedL2: true }

const SHAPES: readonly Shape[] = [
  { name: '512', create: SMALL, uses: ALL },
  { name: '1k', create: MIDDLE, uses: ALL },
  { name: '4k', create: LARGE, uses: ALL },
  { name: 'extended-l2', create: EXTENDED, uses: ALL },
  { name: '512-v2', create: { ...SMALL, version: 2 }, uses: [PLAIN, LATE_BACKED, KEEPS, DEVICE] },
  { name: '4k-v2', create: { ...LARGE, version: 2 }, uses: [BACKED, LATE] },
  { name: '512-data', create: { ...SMALL, dataFile: 'data' }, uses: [BACKED, LATE, DEVICE] },
  { name: '4k-data', create: { ...LARGE, dataFile: 'data' }, uses: [PLAIN, LATE_BACKED] },
  { name: '4k-data-raw', create: { ...LARGE, dataFile: 'data', dataFileRaw: true }, uses: [PLAIN, LATE] },
  { name: 'extended-l2-data', create: { ...EXTENDED, dataFile: 'data' }, uses: [PLAIN, LATE_BACKED] },
  { name: '512', create: SMALL, uses: [SHRINKS, KEEPS_SHRINKS] },
  { name: '4k', create: LARGE, uses: [SHRINKS] },
  { name: 'extended-l2', create: EXTENDED, uses: [SHRINKS, KEEPS_SHRINKS] },
  { name: '512-v2', create: { ...SMALL, version: 2 }, uses: [SHRINKS] },
  { name: '512-data', create: { ...SMALL, dataFile: 'data' }, uses: [SHRINKS] },
  { name: '512-refcounts-1', create: { ...SMALL, refcountBits: 1 }, uses: [BACKED, LATE] },
  {
    name: '4k-refcounts-64-zstd',
    create: { ...LARGE, refcountBits: 64, compression: 'zstd' },
    uses: [KEEPS, LATE_BACKED],
  },
  { name: '4k-preallocated', create: { ...LARGE, preallocation: 'metadata' }, uses: [PLAIN, KEEPS] },
  {
    name: 'extended-l2-preallocated',
    create: { ...EXTENDED, preallocation: 'metadata' },
    uses: [PLAIN, KEEPS_SHRINKS],
  },
]

function nameOf(shape: Shape, use: Use): string {
  const words = [
    shape.name,
    use.hasBacking && 'backing',
    use.isLate && 'late',
    use.isDevice && 'device',
    use.keeps && 'keeps',
    use.shrinks && 'shrinks',
  ]
  return words.filter((word) => word !== false).join('+')
}

export const SETTINGS: readonly Setting[] = SHAPES.flatMap((shape) =>
  shape.uses.map((use) => ({ name: nameOf(shape, use), ...use, create: shape.create })),
)

export function settingNamed(name: string): Setting {
  const setting = SETTINGS.find((candidate) => candidate.name === name)
  if (setting === undefined)
    throw new Error(`no setting is called ${name}; there are: ${SETTINGS.map((s) => s.name).join(', ')}`)
  return setting
}
