// Part "eight-disks": eight disks under load at once in one `varve serve` beside one disk alone, and beside eight in one
// qemu-storage-daemon.

import path from 'node:path'
import { addDisk, startDaemon } from '../daemon.ts'
import { isWrite, type Load, measureAll, RANDOM_READ, RANDOM_WRITE } from '../fio.ts'
import { makeImage, settle } from '../images.ts'
import { type Bench, type Contender, type Part, takeTurns } from '../part.ts'
import { answers, type RunningProcess, startProcess } from '../process.ts'
import { AGAIN, type Row } from '../results.ts'
import { STORAGE_DAEMON, storageDaemonDisk, VARVE } from '../servers.ts'

const DISKS = 8
const ONE = 'varve serve, one disk'
const EIGHT = 'varve serve, eight'
const PEER = 'qemu-storage-daemon, eight'

interface Loaded {
  readonly program: string
  readonly uris: readonly string[]
  readonly images: readonly string[]
}

export const EIGHT_DISKS: Part = {
  name: 'eight-disks',
  title: 'Eight disks at once',
  extent: { imageMiB: 256 },
  about: ({
    extent,
  }) => `Eight raw images of ${extent.imageMiB} MiB of random data in the page cache, each with a client of its own, all at once: requests a
second of all together. \`varve serve\` has one thread for each core.`,
  async measure(bench) {
    const loads = [RANDOM_READ, RANDOM_WRITE].filter(({ name }) => bench.wants(name))
    if (loads.length === 0) return []
    const processes: RunningProcess[] = []
    try {
      const loaded = [...(await startVarve(bench, processes)), ...(await startPeer(bench, processes))]
      const rows: Row[] = []
      for (const load of loads) rows.push(await measureRow(bench, load, loaded))
      return rows
    } finally {
      for (const one of processes) await one.stop()
    }
  },
}

function makeImages(bench: Bench, program: string): string[] {
  return Array.from({ length: DISKS }, (_, index) => {
    const image = path.join(bench.folder, `${program}-${index}.raw`)
    makeImage(image, 'raw', bench.imageMiB)
    return image
  })
}

async function startVarve(bench: Bench, processes: RunningProcess[]): Promise<Loaded[]> {
  if (!bench.has(VARVE.name, VARVE.version())) return []
  const images = makeImages(bench, 'varve')
  const daemon = await startDaemon(bench.folder)
  processes.push(daemon)
  const uris: string[] = []
  for (const image of images) uris.push(await addDisk(daemon, image, 'raw'))
  const first = { uris: uris.slice(0, 1), images: images.slice(0, 1) }
  return [
    { program: EIGHT, uris, images },
    { program: ONE, ...first },
    { program: `${ONE}${AGAIN}`, ...first },
  ]
}

async function startPeer(bench: Bench, processes: RunningProcess[]): Promise<Loaded[]> {
  if (!bench.has(STORAGE_DAEMON.name, STORAGE_DAEMON.version())) return []
  const images = makeImages(bench, 'peer')
  const socket = path.join(bench.folder, 'peer.sock')
  const disks = images.flatMap((image, index) =>
    storageDaemonDisk(`disk${index}`, { image, format: 'raw', place: { socket } }),
  )
  const command = ['qemu-storage-daemon', '--nbd-server', `addr.type=unix,addr.path=${socket}`, ...disks]
  processes.push(await startProcess(command, () => answers({ path: socket })))
  return [{ program: PEER, uris: images.map((_, index) => `nbd+unix:///disk${index}?socket=${socket}`), images }]
}

async function measureRow(bench: Bench, load: Load, loaded: readonly Loaded[]): Promise<Row> {
  const contenders = loaded.map(({ program, uris, images }): Contender => {
    return {
      program,
      measure: async () => {
        for (const image of images) settle(image, isWrite(load))
        const served = await measureAll(uris, load, bench.seconds)
        return { value: Math.round(served.reduce((sum, { iops }) => sum + iops, 0)) }
      },
    }
  })
  const figures = await takeTurns(contenders, bench.rounds, load.name)
  const asks = [
    { of: ONE, atLeast: 0.9 },
    { of: PEER, atLeast: 1 },
  ]
  return { table: 'disks at once', name: load.name, unit: 'a second', subject: EIGHT, figures, asks }
}
