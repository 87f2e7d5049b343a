// npm run bench: measures, keeps the figures in bench/results, and writes docs/benchmarks.md. A part that fails is said, and the
// others go on.
//
//   npm run bench                                    all, as published
//   npm run bench -- --quick                         a first impression, not kept
//   npm run bench -- --only cached --only network    some parts
//   npm run bench -- --only cached --row 'depth 1'   some of its rows, not kept
//   npm run bench -- --page                          the page anew, from what is on record
//   VARVE_BENCH_DIR=DIR     where the images go; /dev/shm unless given
//   VARVE_BENCH_DISK=DIR    where those go that are measured with the disk; the folder for temporary files unless given

import fs from 'node:fs'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { build } from '../tools/build.ts'
import { currentSetting, DISK_FOLDER, FOLDER, ROOT } from './machine.ts'
import { keep, writePage } from './page.ts'
import type { Bench, Part } from './part.ts'
import { CACHED, MEMORY } from './parts/cached.ts'
import { CHAIN_DEPTH } from './parts/chain-depth.ts'
import { CONVERT } from './parts/convert.ts'
import { EIGHT_DISKS } from './parts/eight-disks.ts'
import { GUEST_BESIDE_BACKUP } from './parts/guest-beside-backup.ts'
import { HUNDRED_DISKS } from './parts/hundred-disks.ts'
import { IN_PROCESS } from './parts/in-process.ts'
import { INCREMENTAL } from './parts/incremental.ts'
import { JOBS } from './parts/jobs.ts'
import { NETWORK } from './parts/network.ts'
import { REPOSITORY } from './parts/repository.ts'
import { RESTORE } from './parts/restore.ts'
import { SLOW_NEIGHBOUR } from './parts/slow-neighbour.ts'
import { TRACKING } from './parts/tracking.ts'
import { UNCACHED } from './parts/uncached.ts'
import { type Extent, findingsOf, type Results } from './results.ts'

const PARTS: readonly Part[] = [
  CACHED,
  MEMORY,
  UNCACHED,
  NETWORK,
  IN_PROCESS,
  CHAIN_DEPTH,
  EIGHT_DISKS,
  SLOW_NEIGHBOUR,
  HUNDRED_DISKS,
  CONVERT,
  JOBS,
  TRACKING,
  GUEST_BESIDE_BACKUP,
  INCREMENTAL,
  REPOSITORY,
  RESTORE,
]

const PUBLISHED: Extent = { rounds: 5, seconds: 1, imageMiB: 2048 }
const QUICK: Extent = { rounds: 1, seconds: 1, imageMiB: 256 }

const { values } = parseArgs({
  options: {
    quick: { type: 'boolean', default: false },
    only: { type: 'string', multiple: true },
    row: { type: 'string' },
    page: { type: 'boolean', default: false },
  },
})

async function measurePart(part: Part): Promise<Results> {
  const setting = currentSetting()
  const extent = values.quick ? QUICK : { ...PUBLISHED, ...part.extent }
  const versions: Record<string, string> = {}
  const folder = fs.mkdtempSync(path.join(FOLDER, 'varve-bench-'))
  const diskFolder = fs.mkdtempSync(path.join(DISK_FOLDER, 'varve-bench-'))
  const bench: Bench = {
    ...extent,
    folder,
    diskFolder,
    wants: (row) => values.row === undefined || row.includes(values.row),
    has: (program, version) => {
      if (version === undefined) console.error(`  ${program} is not installed: left out`)
      else versions[program] = version
      return version !== undefined
    },
  }
  try {
    const rows = await part.measure(bench)
    return { ...setting, part: part.name, extent, versions, rows }
  } finally {
    fs.rmSync(folder, { recursive: true, force: true })
    fs.rmSync(diskFolder, { recursive: true, force: true })
  }
}

function checkNames(names: readonly string[]): void {
  const unknown = names.filter((name) => !PARTS.some((part) => part.name === name))
  if (unknown.length > 0)
    throw new Error(`no such part: ${unknown.join(', ')}. There are ${PARTS.map(({ name }) => name).join(', ')}`)
}

async function runParts(): Promise<void> {
  const complaint = await build(ROOT, path.join(ROOT, 'dist'))
  if (complaint !== undefined) throw new Error(complaint)
  for (const part of PARTS) {
    if (values.only !== undefined && !values.only.includes(part.name)) continue
    const began = performance.now()
    console.error(`${part.name}: ${part.title}`)
    try {
      const results = await measurePart(part)
      for (const row of results.rows)
        for (const { ask, found, isMet } of findingsOf(row))
          console.log(
            `${row.table}, ${row.name}: ${found.toFixed(2)} ${isMet ? 'meets' : 'MISSES'} ${JSON.stringify(ask)}`,
          )
      if (!values.quick && values.row === undefined && results.rows.length > 0) keep(results)
    } catch (error) {
      process.exitCode = 1
      console.error(`${part.name} failed: ${error instanceof Error ? error.stack : String(error)}`)
    }
    console.error(`  ${((performance.now() - began) / 1000).toFixed(0)} s`)
  }
}

checkNames(values.only ?? [])
if (!values.page) await runParts()
if (!values.quick && values.row === undefined) writePage(PARTS)
