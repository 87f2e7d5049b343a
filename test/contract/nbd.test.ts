// The contract of the pair: an NBD client whose server has a memory device behind it, over a Unix socket and over TCP.

import { MemoryDevice } from '../../src/block/memory.ts'
import { connectNbd } from '../../src/nbd/client.ts'
import { type NbdPlace, serveDevice } from '../support/nbd.ts'
import { deviceContract } from './device.ts'

for (const place of ['unix', 'tcp'] satisfies NbdPlace[]) {
  deviceContract(`NBD client and server over ${place}`, async (t, size) => {
    const { target } = await serveDevice(t, new MemoryDevice(size), { place })
    return connectNbd(target)
  })
}
