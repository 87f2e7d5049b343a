// Part "slow-neighbour": disks of one shard while another disk of it lies on a slow file and is loaded: how long their requests
// take, with and without that load.

import path from 'node:path'
import { addDisk, startDaemon } from '../daemon.ts'
import { type Load, measureAll } from '../fio.ts'
import { makeImage, settle } from '../images.ts'
import { type Part, takeTurns } from '../part.ts'
import { AGAIN, type Row } from '../results.ts'
import { VARVE } from '../servers.ts'
import { makeSlowFile, whyNoSlowFile } from '../slow-file.ts'

const NEIGHBOURS = 3
const ALONE = 'slow disk idle'
const LOADED = 'slow disk loaded'

/** What the neighbours do: well below what the machine can, so that their times are not those of a queue. */
const NEIGHBOUR: Load = { name: 'random read 4 KiB', rw: 'randread', block: '4k', depth: 4, limit: 1000 }

const SLOW_LOADS: readonly Load[] = [
  { name: 'reads at depth 32', rw: 'randread', block: '4k', depth: 32 },
  { name: 'writes at depth 32', rw: 'randwrite', block: '4k', depth: 32 },
]

export const SLOW_NEIGHBOUR: Part = {
  name: 'slow-neighbour',
  title: 'A slow disk beside others',
  extent: { imageMiB: 256, seconds: 2 },
  about:
    () => `\`varve serve\` with one shard: ${NEIGHBOURS} raw disks in the page cache, each read at random by ${NEIGHBOUR.limit} requests of 4 KiB a second, and one on a file
whose every operation takes 50 ms (nbdkit's delay filter, mounted by nbdfuse). The worst of the ${NEIGHBOURS} disks' 99th percentiles, while
the slow disk is idle and while it is loaded.`,
  async measure(bench) {
    const loads = SLOW_LOADS.filter(({ name }) => bench.wants(name))
    const obstacle = whyNoSlowFile()
    if (obstacle !== undefined) console.error(`  left out: ${obstacle}`)
    if (loads.length === 0 || obstacle !== undefined || !bench.has(VARVE.name, VARVE.version())) return []
    const slow = await makeSlowFile(bench.folder, bench.imageMiB)
    try {
      const daemon = await startDaemon(bench.folder, '--shards', '1')
      try {
        const images = Array.from({ length: NEIGHBOURS }, (_, index) => path.join(bench.folder, `fast${index}.raw`))
        for (const image of images) {
          makeImage(image, 'raw', bench.imageMiB)
          settle(image, false)
        }
        const uris: string[] = []
        for (const image of images) uris.push(await addDisk(daemon, image, 'raw'))
        const slowUri = await addDisk(daemon, slow.file, 'raw')
        const worst = async (): Promise<{ value: number }> => {
          const served = await measureAll(uris, NEIGHBOUR, bench.seconds)
          return { value: Math.max(...served.map(({ p99Us }) => p99Us)) }
        }
        const rows: Row[] = []
        for (const load of loads) {
          const contenders = [
            { program: LOADED, measure: () => during(slowUri, load, bench.seconds + 2, worst) },
            { program: ALONE, measure: worst },
            { program: `${ALONE}${AGAIN}`, measure: worst },
          ]
          const figures = await takeTurns(contenders, bench.rounds, load.name)
          const asks = [{ of: ALONE, atMost: 2 }]
          rows.push({ table: 'load on the slow disk', name: load.name, unit: 'µs', subject: LOADED, figures, asks })
        }
        return rows
      } finally {
        await daemon.stop()
      }
    } finally {
      await slow.remove()
    }
  },
}

/** Measures while a load is on the slow disk, which begins a second earlier and ends later. */
async function during<T>(uri: string, load: Load, seconds: number, work: () => Promise<T>): Promise<T> {
  const loaded = measureAll([uri], load, seconds)
  await new Promise((resolve) => setTimeout(resolve, 1000))
  const found = await work()
  const [served] = await loaded
  if ((served?.iops ?? 0) === 0) throw new Error('nothing was done on the slow disk')
  return found
}
