// `varve nbd` beside qemu-nbd (and nbdkit for raw images), measured by fio over Unix sockets. Servers take turns within each
// round, so that a slow minute of the machine hits all of them; the reference runs twice per round to show the noise.
//
//   node bench/nbd.ts                the figures that are published
//   node bench/nbd.ts --quick        a first impression, not published
//   node bench/nbd.ts --only 'depth 1'   some of it, not published
//   VARVE_BENCH_DIR=DIR              where the images go; /dev/shm unless given

import { randomFillSync } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { type Measurement, measure, WORKLOADS } from './fio.ts'
import { check, currentSetting, FOLDER, median, MIB, residentShare } from './machine.ts'
import { noiseOf, ratioOf, REFERENCE, REFERENCE_AGAIN, type Results, type Row } from './nbd-report.ts'
import { publish } from './page.ts'
import {
  type ImageFormat,
  NBDKIT,
  QEMU_NBD,
  type RunningServer,
  type ServerKind,
  startServer,
  VARVE,
} from './servers.ts'

const KINDS: readonly ServerKind[] = [VARVE, QEMU_NBD, NBDKIT]

const { values } = parseArgs({ options: { quick: { type: 'boolean' }, only: { type: 'string' } } })
const settings =
  values.quick === true ? { seconds: 1, rounds: 3, imageMiB: 256 } : { seconds: 2, rounds: 5, imageMiB: 512 }

/** Makes an image full of random data: nothing in it is a hole, so every read moves bytes. */
function makeImage(file: string, format: ImageFormat): void {
  const raw = format === 'raw' ? file : `${file}.raw`
  const piece = Buffer.alloc(8 * MIB)
  const fd = fs.openSync(raw, 'w')
  for (let at = 0; at < settings.imageMiB * MIB; at += piece.length)
    fs.writeSync(fd, randomFillSync(piece), 0, piece.length, at)
  fs.closeSync(fd)
  if (format === 'raw') return
  check('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw, file)
  fs.rmSync(raw)
}

/** Reads the image through, so that it is in the page cache. */
function warm(file: string): void {
  const piece = Buffer.alloc(8 * MIB)
  const fd = fs.openSync(file, 'r')
  while (fs.readSync(fd, piece) > 0);
  fs.closeSync(fd)
}

/** Sees to it that the image is in the page cache and clean, so that no round pays for the one before. */
function settle(file: string, isWrite: boolean): void {
  if (residentShare(file) < 0.999) warm(file)
  if (residentShare(file) < 0.999) throw new Error(`${file} does not stay in the page cache; free some memory`)
  if (!isWrite) return
  const fd = fs.openSync(file, 'r+')
  fs.fsyncSync(fd)
  fs.closeSync(fd)
}

interface Contender {
  readonly label: string
  readonly server: RunningServer
  readonly image: string
}

async function benchFormat(folder: string, format: ImageFormat, rows: Row[]): Promise<void> {
  const contenders: Contender[] = []
  try {
    for (const kind of KINDS.filter(({ formats }) => formats.includes(format))) {
      const image = path.join(folder, `${kind.name.replaceAll(' ', '-')}.${format}`)
      makeImage(image, format)
      warm(image)
      const server = await startServer(kind, image, format, path.join(folder, `${format}-${contenders.length}.sock`))
      contenders.push({ label: kind.name, server, image })
    }
    const reference = contenders.find(({ label }) => label === REFERENCE)
    if (reference !== undefined) contenders.push({ ...reference, label: REFERENCE_AGAIN })
    for (const workload of WORKLOADS) {
      if (values.only !== undefined && !workload.name.includes(values.only)) continue
      const found = new Map<string, Measurement[]>(contenders.map(({ label }) => [label, []]))
      for (let round = 0; round < settings.rounds; round++) {
        for (const { label, server, image } of contenders) {
          settle(image, workload.rw.endsWith('write'))
          found.get(label)?.push(await measure(server.uri, workload, settings.seconds))
        }
      }
      for (const [server, all] of found) {
        const rounds = all.map(({ iops }) => Math.round(iops))
        rows.push({ format, workload: workload.name, server, rounds, p99Us: all.map(({ p99Us }) => p99Us) })
        console.error(`${format}, ${workload.name}, ${server}: ${Math.round(median(rounds))} a second`)
      }
    }
  } finally {
    for (const { label, server } of contenders) if (label !== REFERENCE_AGAIN) await server.stop()
  }
}

const folder = fs.mkdtempSync(path.join(FOLDER, 'varve-bench-'))
const setting = currentSetting()
const rows: Row[] = []
try {
  for (const format of ['raw', 'qcow2'] as const) await benchFormat(folder, format, rows)
} finally {
  fs.rmSync(folder, { recursive: true, force: true })
}
const results: Results = {
  ...setting,
  versions: Object.fromEntries(KINDS.map((kind) => [kind.name, kind.version()])),
  settings,
  targets: Object.fromEntries(WORKLOADS.map(({ name, target }) => [name, target])),
  rows,
}
for (const { format, workload, server } of rows) {
  const ratio = ratioOf(results, format, workload, server)
  if (server === VARVE.name || server === REFERENCE_AGAIN)
    console.log(`${format}, ${workload}: ${server} ${ratio?.toFixed(2)}`)
}
if (values.quick !== true && values.only === undefined && !publish('nbd', results, noiseOf(results)))
  process.exitCode = 1
