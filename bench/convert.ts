// `varve image convert` beside `qemu-img convert`: the same source and options, from the start of each process to its end. The
// programs take turns within each round; the reference runs twice per round to show the noise. Every target is compared with
// its source once, outside of what is measured.
//
//   node bench/convert.ts              the figures that are published
//   node bench/convert.ts --quick      a first impression, not published
//   node bench/convert.ts --only zstd  some of it, not published
//   VARVE_BENCH_DIR=DIR                where the images go; /dev/shm unless given

import { spawnSync } from 'node:child_process'
import { randomFillSync } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { Random } from '../src/base/random.ts'
import { build } from '../tools/build.ts'
import {
  type ConvertResults,
  type ConvertRow,
  convertNoise,
  REFERENCE,
  REFERENCE_AGAIN,
  speedOf,
} from './convert-report.ts'
import { check, currentSetting, FOLDER, median, MIB, residentShare, ROOT } from './machine.ts'
import { publish } from './page.ts'

const KIB = 1024
const { values } = parseArgs({ options: { quick: { type: 'boolean' }, only: { type: 'string' } } })
const settings = values.quick === true ? { imageMiB: 512, rounds: 3 } : { imageMiB: 4096, rounds: 5 }

interface Workload {
  readonly name: string
  readonly source: 'raw' | 'qcow2'
  readonly target: 'raw' | 'qcow2'
  readonly options: readonly string[]
}

const WORKLOADS: readonly Workload[] = [
  { name: 'raw to qcow2', source: 'raw', target: 'qcow2', options: [] },
  { name: 'qcow2 to raw', source: 'qcow2', target: 'raw', options: [] },
  { name: 'raw to qcow2, -c, zstd', source: 'raw', target: 'qcow2', options: ['-c', '-o', 'compression_type=zstd'] },
  { name: 'raw to qcow2, -c, zlib', source: 'raw', target: 'qcow2', options: ['-c', '-o', 'compression_type=zlib'] },
]

/** As users have it: the built package. */
const VARVE = [process.execPath, path.join(ROOT, 'bin', 'varve.js'), 'image', 'convert']
const PROGRAMS: readonly (readonly [string, readonly string[]])[] = [
  ['varve', VARVE],
  [REFERENCE, ['qemu-img', 'convert']],
  [REFERENCE_AGAIN, ['qemu-img', 'convert']],
]

/** Words of real text, in any order: it compresses as prose does. */
function makeText(random: Random): Buffer {
  const files = ['README.md', 'ARCHITECTURE.md', 'CONTRIBUTING.md', 'LICENSE']
  const words = files.flatMap((file) => fs.readFileSync(path.join(ROOT, file), 'utf8').split(/\s+/))
  const text: string[] = []
  for (let length = 0; length < 16 * MIB; ) {
    const word = words[random.below(words.length)] as string
    text.push(word)
    length += word.length + 1
  }
  return Buffer.from(text.join(' '))
}

/** Writes the source: runs of holes, random data and text, half of it data. Returns the bytes of data. */
function makeSource(file: string): number {
  const random = new Random(7)
  const text = makeText(random)
  const noise = Buffer.alloc(8 * MIB)
  const size = settings.imageMiB * MIB
  const fd = fs.openSync(file, 'w')
  fs.ftruncateSync(fd, size)
  let data = 0
  for (let at = 0, run = 0; at < size; run++) {
    const length = Math.min(size - at, 64 * KIB * random.between(1, 128))
    if (run % 2 === 1) {
      const from = run % 4 === 1 ? randomFillSync(noise) : text
      fs.writeSync(fd, from, random.below(from.length - length + 1), length, at)
      data += length
    }
    at += length
  }
  fs.closeSync(fd)
  return data
}

/** Converts once; seconds. */
function convert(command: readonly string[], workload: Workload, source: string, target: string): number {
  fs.rmSync(target, { force: true })
  const [program = '', ...args] = command
  const formats = ['-f', workload.source, '-O', workload.target]
  const started = performance.now()
  const result = spawnSync(program, [...args, ...formats, ...workload.options, source, target], { encoding: 'utf8' })
  const seconds = (performance.now() - started) / 1000
  if (result.status !== 0) throw new Error(`${command.join(' ')}: ${result.stderr || result.error?.message}`)
  return seconds
}

function measure(workload: Workload, folder: string): ConvertRow[] {
  const source = path.join(folder, `source.${workload.source}`)
  const target = path.join(folder, `target.${workload.target}`)
  if (residentShare(source) < 0.999) throw new Error(`${source} does not stay in memory; free some`)
  const rows = PROGRAMS.map(([program]) => ({
    workload: workload.name,
    program,
    seconds: [] as number[],
    targetBytes: 0,
  }))
  // The first round is not counted: it finds memory that the system has not used yet.
  for (let round = -1; round < settings.rounds; round++) {
    for (const [index, [program, command]] of PROGRAMS.entries()) {
      const row = rows[index] as (typeof rows)[0]
      const seconds = convert(command, workload, source, target)
      if (round >= 0) row.seconds.push(seconds)
      else {
        check('qemu-img', 'compare', '-f', workload.source, '-F', workload.target, source, target)
        row.targetBytes = fs.statSync(target).blocks * 512
        if (program === 'varve' && workload.target === 'qcow2') check('qemu-img', 'check', target)
      }
    }
  }
  fs.rmSync(target)
  for (const { program, seconds } of rows)
    console.error(
      `${workload.name}, ${program}: ${median(seconds).toFixed(2)} s (${seconds.map((s) => s.toFixed(2)).join(' ')})`,
    )
  return rows
}

const complaint = build(ROOT, path.join(ROOT, 'dist'))
if (complaint !== undefined) throw new Error(complaint)
const setting = currentSetting()
const folder = fs.mkdtempSync(path.join(FOLDER, 'varve-bench-'))
const rows: ConvertRow[] = []
let dataMiB = 0
try {
  const raw = path.join(folder, 'source.raw')
  dataMiB = Math.round(makeSource(raw) / MIB)
  check('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw, path.join(folder, 'source.qcow2'))
  for (const workload of WORKLOADS)
    if (values.only === undefined || workload.name.includes(values.only)) rows.push(...measure(workload, folder))
} finally {
  fs.rmSync(folder, { recursive: true, force: true })
}
const versions = {
  varve: `Node ${process.version}`,
  'qemu-img': check('qemu-img', '--version').split('\n')[0] ?? '',
}
const results: ConvertResults = { ...setting, versions, settings, dataMiB, rows }
for (const { workload, program } of rows) {
  if (program !== REFERENCE) console.log(`${workload}: ${program} ${speedOf(results, workload, program)?.toFixed(2)}`)
}
if (values.quick !== true && values.only === undefined && !publish('convert', results, convertNoise(results)))
  process.exitCode = 1
