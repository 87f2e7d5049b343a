// Part "network": TCP of loopback, in the clear and with TLS, for `varve nbd` and for qemu-nbd.

import fs from 'node:fs'
import path from 'node:path'
import { freePort } from '../../test/support/free-port.ts'
import { makeCredentialsIn } from '../../test/support/tls.ts'
import { isWrite, measure, RANDOM_READ, RANDOM_READ_1, RANDOM_WRITE, SEQUENTIAL_READ } from '../fio.ts'
import { settle } from '../images.ts'
import { versionOf } from '../machine.ts'
import { againLast, type Bench, type Part, takeTurns } from '../part.ts'
import type { Row } from '../results.ts'
import { QEMU_NBD, VARVE } from '../servers.ts'
import { withServers } from '../servers-in-turn.ts'

const LOADS = [RANDOM_READ, RANDOM_WRITE, RANDOM_READ_1, SEQUENTIAL_READ]

export const NETWORK: Part = {
  name: 'network',
  title: 'TCP and TLS',
  extent: { imageMiB: 1024 },
  about: ({ extent }) =>
    `Raw images of ${extent.imageMiB} MiB in the page cache, over TCP of loopback: in the clear, and with TLS by certificates (x509).`,
  async measure(bench) {
    return [...(await measureOver(bench, 'TCP')), ...(await measureOver(bench, 'TLS'))]
  },
}

async function measureOver(bench: Bench, table: 'TCP' | 'TLS'): Promise<Row[]> {
  const loads = LOADS.filter(({ name }) => bench.wants(`${table}, ${name}`))
  if (loads.length === 0 || (table === 'TLS' && !bench.has('openssl', versionOf('openssl', 'version')))) return []
  const home = table === 'TLS' ? makeHome(bench.folder) : undefined
  const certificates = home && certificatesIn(home)
  const place = async (): Promise<{ port: number; certificates: string | undefined }> => {
    return { port: await freePort(), certificates }
  }
  const rows: Row[] = []
  await withServers(bench, [VARVE, QEMU_NBD], { format: 'raw', folder: bench.folder, place }, async (started) => {
    for (const load of loads) {
      const contenders = againLast(started, QEMU_NBD.name).map(({ program, server, image }) => ({
        program,
        measure: () => {
          settle(image, isWrite(load))
          return measure(server.uri, load, bench.seconds, home)
        },
      }))
      const figures = await takeTurns(contenders, bench.rounds, `${table}, ${load.name}`)
      const asks = [{ of: QEMU_NBD.name, atLeast: 0.8 }]
      rows.push({ table, name: load.name, unit: 'a second', subject: VARVE.name, figures, asks })
    }
  })
  return rows
}

/** A home in which the client finds certificates, whichever user it is. The server takes its own from the same folder. */
function makeHome(folder: string): string {
  const root = path.join(folder, 'credentials')
  const home = path.join(folder, 'client')
  fs.mkdirSync(root)
  fs.cpSync(makeCredentialsIn(root).folder, certificatesIn(home), { recursive: true })
  for (const entry of fs.readdirSync(certificatesIn(home))) fs.chmodSync(path.join(certificatesIn(home), entry), 0o644)
  fs.chmodSync(folder, 0o755)
  return home
}

function certificatesIn(home: string): string {
  return path.join(home, '.pki', 'libnbd')
}
