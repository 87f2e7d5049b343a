// Part "in-process": what the hop over NBD costs a guest whose QEMU could open the image by itself. QEMU's own block layer is the
// client each time: of the file, of `varve nbd`, of qemu-nbd. On record; nothing is asked.

import { settle } from '../images.ts'
import { versionOf } from '../machine.ts'
import { type Part, takeTurns } from '../part.ts'
import { measureByQemu, type QemuLoad } from '../qemu-bench.ts'
import { AGAIN, type Row } from '../results.ts'
import { QEMU_NBD, VARVE } from '../servers.ts'
import { withServers } from '../servers-in-turn.ts'

const ITSELF = 'QEMU itself'
const LOADS: readonly QemuLoad[] = [
  { name: 'read 4 KiB, depth 32', depth: 32, requests: 100_000 },
  { name: 'read 4 KiB, depth 1', depth: 1, requests: 20_000 },
]

export const IN_PROCESS: Part = {
  name: 'in-process',
  title: 'What the hop costs',
  extent: { imageMiB: 1024 },
  about: ({
    extent,
  }) => `\`qemu-img bench\`: QEMU's block layer reads an image of ${extent.imageMiB} MiB in the page cache, opened by itself or served over a Unix
socket. Where this difference matters more than what the daemon gives, let QEMU open the image.`,
  async measure(bench) {
    const rows: Row[] = []
    if (!bench.has('qemu-img', versionOf('qemu-img'))) return rows
    for (const format of ['raw', 'qcow2'] as const) {
      const loads = LOADS.filter(({ name }) => bench.wants(`${format}, ${name}`))
      if (loads.length === 0) continue
      await withServers(bench, [VARVE, QEMU_NBD], { format, folder: bench.folder }, async (started) => {
        const [first] = started
        if (first === undefined) return
        // The file of the first server, read beside it: both have it in the page cache.
        const file = ['--force-share', '-t', 'writeback', '-i', 'io_uring', '-f', format, first.image]
        const targets = [
          ...started.map(({ program, server }) => ({ program, target: ['-f', 'raw', server.uri] })),
          { program: ITSELF, target: file },
          { program: `${ITSELF}${AGAIN}`, target: file },
        ]
        for (const load of loads) {
          const contenders = targets.map(({ program, target }) => ({
            program,
            measure: () => {
              for (const { image } of started) settle(image, false)
              return measureByQemu(target, load)
            },
          }))
          const figures = await takeTurns(contenders, bench.rounds, `${format}, ${load.name}`)
          rows.push({ table: format, name: load.name, unit: 'a second', subject: VARVE.name, figures, asks: [] })
        }
      })
    }
    return rows
  },
}
