// Parts "cached" and "memory": `varve nbd` beside the C servers, one client over a Unix socket, images in the page cache of a file
// system on a disk, or on one that is memory.

import {
  isWrite,
  type Load,
  measure,
  RANDOM_READ,
  RANDOM_READ_1,
  RANDOM_WRITE,
  RANDOM_WRITE_1,
  SEQUENTIAL_READ,
  SEQUENTIAL_WRITE,
} from '../fio.ts'
import { type ImageFormat, settle } from '../images.ts'
import { againLast, type Bench, type Part, takeTurns } from '../part.ts'
import type { Ask, Row } from '../results.ts'
import { NBDKIT, QEMU_NBD, STORAGE_DAEMON, VARVE } from '../servers.ts'
import { type Started, withServers } from '../servers-in-turn.ts'

const QEMU = QEMU_NBD.name
const DAEMON = STORAGE_DAEMON.name

function atLeast(ratio: number, ...programs: string[]): Ask[] {
  return programs.map((of) => ({ of, atLeast: ratio }))
}

interface Workload {
  readonly load: Load
  readonly asks: Readonly<Record<ImageFormat, readonly Ask[]>>
}

const WORKLOADS: readonly Workload[] = [
  {
    load: RANDOM_READ,
    asks: { raw: [...atLeast(1.5, QEMU, DAEMON), ...atLeast(1, NBDKIT.name)], qcow2: atLeast(1.5, DAEMON) },
  },
  {
    load: RANDOM_WRITE,
    asks: { raw: [...atLeast(1.5, QEMU, DAEMON), ...atLeast(0.9, NBDKIT.name)], qcow2: atLeast(1.5, DAEMON) },
  },
  { load: RANDOM_READ_1, asks: { raw: atLeast(1, QEMU), qcow2: atLeast(1, DAEMON) } },
  { load: RANDOM_WRITE_1, asks: { raw: atLeast(1, QEMU), qcow2: atLeast(1, DAEMON) } },
  { load: SEQUENTIAL_READ, asks: { raw: atLeast(1.2, QEMU), qcow2: atLeast(1, DAEMON) } },
  { load: SEQUENTIAL_WRITE, asks: { raw: atLeast(1.2, QEMU), qcow2: atLeast(1, DAEMON) } },
]

const KINDS = [VARVE, QEMU_NBD, STORAGE_DAEMON, NBDKIT]

/** Files of a real file system, as guests' disks are: io_uring answers from its page cache at once, as it cannot on a tmpfs. */
export const CACHED: Part = {
  name: 'cached',
  title: 'NBD servers side by side',
  about: ({
    extent,
  }) => `fio's nbd engine over a Unix socket. Each server has an image of its own, of ${extent.imageMiB} MiB of random data, in a folder on a disk but
wholly in the page cache, and written back, before every measurement: no disk is measured, as far as that can be.`,
  measure: (bench) => measureIn(bench, bench.diskFolder, WORKLOADS),
}

/** The same where the file system is memory. */
export const MEMORY: Part = {
  name: 'memory',
  title: 'NBD servers side by side, images in memory',
  extent: { imageMiB: 1024 },
  about: ({ extent }) =>
    `As above, with images of ${extent.imageMiB} MiB on a tmpfs: no disk can disturb, but io_uring, which QEMU uses, has to ask threads there.`,
  measure: (bench) =>
    measureIn(
      bench,
      bench.folder,
      WORKLOADS.filter(({ load }) => load.depth === 32).map(({ load }) => ({ load, asks: { raw: [], qcow2: [] } })),
    ),
}

async function measureIn(bench: Bench, folder: string, workloads: readonly Workload[]): Promise<Row[]> {
  const rows: Row[] = []
  for (const format of ['raw', 'qcow2'] as const) {
    const wanted = workloads.filter(({ load }) => bench.wants(`${format}, ${load.name}`))
    if (wanted.length === 0) continue
    await withServers(bench, KINDS, { format, folder }, async (started) => {
      for (const { load, asks } of wanted) rows.push(await measureRow(bench, format, load, asks[format], started))
    })
  }
  return rows
}

async function measureRow(
  bench: Bench,
  format: ImageFormat,
  load: Load,
  asks: readonly Ask[],
  started: readonly Started[],
): Promise<Row> {
  const contenders = againLast(started, QEMU).map(({ program, server, image }) => ({
    program,
    measure: () => {
      settle(image, isWrite(load))
      return measure(server.uri, load, bench.seconds)
    },
  }))
  const figures = await takeTurns(contenders, bench.rounds, `${format}, ${load.name}`)
  return { table: format, name: load.name, unit: 'a second', subject: VARVE.name, figures, asks }
}
