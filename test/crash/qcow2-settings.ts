// The kinds of image, host and use that crash states are made of: a table. The name of a setting, a seed and a number of operations
// say a run; with a place in its log and an index, a state.

import { SECTOR } from './crash-disk.ts'
import type { Setting } from './qcow2-run.ts'

const KIB = 1024

interface Shape {
  readonly name: string
  readonly create: Setting['create']
}

/** Sizes end within a cluster. The smallest clusters make L1 tables of several entries, refcount blocks of a few clusters. */
const SHAPES: readonly Shape[] = [
  { name: '512', create: { clusterSize: 512, size: 64 * KIB + SECTOR } },
  { name: '1k', create: { clusterSize: KIB, size: 96 * KIB + SECTOR } },
  { name: '4k', create: { clusterSize: 4 * KIB, size: 128 * KIB + 3 * SECTOR } },
  { name: 'extended-l2', create: { clusterSize: 16 * KIB, size: 192 * KIB + 5 * SECTOR, extendedL2: true } },
]

const HOSTS: readonly Pick<Setting, 'isLate' | 'isDevice' | 'hasBacking' | 'keeps'>[] = [
  { isLate: false, isDevice: false, hasBacking: false, keeps: false },
  { isLate: false, isDevice: false, hasBacking: true, keeps: false },
  { isLate: true, isDevice: false, hasBacking: false, keeps: true },
  { isLate: true, isDevice: false, hasBacking: true, keeps: false },
  { isLate: true, isDevice: true, hasBacking: true, keeps: false },
  { isLate: false, isDevice: true, hasBacking: true, keeps: true },
]

function nameOf(shape: Shape, host: (typeof HOSTS)[number]): string {
  const words = [
    shape.name,
    host.hasBacking && 'backing',
    host.isLate && 'late',
    host.isDevice && 'device',
    host.keeps && 'keeps',
  ]
  return words.filter((word) => word !== false).join('+')
}

export const SETTINGS: readonly Setting[] = SHAPES.flatMap((shape) =>
  HOSTS.map((host) => ({ name: nameOf(shape, host), ...host, create: shape.create })),
)

export function settingNamed(name: string): Setting {
  const setting = SETTINGS.find((candidate) => candidate.name === name)
  if (setting === undefined)
    throw new Error(`no setting is called ${name}; there are: ${SETTINGS.map((s) => s.name).join(', ')}`)
  return setting
}
