// What a guest notices of the jobs on its disk: the 99th percentile of its requests without and with each, in turns, and how long each
// drain held it. A slow target (5 MB a second) must not be felt, and neither much a fast one.
//
//   node bench/guest-beside-jobs.ts [--rounds 5] [--seconds 4] [--mib 1024] [--only slow|fast|drains]
//
// The guest reads and writes 4 KiB at random, at a pace well below what the disk can. Where the images are is VARVE_BENCH_DISK; the
// figures of a run are in docs/internals/jobs.md.

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { type Daemon, startDaemon } from './daemon.ts'
import { type Load, measureAll } from './fio.ts'
import { makeImage, settle } from './images.ts'
import { DISK_FOLDER } from './machine.ts'
import { median } from './results.ts'
import { makeSlowExport, makeSlowFolder, whyNoSlowTarget } from './slow-target.ts'

const { values } = parseArgs({
  options: {
    rounds: { type: 'string', default: '5' },
    seconds: { type: 'string', default: '4' },
    mib: { type: 'string', default: '1024' },
    only: { type: 'string', default: '' },
  },
})
const ROUNDS = Number(values.rounds)
const SECONDS = Number(values.seconds)
const SIZE_MIB = Number(values.mib)

const LOADS: readonly Load[] = [
  { name: 'read', rw: 'randread', block: '4k', depth: 4, limit: 1000 },
  { name: 'write', rw: 'randwrite', block: '4k', depth: 4, limit: 1000 },
]

/** What a job is begun with; undefined where this machine cannot have it. */
interface Case {
  readonly name: string
  /** Begins the job; it must run for as long as is measured. Returns its id. */
  readonly begin: () => Promise<string>
  /** What is left of it, after it was cancelled. */
  readonly tidy?: () => void
}

const folder = fs.mkdtempSync(path.join(DISK_FOLDER, 'varve-beside-'))
const undo: (() => unknown)[] = [() => fs.rmSync(folder, { recursive: true, force: true })]
try {
  const daemon = await startDaemon(folder)
  undo.push(() => daemon.stop())
  const image = path.join(folder, 'vm1.raw')
  makeImage(image, 'raw', SIZE_MIB)
  settle(image, true)
  const { uri } = await daemon.api.call('addDisk', {}, { name: 'vm1', image, format: 'raw' })
  if (uri === undefined) throw new Error('the disk is not served')
  // As a disk that was backed up before: its log knows which regions the guest writes, and keeps their records.
  await daemon.api.call('editBitmaps', { disk: 'vm1' }, { edits: [{ edit: 'add', name: 'changes' }] })
  console.log(`${os.availableParallelism()} cores, ${SIZE_MIB} MiB raw; p99 in ms, medians of ${ROUNDS} rounds`)
  console.log(`${'job'.padEnd(36)} request    without      with     ratio`)
  for (const one of await casesOf(daemon)) for (const load of LOADS) await compare(daemon, uri, one, load)
  if (['', 'drains'].includes(values.only)) await drains(daemon, uri)
} finally {
  for (const step of undo.toReversed()) await step()
}

async function casesOf({ api }: Daemon): Promise<Case[]> {
  const background = { mode: 'background' } as const
  const place = path.join(folder, 'copy.raw')
  const removeCopy = (): void => fs.rmSync(place, { force: true })
  const fast = path.join(folder, 'repository')
  await initRepository(fast)
  const backup = (repository: string) => async (): Promise<string> =>
    (await api.call('backup', {}, { disks: ['vm1'], repository, full: true })).id
  const mirror = (body: { target: string; format?: 'raw'; existing?: boolean }) => async (): Promise<string> =>
    (await api.call('mirror', { disk: 'vm1' }, { ...body, ...background })).id
  if (values.only === 'drains') return []
  const cases: Case[] = [
    { name: 'mirror to a fast file', begin: mirror({ target: place, format: 'raw' }), tidy: removeCopy },
    { name: 'backup to a fast folder', begin: backup(fast) },
  ]
  if (values.only === 'fast') return cases
  if (values.only === 'slow') cases.length = 0
  const obstacle = whyNoSlowTarget()
  if (obstacle !== undefined) {
    console.error(`slow targets are left out: ${obstacle}`)
    return cases
  }
  const slowExport = await makeSlowExport(folder, SIZE_MIB)
  undo.push(() => slowExport.remove())
  const slowFolder = await makeSlowFolder(folder, 2 * SIZE_MIB)
  undo.push(() => slowFolder.remove())
  const slow = path.join(slowFolder.place, 'repository')
  await initRepository(slow)
  cases.unshift(
    { name: 'mirror to an export at 5 MB/s', begin: mirror({ target: slowExport.place }) },
    { name: 'backup to a folder at 5 MB/s', begin: backup(slow) },
  )
  return cases
}

async function initRepository(place: string): Promise<void> {
  const { initRepositoryAt } = await import('../src/shard/repositories.ts')
  await (await initRepositoryAt(place)).close()
}

async function compare({ api }: Daemon, uri: string, { name, begin, tidy }: Case, load: Load): Promise<void> {
  const measure = async (): Promise<number> => ((await measureAll([uri], load, SECONDS))[0]?.p99Us ?? 0) / 1000
  const [without, beside]: [number[], number[]] = [[], []]
  for (let round = 0; round < ROUNDS; round++) {
    without.push(await measure())
    const id = await begin()
    // It is under way, and its moment or scan is over.
    await until(async () => (await api.call('showJob', { job: id }, {})).done > 0)
    beside.push(await measure())
    const { endedMs, guest } = await api.call('showJob', { job: id }, {})
    if (endedMs !== undefined)
      console.error(`  ${name} ended while it was measured: take more --mib or fewer --seconds`)
    else await api.call('sayToJob', { job: id, verb: 'cancel' }, {})
    if (guest !== undefined) console.error(`  ${name}: ${JSON.stringify(guest)}`)
    await until(async () => (await api.call('showJob', { job: id }, {})).endedMs !== undefined)
    tidy?.()
  }
  const [a, b] = [median(without), median(beside)]
  console.log(`${name.padEnd(36)} ${load.name.padEnd(8)} ${figure(a)} ${figure(b)} ${figure(b / a)}`)
}

/** How long snapshots, the moments of backups and the pivots of a commit and a mirror hold a guest that writes. */
async function drains({ api }: Daemon, uri: string): Promise<void> {
  const held = async (work: () => Promise<unknown>): Promise<number> => {
    const before = await api.call('showDisk', { disk: 'vm1' }, {})
    await work()
    const after = await api.call('showDisk', { disk: 'vm1' }, {})
    // The longest of the drains that it made is the last but for a mirror, whose changes of mode drain too.
    return after.pauses === undefined || after.pauses.count === before.pauses?.count ? 0 : after.pauses.lastMs
  }
  const ended = (id: string): Promise<void> =>
    until(async () => {
      const { endedMs, error } = await api.call('showJob', { job: id }, {})
      if (error !== undefined) throw new Error(error.message)
      return endedMs !== undefined
    })
  let number = 0
  const repository = path.join(folder, 'repository')
  const works: Record<string, () => Promise<number>> = {
    snapshot: () => held(() => api.call('createSnapshot', { disk: 'vm1' }, { name: `s${number++}` })),
    moment: async () => {
      let id = ''
      const ms = await held(async () => {
        id = (await api.call('backup', {}, { disks: ['vm1'], repository, full: false })).id
      })
      await ended(id)
      return ms
    },
    'pivot of a commit': async () => {
      await api.call('createSnapshot', { disk: 'vm1' }, { name: `s${number++}` })
      const { id } = await api.call('commit', { disk: 'vm1' }, {})
      return held(() => ended(id))
    },
    'pivot of a mirror': async () => {
      const target = path.join(folder, `place${number++}.raw`)
      const { id } = await api.call('mirror', { disk: 'vm1' }, { target, format: 'raw', finish: 'pivot' })
      return held(() => ended(id))
    },
  }
  console.log('\ndrain                   held, ms: median   longest    the storage’s own sync: median   longest')
  for (const [name, work] of Object.entries(works)) {
    const [ms, syncs]: [number[], number[]] = [[], []]
    const load = measureAll([uri], LOADS[1] as Load, ROUNDS * 8)
    for (let round = 0; round < ROUNDS; round++) {
      syncs.push(syncOnce())
      ms.push(await work())
    }
    await load
    const [most, mostOfSync] = [Math.max(...ms), Math.max(...syncs)]
    console.log(
      `${name.padEnd(24)} ${figure(median(ms))} ${figure(most)} ${figure(median(syncs))} ${figure(mostOfSync)}`,
    )
  }
}

/** What a sync of 4 KiB takes here now. */
function syncOnce(): number {
  const file = path.join(folder, 'sync')
  const began = performance.now()
  const fd = fs.openSync(file, 'w')
  fs.writeSync(fd, Buffer.alloc(4096, 1))
  fs.fsyncSync(fd)
  fs.closeSync(fd)
  return performance.now() - began
}

async function until(test: () => Promise<boolean>): Promise<void> {
  while (!(await test())) await new Promise((resolve) => setTimeout(resolve, 20))
}

function figure(value: number): string {
  return value.toFixed(2).padStart(9)
}
