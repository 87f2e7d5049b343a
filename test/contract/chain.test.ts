// The contract of what a guest sees: disks over chains of several shapes, on a host that answers at once and on one that
// answers late.

import { Random } from '../../src/base/random.ts'
import { makeDisk } from '../support/chains.ts'
import { deviceContract } from './device.ts'

deviceContract('disk over one raw layer', async (_t, size) => {
  return (await makeDisk({ base: 'raw', overlays: 0, size })).disk
})

deviceContract('disk over a raw base and two overlays', async (_t, size) => {
  return (await makeDisk({ base: 'raw', overlays: 2, size })).disk
})

deviceContract('disk over three qcow2 layers of 4 KiB clusters, on a slow host', async (_t, size) => {
  return (await makeDisk({ base: 'qcow2', overlays: 2, size, clusterSize: 4096, scheduler: new Random(7) })).disk
})

deviceContract('disk that records in a bitmap', async (_t, size) => {
  const { disk } = await makeDisk({ base: 'qcow2', overlays: 1, size })
  await disk.log.edit([{ kind: 'add', name: 'daily', recording: true, fill: 'none' }])
  return disk
})
