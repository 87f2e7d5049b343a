// Part "convert": `varve image convert` beside `qemu-img convert`, from the start of each process to its end. Every target is
// compared with its source once, outside of what is measured.

import { spawnSync } from 'node:child_process'
import { randomFillSync } from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { Random } from '../../src/base/random.ts'
import { check, MIB, ROOT, versionOf } from '../machine.ts'
import { type Bench, type Contender, type Part, takeTurns } from '../part.ts'
import { AGAIN, type Row } from '../results.ts'
import { VARVE, VARVE_PROGRAM } from '../servers.ts'
import { settle } from '../images.ts'

const KIB = 1024
const QEMU_IMG = 'qemu-img'
const VARVE_IMAGE = 'varve image'

interface Workload {
  readonly name: string
  readonly source: 'raw' | 'qcow2'
  readonly target: 'raw' | 'qcow2'
  readonly options: readonly string[]
  /** Compression takes long, and its times differ little; the others are short, and find memory that the host has to provide, or not. */
  readonly rounds: number
}

const WORKLOADS: readonly Workload[] = [
  { name: 'raw to qcow2', source: 'raw', target: 'qcow2', options: [], rounds: 7 },
  { name: 'qcow2 to raw', source: 'qcow2', target: 'raw', options: [], rounds: 7 },
  {
    name: 'raw to qcow2, -c, zstd',
    source: 'raw',
    target: 'qcow2',
    options: ['-c', '-o', 'compression_type=zstd'],
    rounds: 3,
  },
]

const PROGRAMS: readonly (readonly [string, readonly string[]])[] = [
  [VARVE_IMAGE, [...VARVE_PROGRAM, 'image', 'convert']],
  [QEMU_IMG, ['qemu-img', 'convert']],
  [`${QEMU_IMG}${AGAIN}`, ['qemu-img', 'convert']],
]

export const CONVERT: Part = {
  name: 'convert',
  title: 'Conversions side by side',
  extent: { imageMiB: 4096 },
  about: ({
    extent,
  }) => `A raw disk of ${extent.imageMiB} MiB, half of it data, half of that random and half text, in runs of 64 KiB to 8 MiB between
holes. \`varve image convert\` and \`qemu-img convert\` with the same options and their defaults, from the start of the
process to its end, all files in memory. Seven rounds, three where they compress.`,
  async measure(bench) {
    if (!bench.has(QEMU_IMG, versionOf(QEMU_IMG)) || !bench.has(VARVE_IMAGE, VARVE.version())) return []
    const workloads = WORKLOADS.filter(({ name }) => bench.wants(name))
    if (workloads.length === 0) return []
    const raw = path.join(bench.folder, 'source.raw')
    makeSource(raw, bench.imageMiB * MIB)
    check('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', raw, path.join(bench.folder, 'source.qcow2'))
    const rows: Row[] = []
    for (const workload of workloads) rows.push(await measureWorkload(bench, workload))
    return rows
  },
}

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

/** Writes the source: runs of holes, random data and text, half of it data. */
function makeSource(file: string, size: number): void {
  const random = new Random(7)
  const text = makeText(random)
  const noise = Buffer.alloc(8 * MIB)
  const fd = fs.openSync(file, 'w')
  fs.ftruncateSync(fd, size)
  for (let at = 0, run = 0; at < size; run++) {
    const length = Math.min(size - at, 64 * KIB * random.between(1, 128))
    if (run % 2 === 1) {
      const from = run % 4 === 1 ? randomFillSync(noise) : text
      fs.writeSync(fd, from, random.below(from.length - length + 1), length, at)
    }
    at += length
  }
  fs.closeSync(fd)
}

/**
 * Seconds of rest before a process starts. The host of a virtual machine takes back memory that was freed, such as that of the last target:
 * whoever starts sooner would find more of it still there.
 */
const REST = 3

/** Converts once; seconds. */
function convert(command: readonly string[], workload: Workload, source: string, target: string): number {
  fs.rmSync(target, { force: true })
  spawnSync('sleep', [String(REST)])
  const [program = '', ...args] = command
  const formats = ['-f', workload.source, '-O', workload.target]
  const started = performance.now()
  const result = spawnSync(program, [...args, ...formats, ...workload.options, source, target], { encoding: 'utf8' })
  const seconds = (performance.now() - started) / 1000
  if (result.status !== 0) throw new Error(`${command.join(' ')}: ${result.stderr || result.error?.message}`)
  return seconds
}

async function measureWorkload(bench: Bench, workload: Workload): Promise<Row> {
  const source = path.join(bench.folder, `source.${workload.source}`)
  const target = path.join(bench.folder, `target.${workload.target}`)
  settle(source, false)
  const contenders: Contender[] = []
  for (const [program, command] of PROGRAMS) {
    // Once before it counts: to compare, and to find memory that the system has not used yet.
    convert(command, workload, source, target)
    check('qemu-img', 'compare', '-f', workload.source, '-F', workload.target, source, target)
    if (workload.target === 'qcow2') check('qemu-img', 'check', target)
    contenders.push({ program, measure: async () => ({ value: convert(command, workload, source, target) }) })
  }
  const figures = await takeTurns(contenders, bench.rounds === 1 ? 1 : workload.rounds, workload.name)
  fs.rmSync(target)
  const asks = [{ of: QEMU_IMG, atMost: 1 }]
  return { table: 'conversion', name: workload.name, unit: 's', subject: VARVE_IMAGE, figures, asks }
}
