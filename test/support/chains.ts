// Chains and disks on a simulated host, for the suites that run on them.

import type { Random } from '../../src/base/random.ts'
import type { Layer } from '../../src/block/device.ts'
import { Chain } from '../../src/chain/chain.ts'
import { Disk } from '../../src/chain/disk.ts'
import { openChain, type Format } from '../../src/chain/open.ts'
import { DirtyLog } from '../../src/dirtylog/dirty-log.ts'
import { createQcow2 } from '../../src/format/qcow2/create.ts'
import { createRaw } from '../../src/format/raw/raw.ts'
import { SimulatedHost } from '../../src/host/simulated.ts'

export interface ChainShape {
  /** Format of the base; the overlays are qcow2. */
  readonly base: Format
  readonly overlays: number
  readonly size: number
  readonly clusterSize?: number
  /** With it, half of the host's operations complete later. */
  readonly scheduler?: Random
}

/** Layers from base to active, the active one writable. */
export async function makeLayers(host: SimulatedHost, shape: ChainShape): Promise<Layer[]> {
  await host.makeFolder('/images')
  const { size, clusterSize = 65_536 } = shape
  if (shape.base === 'raw') await createRaw(host, '/images/0.raw', size)
  else await createQcow2(host, '/images/0.qcow2', { size, clusterSize })
  let below = { name: `0.${shape.base}`, format: shape.base as string }
  for (let index = 1; index <= shape.overlays; index++) {
    await createQcow2(host, `/images/${index}.qcow2`, { size, clusterSize, backing: below })
    below = { name: `${index}.qcow2`, format: 'qcow2' }
  }
  const layers = await openChain({ host, path: `/images/${below.name}`, format: below.format as Format })
  await layers.at(-1)?.setAccess('write')
  return layers
}

/** A disk over a new chain, with a dirty log of its own. */
export async function makeDisk(shape: ChainShape): Promise<{ disk: Disk; host: SimulatedHost }> {
  const host = new SimulatedHost(shape.scheduler === undefined ? {} : { scheduler: shape.scheduler })
  const layers = await makeLayers(host, shape)
  await host.makeFolder('/log')
  const open = (name: string): ReturnType<SimulatedHost['open']> =>
    host.open(`/log/${name}`, { write: true, create: 'exclusive' })
  const files = { areas: [await open('a0'), await open('a1')], slots: [await open('s0'), await open('s1')] } as const
  const log = await DirtyLog.create(files, { size: shape.size, bootId: host.bootId() })
  return { disk: new Disk('lab', new Chain('lab', layers), log), host }
}
