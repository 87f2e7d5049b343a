// Part "incremental": the backup after a day in which one granule in a hundred changed, beside restic's second backup of the same file:
// how long it takes, what it reads, and what it stores.

import fs from 'node:fs'
import path from 'node:path'
import { changeSome, sizeOf, timed } from '../backups.ts'
import { addDisk, startDaemon } from '../daemon.ts'
import { makeImage, settle } from '../images.ts'
import { check, MIB, versionOf } from '../machine.ts'
import { type Bench, type Measurement, type Part, takeTurns } from '../part.ts'
import type { Figure, Row } from '../results.ts'
import { VARVE, VARVE_PROGRAM } from '../servers.ts'

const DISK = 'disk-day'
/** Of all granules, one in so many changes between two backups. */
const ONE_IN = 100
const RESTIC = 'restic'
const CHANGED = 'what changed'

/** What one backup took and did. */
interface Done {
  readonly seconds: number
  readonly readMiB: number
  readonly storedMiB: number
}

interface Tool {
  readonly program: string
  readonly backUp: () => Done
}

export const INCREMENTAL: Part = {
  name: 'incremental',
  title: 'The next backup',
  extent: { rounds: 3, imageMiB: 4096 },
  about: ({
    extent,
  }) => `A raw disk of ${extent.imageMiB} MiB of random data, served and written to; a first backup of it into a repository of each program, all
in memory; then ${extent.rounds} times: one granule of 4 KiB in ${ONE_IN} is written anew, at random places, and each program backs up again,
\`varve backup\` the disk of the running daemon, restic the image file. Times are those of the whole command.`,
  async measure(bench) {
    if (!bench.wants('next backup') || !bench.has(VARVE.name, VARVE.version())) return []
    const hasRestic = bench.has(RESTIC, versionOf(RESTIC, 'version'))
    const image = path.join(bench.folder, 'day.raw')
    makeImage(image, 'raw', bench.imageMiB)
    const daemon = await startDaemon(bench.folder)
    try {
      const uri = await addDisk(daemon, image, 'raw')
      const tools = [varve(bench), ...(hasRestic ? [restic(bench, image)] : [])]
      for (const tool of tools) tool.backUp()
      return await measureDays(bench, { image, uri, tools })
    } finally {
      await daemon.stop()
    }
  },
}

interface Days {
  readonly image: string
  readonly uri: string
  readonly tools: readonly Tool[]
}

async function measureDays(bench: Bench, { image, uri, tools }: Days): Promise<Row[]> {
  const seconds: Figure[] = []
  const all = new Map(tools.map(({ program }) => [program, [] as Done[]]))
  const changed: number[] = []
  for (let round = 0; round < bench.rounds; round++) {
    changed.push((await changeSome(uri, round + 1, ONE_IN)) / MIB)
    settle(image, true)
    // Within a round both back up the same day; another one begins each time.
    const contenders = tools.map(({ program, backUp }) => ({
      program,
      measure: async (): Promise<Measurement> => {
        const done = backUp()
        all.get(program)?.push(done)
        return { value: done.seconds }
      },
    }))
    const order = round % 2 === 0 ? contenders : contenders.toReversed()
    seconds.push(...(await takeTurns(order, 1, `day ${round + 1}`)))
  }
  const shape = { table: 'bytes of the next backup', unit: 'MiB', subject: VARVE.name }
  const figure = (program: string, value: (done: Done) => number): Figure => ({
    program,
    rounds: (all.get(program) ?? []).map(value),
  })
  const figures = (value: (done: Done) => number): Figure[] => tools.map(({ program }) => figure(program, value))
  const days = { program: CHANGED, rounds: changed }
  const asRestic = tools.length > 1 ? [{ of: RESTIC, atMost: 0.1 }] : []
  return [
    {
      ...shape,
      table: 'next backup',
      name: 'time',
      unit: 's',
      figures: figures((done) => done.seconds),
      asks: asRestic,
    },
    {
      ...shape,
      name: 'read',
      figures: [...figures((done) => done.readMiB), days],
      asks: [{ of: CHANGED, atMost: 1.5 }],
    },
    {
      ...shape,
      name: 'stored',
      figures: [...figures((done) => done.storedMiB), days],
      asks: [{ of: CHANGED, atMost: 2 }],
    },
  ]
}

function varve(bench: Bench): Tool {
  const [node = '', program = ''] = VARVE_PROGRAM
  const repository = path.join(bench.folder, 'varve-repository')
  check(node, program, 'repo', 'init', repository)
  const home = path.join(bench.folder, 'home')
  return {
    program: VARVE.name,
    backUp: () => {
      const { output, seconds } = timed(() =>
        check(node, program, '--home', home, '--json', 'backup', DISK, '--repo', repository),
      )
      const { details } = JSON.parse(output) as { details: { readBytes: number; storedBytes: number } }
      return { seconds, readMiB: details.readBytes / MIB, storedMiB: details.storedBytes / MIB }
    },
  }
}

interface ResticSummary {
  readonly message_type: string
  readonly total_bytes_processed: number
}

function restic(bench: Bench, image: string): Tool {
  const repository = path.join(bench.folder, 'restic-repository')
  const password = path.join(bench.folder, 'restic-password')
  fs.writeFileSync(password, 'benchmark')
  const at = ['--repo', repository, '--password-file', password, '--no-cache']
  check(RESTIC, ...at, 'init')
  return {
    program: RESTIC,
    backUp: () => {
      const before = sizeOf(repository)
      const { output, seconds } = timed(() => check(RESTIC, ...at, '--json', 'backup', image))
      const lines = output.trim().split('\n')
      const summary = lines
        .map((line) => JSON.parse(line) as ResticSummary)
        .find(({ message_type: type }) => type === 'summary')
      return {
        seconds,
        readMiB: (summary?.total_bytes_processed ?? 0) / MIB,
        storedMiB: (sizeOf(repository) - before) / MIB,
      }
    },
  }
}
