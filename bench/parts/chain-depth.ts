// Part "chain-depth": a chain of 64 layers, empty overlays over a full base, beside the base alone: speed, and memory after a
// first read of all.

import path from 'node:path'
import { measure, RANDOM_READ } from '../fio.ts'
import { type ImageFormat, makeImage, makeOverlays, settle } from '../images.ts'
import { check, memoryOf } from '../machine.ts'
import { againLast, type Bench, type Part, takeTurns } from '../part.ts'
import type { Figure, Row } from '../results.ts'
import { QEMU_NBD, type RunningServer, type ServerKind, startServer, VARVE } from '../servers.ts'

const DEPTH = 64
const FORMAT: ImageFormat = 'qcow2'

interface Started {
  readonly program: string
  readonly server: RunningServer
}

function labelOf(kind: ServerKind, depth: number): string {
  return `${kind.name}, depth ${depth}`
}

export const CHAIN_DEPTH: Part = {
  name: 'chain-depth',
  title: 'Long chains',
  about: ({
    extent,
  }) => `A qcow2 chain of ${DEPTH} layers, a full base of ${extent.imageMiB} MiB below empty overlays, beside its base alone. "Memory" is the most
that the server had resident after it opened the image and a client read all of it once.`,
  async measure(bench) {
    const base = path.join(bench.folder, 'base.qcow2')
    makeImage(base, FORMAT, bench.imageMiB)
    const top = makeOverlays(base, FORMAT, DEPTH - 1)
    const started: Started[] = []
    try {
      for (const kind of [VARVE, QEMU_NBD]) {
        if (!bench.has(kind.name, kind.version())) continue
        for (const [depth, image] of [
          [1, base],
          [DEPTH, top],
        ] as const)
          started.push({ program: labelOf(kind, depth), server: await startReadOnly(kind, image, depth) })
      }
      return await measureRows(bench, base, started)
    } finally {
      for (const { server } of started) await server.stop()
    }
  },
}

/** Several servers have the base open, so none may write to it. */
function startReadOnly(kind: ServerKind, image: string, depth: number): Promise<RunningServer> {
  const place = { socket: `${image}.${kind.name.replaceAll(' ', '-')}.${depth}.sock` }
  return startServer(kind, { image, format: FORMAT, place, isReadOnly: true })
}

async function measureRows(bench: Bench, base: string, started: readonly Started[]): Promise<Row[]> {
  const shape = { table: 'chain of 64', subject: labelOf(VARVE, DEPTH) }
  const rows: Row[] = []
  const peaks: Figure[] = started.map(({ program, server }) => {
    check('nbdcopy', server.uri, 'null:')
    return { program, rounds: [Math.round(memoryOf(server.pid).peak)] }
  })
  for (const { program, rounds } of peaks) console.error(`  memory, ${program}: ${rounds[0]}`)
  rows.push({ ...shape, name: 'memory', unit: 'MiB', figures: peaks, asks: [{ of: labelOf(VARVE, 1), atMost: 2 }] })
  if (!bench.wants(RANDOM_READ.name)) return rows
  const contenders = againLast(started, labelOf(VARVE, 1)).map(({ program, server }) => ({
    program,
    measure: () => {
      settle(base, false)
      return measure(server.uri, RANDOM_READ, bench.seconds)
    },
  }))
  const figures = await takeTurns(contenders, bench.rounds, RANDOM_READ.name)
  const asks = [{ of: labelOf(VARVE, 1), atLeast: 0.95 }]
  rows.push({ ...shape, name: RANDOM_READ.name, unit: 'a second', figures, asks })
  return rows
}
