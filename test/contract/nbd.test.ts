// The contract of the pair: an NBD client whose server has a memory device behind it, over a Unix socket and over TCP, by one
// connection and by four, and over TLS.

import fs from 'node:fs'
import path from 'node:path'
import { MemoryDevice } from '../../src/block/memory.ts'
import { connectNbd } from '../../src/nbd/client.ts'
import { loadServerTls } from '../../src/nbd/tls.ts'
import { type NbdPlace, serveDevice } from '../support/nbd.ts'
import { tempFolder } from '../support/temp.ts'
import { deviceContract } from './device.ts'

for (const place of ['unix', 'tcp'] satisfies NbdPlace[]) {
  deviceContract(`NBD client and server over ${place}`, async (t, size) => {
    const { target } = await serveDevice(t, new MemoryDevice(size), { place })
    return connectNbd(target)
  })
}

deviceContract('NBD client and server over four connections', async (t, size) => {
  const { target } = await serveDevice(t, new MemoryDevice(size))
  return connectNbd(target, { connections: 4 })
})

deviceContract('NBD client and server over TLS', async (t, size) => {
  const file = path.join(tempFolder(t), 'keys.psk')
  fs.writeFileSync(file, `alice:${'5a'.repeat(32)}\n`)
  const files = { kind: 'psk', file } as const
  const { target } = await serveDevice(t, new MemoryDevice(size), { tls: await loadServerTls({ files }) })
  return connectNbd({ ...target, tls: { files, username: 'alice' } })
})
