// Part "guest-beside-backup": what a guest that writes at random as fast as it can keeps while its disk is backed up: in full, by what
// changed, and for a reader that is slow or stands still, until its copy space is used up and after.

import fs from 'node:fs'
import path from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { changeSome } from '../backups.ts'
import { RANDOM_WRITE, type Served as Counts } from '../fio.ts'
import { makeImage, settle } from '../images.ts'
import { type Rival, type Served, STORAGE_DAEMON_BACKUPS, VARVE_BACKUPS } from '../live-backups.ts'
import { MIB } from '../machine.ts'
import { type Bench, type Contender, type Measurement, type Part, takeTurns } from '../part.ts'
import type { Ask, Row } from '../results.ts'
import { SteadyLoad } from '../steady-load.ts'

const SUBJECT = VARVE_BACKUPS.program
const NOTHING = 'no backup'

/** How long the guest is measured without a backup, before and after. */
const ALONE_MS = 4000
/** Of the row that shows the noise. */
const NOTHING_MS = 10_000
/** What a backup that ended has still to tidy up. */
const AFTER_MS = 1000
/** Of all granules, one in so many is in the incremental. */
const ONE_IN = 100

const READER_SCRATCH = 512 * MIB

/** What is measured: parts of what the guest does alone. */
interface Kept {
  /** Beside the backup, and after it broke. */
  readonly beside: number
  readonly after: number
  readonly p99: number
}

interface Case {
  readonly name: string
  readonly speed: number
  readonly kind: 'full' | 'incremental' | 'reader'
  readonly atLeast: number
  /** Times the 99th percentile without, at most. */
  readonly p99?: number
  /** After the backup broke. */
  readonly afterAtLeast?: number
}

const CASES: readonly Case[] = [
  { name: 'full, 100 MB/s', kind: 'full', speed: 100e6, atLeast: 0.85, p99: 2 },
  { name: 'incremental of 1 %, 4 MB/s', kind: 'incremental', speed: 4e6, atLeast: 0.95 },
  { name: 'reader at 1 MB/s', kind: 'reader', speed: 1e6, atLeast: 0.85, afterAtLeast: 0.97 },
  { name: 'reader that stands still', kind: 'reader', speed: 0, atLeast: 0.85, afterAtLeast: 0.97 },
]

export const GUEST_BESIDE_BACKUP: Part = {
  name: 'guest-beside-backup',
  title: 'A guest beside its backup',
  extent: { rounds: 3 },
  about: ({
    extent,
  }) => `A raw disk of ${extent.imageMiB} MiB of random data in memory, on which fio does ${RANDOM_WRITE.name}, as fast as it is served: what it
keeps from the moment of a backup to its end, as parts of what it is served before and after, and how much longer its 99th percentile is. The targets are in
memory too, a repository with Varve and a qcow2 image with QEMU; old data that Varve has no memory for goes to a disk. A reader of an exported moment
has ${READER_SCRATCH / MIB} MiB of copy space, which breaks the backup when it is used up.`,
  async measure(bench) {
    const rivals = [VARVE_BACKUPS, STORAGE_DAEMON_BACKUPS].filter(({ program, version }) =>
      bench.has(program, version()),
    )
    const image = path.join(bench.folder, 'written.raw')
    makeImage(image, 'raw', bench.imageMiB)
    const rows: Row[] = []
    for (const one of CASES) {
      if (bench.wants(one.name)) rows.push(...(await measureCase(bench, image, rivals, one)))
    }
    return rows
  },
}

async function measureCase(bench: Bench, image: string, rivals: readonly Rival[], one: Case): Promise<Row[]> {
  const able = rivals.filter(({ program }) => one.kind !== 'reader' || program === SUBJECT)
  const found = new Map<string, Kept[]>()
  const contender = (rival: Rival, program: string, isNothing: boolean): Contender => ({
    program,
    measure: async (): Promise<Measurement> => {
      const kept = await measureOnce(bench, image, rival, isNothing ? undefined : one)
      found.set(program, [...(found.get(program) ?? []), kept])
      return { value: kept.beside }
    },
  })
  const contenders = able.map((rival) => contender(rival, rival.program, false))
  await takeTurns([...contenders, contender(VARVE_BACKUPS, NOTHING, true)], bench.rounds, one.name)
  const row = (table: string, name: string, value: (kept: Kept) => number, asks: readonly Ask[]): Row => ({
    table,
    name,
    unit: 'of without',
    subject: SUBJECT,
    figures: [...found].map(([program, all]) => ({ program, rounds: all.map(value) })),
    asks,
  })
  const { name, atLeast, p99, afterAtLeast } = one
  const rows = [row('guest’s writes beside', name, ({ beside }) => beside, [{ atLeast }])]
  rows.push(row('99th percentile beside', name, (kept) => kept.p99, p99 === undefined ? [] : [{ atMost: p99 }]))
  if (afterAtLeast !== undefined)
    rows.push(row('guest’s writes after it broke', name, ({ after }) => after, [{ atLeast: afterAtLeast }]))
  return rows
}

/** In a folder of its own, on the image as the last one has left it. */
async function measureOnce(bench: Bench, image: string, rival: Rival, one: Case | undefined): Promise<Kept> {
  settle(image, true)
  const folder = fs.mkdtempSync(path.join(bench.folder, 'run-'))
  const homes = fs.mkdtempSync(path.join(bench.diskFolder, 'run-'))
  // What the daemon keeps beside its disks is on a disk.
  fs.symlinkSync(homes, path.join(folder, 'home'))
  try {
    const scratch = one?.kind === 'reader' ? { scratchBytes: READER_SCRATCH } : {}
    const served = await rival.serve({ folder, image, ...scratch })
    try {
      if (one?.kind === 'incremental') {
        await (await served.backUp(true, 0)).ended
        await changeSome(served.uri, Date.now(), ONE_IN)
      }
      return await (one?.kind === 'incremental' ? momentFirst : loadFirst)(served, folder, one)
    } finally {
      await served.stop()
    }
  } finally {
    fs.rmSync(folder, { recursive: true })
    fs.rmSync(homes, { recursive: true })
  }
}

async function loadFirst(served: Served, folder: string, one: Case | undefined): Promise<Kept> {
  const load = await SteadyLoad.start(served.uri, RANDOM_WRITE, folder)
  await sleep(ALONE_MS)
  const fromMs = Date.now()
  await besides(served, one)
  return kept(load, fromMs, true)
}

/** What changed is to be what was changed, not what the load has written. */
async function momentFirst(served: Served, folder: string, one: Case | undefined): Promise<Kept> {
  const working = besides(served, one)
  const load = await SteadyLoad.start(served.uri, RANDOM_WRITE, folder)
  const fromMs = Date.now()
  await working
  return kept(load, fromMs, false)
}

async function besides(served: Served, one: Case | undefined): Promise<void> {
  if (one === undefined) await sleep(NOTHING_MS)
  else if (one.kind === 'reader') await (await served.export?.(one.speed))?.ended
  else await (await served.backUp(one.kind === 'full', one.speed)).ended
}

/** The backup has just ended. */
async function kept(load: SteadyLoad, fromMs: number, wasAlone: boolean): Promise<Kept> {
  const toMs = Date.now()
  await sleep(AFTER_MS + ALONE_MS)
  const served = await load.stop()
  const before = served(fromMs - ALONE_MS, fromMs)
  const beside = served(fromMs, toMs)
  const after = served(toMs + AFTER_MS, toMs + AFTER_MS + ALONE_MS)
  const alone: Counts = wasAlone
    ? { iops: (before.iops + after.iops) / 2, p99Us: (before.p99Us + after.p99Us) / 2 }
    : after
  console.error(
    `    ${((toMs - fromMs) / 1000).toFixed(1)} s; a second, p99 µs: before ${say(before)}, beside ${say(beside)}, after ${say(after)}`,
  )
  const base = wasAlone ? before.iops : after.iops
  return { beside: beside.iops / alone.iops, after: after.iops / base, p99: beside.p99Us / alone.p99Us }
}

function say({ iops, p99Us }: Counts): string {
  return `${Math.round(iops)}, ${Math.round(p99Us)}`
}
