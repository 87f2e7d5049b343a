// Part "restore": the way back, beside restic's: a whole disk to an image; a disk that a guest reads at once (instant restore), how soon, and how
// fast the rest comes while a guest reads at random.

import fs from 'node:fs'
import path from 'node:path'
import { randomFillSync } from 'node:crypto'
import { connectNbd } from '../../src/nbd/client.ts'
import { type Daemon, startDaemon } from '../daemon.ts'
import type { Load } from '../fio.ts'
import { check, MIB, versionOf } from '../machine.ts'
import { againLast, type Bench, type Contender, type Measurement, type Part, takeTurns } from '../part.ts'
import type { Figure, Row } from '../results.ts'
import { VARVE, VARVE_PROGRAM } from '../servers.ts'
import { SteadyLoad } from '../steady-load.ts'

const DISK = 'vm1'
const SUBJECT = 'varve restore'
const LIVE = 'varve restore --live'
const BESIDE = `${LIVE}, guest reading`
const RESTIC = 'restic'
const GUEST: Load = { name: 'random read 4 KiB, depth 1', rw: 'randread', block: '4k', depth: 1, limit: 1000 }
/** Real files, which compress as such do. */
const SOURCES = ['/usr/lib', '/usr/bin', '/usr/share']

export const RESTORE: Part = {
  name: 'restore',
  title: 'Restore',
  extent: { rounds: 3, imageMiB: 2048 },
  about: ({
    extent,
  }) => `A disk of ${extent.imageMiB} MiB, half of it random and half real files of the machine, backed up once by each program; all in memory. To an
image: the whole command. Live: from the command to the first 4 KiB that its NBD client has read, at a place that nobody has read before; and to the end of the job, alone and while fio reads at random
(${GUEST.name}, ${GUEST.limit} requests a second).`,
  async measure(bench) {
    if (!bench.wants('restore') || !bench.has(VARVE.name, VARVE.version())) return []
    const hasRestic = bench.has(RESTIC, versionOf(RESTIC, 'version'))
    const image = path.join(bench.folder, 'vm1.raw')
    makeMixedImage(image, bench.imageMiB)
    const daemon = await startDaemon(bench.folder)
    try {
      return await measureRestores(bench, daemon, image, hasRestic)
    } finally {
      await daemon.stop()
    }
  },
}

async function measureRestores(bench: Bench, daemon: Daemon, image: string, hasRestic: boolean): Promise<Row[]> {
  const stage = await Stage.make(bench, daemon, image)
  const plain: Contender = { program: SUBJECT, measure: () => stage.toImage('raw') }
  const rivals = hasRestic ? [stage.restic(image)] : []
  const toImage = await takeTurns(againLast([plain, ...rivals], SUBJECT), bench.rounds, 'to an image, MiB a second')
  const live = [
    { program: SUBJECT, measure: () => stage.toImage('qcow2') },
    { program: LIVE, measure: () => stage.live(undefined) },
    { program: BESIDE, measure: () => stage.live(GUEST) },
  ]
  const streams = await takeTurns(live, bench.rounds, 'live, MiB a second')
  const first: Figure = { program: LIVE, rounds: stage.firstMs }
  return [
    {
      table: 'to an image',
      name: 'raw',
      unit: 'MiB a second',
      subject: SUBJECT,
      figures: toImage,
      asks: [{ of: RESTIC, atLeast: 1.5 }],
    },
    {
      table: 'live',
      name: 'all of it, qcow2',
      unit: 'MiB a second',
      subject: LIVE,
      figures: streams,
      asks: [
        { of: SUBJECT, atLeast: 0.8 },
        { program: BESIDE, of: SUBJECT, atLeast: 0.8 },
      ],
    },
    { table: 'live', name: 'first 4 KiB', unit: 'ms', subject: LIVE, figures: [first], asks: [{ atMost: 300 }] },
  ]
}

/** A backup in a repository, and how it is brought back. */
class Stage {
  /** Of each live restore: from the command to the first read. */
  readonly firstMs: number[] = []
  readonly #bench: Bench
  readonly #daemon: Daemon
  readonly #repository: string
  readonly #backup: string
  #count = 0

  private constructor(bench: Bench, daemon: Daemon, repository: string, backup: string) {
    this.#bench = bench
    this.#daemon = daemon
    this.#repository = repository
    this.#backup = backup
  }

  static async make(bench: Bench, daemon: Daemon, image: string): Promise<Stage> {
    const repository = path.join(bench.folder, 'repository')
    varve(bench, 'repo', 'init', repository)
    await daemon.api.call('addDisk', {}, { name: DISK, image, format: 'raw' })
    const said = JSON.parse(varve(bench, '--json', 'backup', DISK, '--repo', repository)) as {
      details: { backup: string }
    }
    return new Stage(bench, daemon, repository, said.details.backup)
  }

  async toImage(format: 'raw' | 'qcow2'): Promise<Measurement> {
    const target = path.join(this.#bench.folder, `restored.${format}`)
    const began = performance.now()
    varve(this.#bench, 'restore', this.#backup, '--repo', this.#repository, '--to', target, '-f', format)
    const value = this.#rate(began)
    fs.rmSync(target)
    return { value }
  }

  /** The same bytes by restic, out of a repository of its own. */
  restic(image: string): Contender {
    const repository = path.join(this.#bench.folder, 'restic-repository')
    const password = path.join(this.#bench.folder, 'restic-password')
    fs.writeFileSync(password, 'benchmark')
    const at = ['--repo', repository, '--password-file', password, '--no-cache']
    check(RESTIC, ...at, 'init')
    check(RESTIC, ...at, 'backup', image)
    return {
      program: RESTIC,
      measure: async () => {
        const target = path.join(this.#bench.folder, 'restic-restored')
        const began = performance.now()
        check(RESTIC, ...at, 'restore', 'latest', '--target', target)
        const value = this.#rate(began)
        fs.rmSync(target, { recursive: true })
        return { value }
      },
    }
  }

  async live(load: Load | undefined): Promise<Measurement> {
    const name = `live${++this.#count}`
    const image = path.join(this.#bench.folder, `${name}.qcow2`)
    const began = performance.now()
    const line = ['restore', this.#backup, '--repo', this.#repository, '--live', name, '--to', image, '--no-wait']
    const { uri, job } = JSON.parse(varve(this.#bench, '--json', ...line)) as { uri: string; job: { id: string } }
    await this.#readFirst(uri)
    this.firstMs.push(performance.now() - began)
    const running = load === undefined ? undefined : await SteadyLoad.start(uri, load, this.#bench.folder)
    const ended = await this.#daemon.api.follow(job.id, () => undefined)
    const value = this.#rate(began)
    await running?.stop()
    if (ended.error !== undefined) throw new Error(ended.error.message)
    await this.#daemon.api.call('removeDisk', { disk: name }, {})
    fs.rmSync(image)
    return { value }
  }

  /** In the middle of the disk, where the copy is last. */
  async #readFirst(uri: string): Promise<void> {
    const client = await connectNbd(uri)
    await client.read(Math.floor(client.size / 8192) * 4096, 4096, Buffer.alloc(4096), 0)
    await client.close()
  }

  #rate(began: number): number {
    return (this.#bench.imageMiB * 1000) / (performance.now() - began)
  }
}

function varve(bench: Bench, ...args: string[]): string {
  const [node = '', program = ''] = VARVE_PROGRAM
  return check(node, program, '--home', path.join(bench.folder, 'home'), ...args)
}

/** The first half random, the second real files one after the other, again and again if they are few. */
function makeMixedImage(file: string, sizeMiB: number): void {
  const fd = fs.openSync(file, 'w')
  const piece = Buffer.alloc(MIB)
  const half = Math.floor(sizeMiB / 2)
  for (let at = 0; at < half; at++) fs.writeSync(fd, randomFillSync(piece), 0, MIB, at * MIB)
  const end = sizeMiB * MIB
  for (let at = half * MIB; at < end; ) {
    for (const bytes of realFiles()) {
      if (at >= end) break
      fs.writeSync(fd, bytes, 0, Math.min(bytes.length, end - at), at)
      at += bytes.length
    }
  }
  fs.fsyncSync(fd)
  fs.closeSync(fd)
}

/** A folder at a time: whole trees take long to list. */
function* realFiles(): Generator<Buffer> {
  const folders = [...SOURCES]
  for (let folder = folders.shift(); folder !== undefined; folder = folders.shift()) {
    for (const entry of fs.readdirSync(folder, { withFileTypes: true })) {
      const full = path.join(folder, entry.name)
      if (entry.isDirectory()) folders.push(full)
      if (entry.isFile()) yield fs.readFileSync(full)
    }
  }
}
