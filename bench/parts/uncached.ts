// Part "uncached": O_DIRECT on a disk, for `varve nbd` and for qemu-nbd.

import { measure, RANDOM_READ, RANDOM_READ_1, RANDOM_WRITE } from '../fio.ts'
import { sync } from '../images.ts'
import { check, isMemory } from '../machine.ts'
import { againLast, type Part, takeTurns } from '../part.ts'
import type { Row } from '../results.ts'
import { QEMU_NBD, VARVE, VARVE_PROGRAM } from '../servers.ts'
import { withServers } from '../servers-in-turn.ts'

export const UNCACHED: Part = {
  name: 'uncached',
  title: 'Past the page cache',
  about: ({ extent }) =>
    `Raw images of ${extent.imageMiB} MiB of random data on a disk, both servers with O_DIRECT (\`--cache none\`): what the disk gives.`,
  async measure(bench) {
    const loads = [RANDOM_READ, RANDOM_WRITE, RANDOM_READ_1].filter(({ name }) => bench.wants(name))
    if (loads.length === 0) return []
    if (isMemory(bench.diskFolder)) {
      console.error('  left out: the folder for temporary files is memory; name one on a disk by VARVE_BENCH_DISK')
      return []
    }
    const [node = '', ...varve] = VARVE_PROGRAM
    if (!/--cache /.test(check(node, ...varve, 'nbd', '--help'))) {
      console.error('  left out: varve nbd has no --cache')
      return []
    }
    const rows: Row[] = []
    const images = { format: 'raw', folder: bench.diskFolder, isUncached: true } as const
    await withServers(bench, [VARVE, QEMU_NBD], images, async (started) => {
      for (const load of loads) {
        const contenders = againLast(started, QEMU_NBD.name).map(({ program, server, image }) => ({
          program,
          measure: () => {
            sync(image)
            return measure(server.uri, load, bench.seconds)
          },
        }))
        const figures = await takeTurns(contenders, bench.rounds, load.name)
        const asks = [{ of: QEMU_NBD.name, atLeast: 1 }]
        rows.push({ table: 'O_DIRECT', name: load.name, unit: 'a second', subject: VARVE.name, figures, asks })
      }
    })
    return rows
  },
}
