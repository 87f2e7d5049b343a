// Part "repository": full backups beside restic, borg and `qemu-img convert -c`, from the start of each command to its end; what they take
// on the disk; then days of random changes, what each stores, and how long the first and the last take to restore.

import fs, { type Dirent } from 'node:fs'
import { randomFillSync } from 'node:crypto'
import path from 'node:path'
import { changeSome, sizeOf, timed } from '../backups.ts'
import { addDisk, startDaemon } from '../daemon.ts'
import { settle } from '../images.ts'
import { check, MIB, versionOf } from '../machine.ts'
import { againLast, type Bench, type Contender, type Part, takeTurns } from '../part.ts'
import { type Figure, median, type Row } from '../results.ts'
import { VARVE, VARVE_PROGRAM } from '../servers.ts'

const DISK = 'disk-source'
const GRANULE = 4096
const [NODE = '', PROGRAM = ''] = VARVE_PROGRAM
const RESTIC = 'restic'
const QEMU_IMG = 'qemu-img convert -c'
/** Settings of borg: its quickest compression, the one that Varve uses, and none. */
const BORG = { 'borg, lz4': 'lz4', 'borg, zstd': 'zstd,3', 'borg, none': 'none' } as const
const CHANGED = 'what changed'

/** Makes a full backup in an empty folder. */
interface Program {
  readonly program: string
  readonly backUp: (folder: string) => void
}

interface Stage {
  readonly bench: Bench
  readonly image: string
  readonly uri: string
}

export const REPOSITORY: Part = {
  name: 'repository',
  title: 'Full backups, days of changes, and the way back',
  extent: { rounds: 3, imageMiB: 4096 },
  about: ({
    extent,
  }) => `A raw disk of ${extent.imageMiB} MiB, half of it the files below /usr, half random data, served by the daemon; everything in memory. A full
backup into a new repository with each program, compression on unless its name says otherwise, from the start of the command to its end: ${extent.rounds} rounds, and the size of
what it made. Then with Varve: a second backup when nothing has changed; twenty days on each of which 1 % of the disk is written anew in random blocks of 4 KiB; the
restore of the first and of the last to a file; and days with 0.1 % and 0.01 %.`,
  async measure(bench) {
    if (!bench.has(VARVE.name, VARVE.version())) return []
    const image = path.join(bench.folder, 'source.raw')
    makeSource(image, bench.imageMiB * MIB)
    settle(image, true)
    const daemon = await startDaemon(bench.folder)
    try {
      const stage: Stage = { bench, image, uri: await addDisk(daemon, image, 'raw') }
      const rows = bench.wants('full') ? await measureFull(stage) : []
      return [...rows, ...(bench.wants('days') ? await measureDays(stage) : [])]
    } finally {
      await daemon.stop()
    }
  },
}

/** Half of it files as a file system lays them, from the start of a block each; the rest random. */
function makeSource(image: string, size: number): void {
  const fd = fs.openSync(image, 'w')
  let at = 0
  for (const file of filesBelow('/usr')) {
    if (at >= size / 2) break
    const bytes = fs.readFileSync(file).subarray(0, size / 2 - at)
    fs.writeSync(fd, bytes, 0, bytes.length, at)
    at += Math.ceil(bytes.length / GRANULE) * GRANULE
  }
  const piece = Buffer.alloc(MIB)
  for (; at < size; at += piece.length)
    fs.writeSync(fd, randomFillSync(piece), 0, Math.min(piece.length, size - at), at)
  fs.closeSync(fd)
}

function* filesBelow(folder: string): Iterable<string> {
  let entries: Dirent[] = []
  try {
    entries = fs.readdirSync(folder, { withFileTypes: true }).sort((a, b) => (a.name < b.name ? -1 : 1))
  } catch {
    // A folder of another user is no part of the disk.
  }
  for (const entry of entries) {
    const name = path.join(folder, entry.name)
    if (entry.isDirectory()) yield* filesBelow(name)
    else if (entry.isFile() && isReadable(name)) yield name
  }
}

function isReadable(file: string): boolean {
  try {
    fs.accessSync(file, fs.constants.R_OK)
    return true
  } catch {
    return false
  }
}

function varve(bench: Bench, ...args: string[]): string {
  return check(NODE, PROGRAM, '--home', path.join(bench.folder, 'home'), '--json', ...args)
}

function backUp(bench: Bench, repository: string): { readonly seconds: number; readonly id: string } {
  const { output, seconds } = timed(() => varve(bench, 'backup', DISK, '--repo', repository))
  const { details } = JSON.parse(output) as { details: { backup: string } }
  return { seconds, id: details.backup }
}

function programs({ bench, image }: Stage): Program[] {
  const all: Program[] = [
    {
      program: VARVE.name,
      backUp: (folder) => {
        varve(bench, 'repo', 'init', folder)
        varve(bench, 'backup', DISK, '--full', '--repo', folder)
      },
    },
  ]
  if (bench.has(RESTIC, versionOf(RESTIC, 'version'))) {
    const password = path.join(bench.folder, 'restic-password')
    fs.writeFileSync(password, 'benchmark')
    const at = (folder: string): string[] => ['--repo', folder, '--password-file', password, '--no-cache']
    all.push({
      program: RESTIC,
      backUp: (folder) => {
        check(RESTIC, ...at(folder), 'init')
        check(RESTIC, ...at(folder), '--compression', 'auto', 'backup', image)
      },
    })
  }
  if (bench.has('borg', versionOf('borg'))) {
    const settings = [
      'env',
      `BORG_BASE_DIR=${path.join(bench.folder, 'borg')}`,
      'BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes',
    ]
    const borg = (...args: string[]): string => check(settings[0] as string, ...settings.slice(1), 'borg', ...args)
    for (const [program, compression] of Object.entries(BORG)) {
      all.push({
        program,
        backUp: (folder) => {
          borg('init', '--encryption=none', folder)
          borg('create', '--compression', compression, `${folder}::one`, image)
        },
      })
    }
  }
  if (bench.has('qemu-img', versionOf('qemu-img'))) {
    const options = ['convert', '-U', '-c', '-o', 'compression_type=zstd', '-f', 'raw', '-O', 'qcow2']
    all.push({
      program: QEMU_IMG,
      backUp: (folder) => {
        fs.mkdirSync(folder)
        check('qemu-img', ...options, image, path.join(folder, 'image.qcow2'))
      },
    })
  }
  return all
}

async function measureFull(stage: Stage): Promise<Row[]> {
  const all = programs(stage)
  const sizes = new Map<string, number[]>()
  const contenders = all.map(({ program, backUp: run }): Contender => {
    const folder = path.join(stage.bench.folder, 'full')
    const measure = async (): Promise<{ value: number }> => {
      const { seconds } = timed(() => {
        run(folder)
        return ''
      })
      sizes.set(program, [...(sizes.get(program) ?? []), sizeOf(folder) / MIB])
      fs.rmSync(folder, { recursive: true })
      return { value: seconds }
    }
    return { program, measure }
  })
  const figures = await takeTurns(againLast(contenders, VARVE.name), stage.bench.rounds, 'full backup')
  const names = all.map(({ program }) => program).filter((program) => program !== VARVE.name)
  const least = (program: string): number => (program === RESTIC ? 1 / 2 : 1 / 1.2)
  const space = all.map(({ program }) => ({ program, rounds: sizes.get(program) ?? [] }))
  const shape = { unit: 'MiB', subject: VARVE.name }
  return [
    {
      ...shape,
      table: 'full backup',
      name: 'full: time',
      unit: 's',
      figures,
      // Beside qemu-img, which neither hashes nor looks for what is there, the figure is for the reader.
      asks: names.filter((name) => name !== QEMU_IMG).map((of) => ({ of, atMost: least(of) })),
    },
    {
      ...shape,
      table: 'size of a full backup',
      name: 'full: size',
      figures: space,
      asks: names.map((of) => ({ of, atMost: 1.25 })),
    },
  ]
}

/** Backups after days of changes, one in so many granules: what was stored beside what changed, in MiB. */
async function days(stage: Stage, repository: string, from: number, count: number, oneIn: number): Promise<Figure[]> {
  const stored: number[] = []
  const changed: number[] = []
  for (let day = from; day < from + count; day++) {
    changed.push((await changeSome(stage.uri, day, oneIn)) / MIB)
    const before = sizeOf(repository)
    backUp(stage.bench, repository)
    stored.push((sizeOf(repository) - before) / MIB)
  }
  console.error(`  one in ${oneIn}: stored ${median(stored).toFixed(2)} MiB for ${median(changed).toFixed(2)} MiB`)
  return [
    { program: VARVE.name, rounds: stored },
    { program: CHANGED, rounds: changed },
  ]
}

async function measureDays(stage: Stage): Promise<Row[]> {
  const { bench } = stage
  const repository = path.join(bench.folder, 'days')
  varve(bench, 'repo', 'init', repository)
  const first = backUp(bench, repository)
  const unchanged = Array.from({ length: bench.rounds }, () => backUp(bench, repository).seconds)
  const many = await days(stage, repository, 1, 20, 100)
  const last = backUp(bench, repository)
  const restores = await takeTurns(
    [
      { program: 'the last', measure: async () => ({ value: restore(stage, repository, last.id) }) },
      { program: 'the first', measure: async () => ({ value: restore(stage, repository, first.id) }) },
    ],
    bench.rounds,
    'restore',
  )
  const few = await days(stage, repository, 100, 3, 1000)
  const fewer = await days(stage, repository, 200, 3, 10_000)
  const shape = { table: 'stored a day', unit: 'MiB', subject: VARVE.name }
  // Of small changes three times the changed bytes and 64 KiB may be stored.
  const room = (figures: readonly Figure[]): number => 3 + 1 / 16 / median(figures[1]?.rounds ?? [1])
  return [
    {
      table: 'second backup',
      name: 'days: nothing changed',
      unit: 's',
      subject: VARVE.name,
      figures: [{ program: VARVE.name, rounds: unchanged }],
      asks: [{ atMost: 1 }],
    },
    { ...shape, name: 'days: 1 %', figures: many, asks: [{ of: CHANGED, atMost: 2 }] },
    { ...shape, name: 'days: 0.1 %', figures: few, asks: [{ of: CHANGED, atMost: room(few) }] },
    { ...shape, name: 'days: 0.01 %', figures: fewer, asks: [{ of: CHANGED, atMost: room(fewer) }] },
    {
      table: 'restore after twenty days',
      name: 'days: restore',
      unit: 's',
      subject: 'the last',
      figures: restores,
      asks: [{ of: 'the first', atMost: 1 / 0.8 }],
    },
  ]
}

/** Restores to a new file; seconds. */
function restore({ bench }: Stage, repository: string, id: string): number {
  const target = path.join(bench.folder, 'restored.raw')
  const { seconds } = timed(() => varve(bench, 'restore', id, '--repo', repository, '--to', target))
  fs.rmSync(target)
  return seconds
}
