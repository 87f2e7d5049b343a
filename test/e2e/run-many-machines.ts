// One hundred machines in one daemon, each under a light verifying load, backed up in full and then by what changed, by one command each:
// prints the host's curve of scratch, its peak beside those of the machines, memory, and what the loads feel (many-machines.ts).
//
//   node test/e2e/run-many-machines.ts [--machines 100] [--size 256] [--fill 64] [--rate 5] [--bandwidth MIB] [--alone SECONDS] [--folder DIR]
//
// Sizes in MiB; the bandwidth of the host, in MiB a second, is without a limit unless given.

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { formatSize } from '../../src/base/size.ts'
import { ManyMachines, type Round } from './many-machines.ts'

const MEMORY_MAX = 1024 ** 3
const P99_RATIO_MAX = 1.5
/** Columns and rows of the curve. */
const WIDTH = 100
const HEIGHT = 8

const { values } = parseArgs({
  options: {
    machines: { type: 'string', default: '100' },
    size: { type: 'string', default: '256' },
    fill: { type: 'string', default: '64' },
    rate: { type: 'string', default: '5' },
    bandwidth: { type: 'string' },
    alone: { type: 'string', default: '20' },
    folder: { type: 'string', default: os.tmpdir() },
    seed: { type: 'string', default: '1' },
  },
})

/** The highest of each column's samples. */
function draw(curve: readonly number[]): string {
  const columns = Array.from(
    { length: Math.min(WIDTH, curve.length) },
    (_, column, all = Math.min(WIDTH, curve.length)) =>
      Math.max(
        ...curve.slice(Math.floor((column * curve.length) / all), Math.ceil(((column + 1) * curve.length) / all)),
      ),
  )
  const top = Math.max(...columns, 1)
  const rows = Array.from({ length: HEIGHT }, (_, row) =>
    columns.map((value) => (value > (top * (HEIGHT - 1 - row)) / HEIGHT ? '#' : ' ')).join(''),
  )
  return rows.map((row, index) => `    ${(index === 0 ? formatSize(top) : '').padStart(10)} |${row}`).join('\n')
}

function tellMemory(title: string): void {
  const { now, peak } = machines.memory
  console.log(`the daemon's memory ${title}: ${formatSize(now)}, ${formatSize(peak)} at most`)
}

function tell(title: string, round: Round, alone: number): boolean {
  const { seconds, curve, hostPeak, largestPeak, sumOfPeaks, sumSaved, atOnce, readBytes, p99 } = round
  const ratio = p99 / alone
  console.log(`${title}: ${round.jobs.length} machines in ${seconds.toFixed(1)} s, ${formatSize(readBytes)} read`)
  console.log(draw(curve))
  console.log(`    host's peak of scratch ${formatSize(hostPeak)}; the largest machine's ${formatSize(largestPeak)}`)
  console.log(`    all machines' peaks together ${formatSize(sumOfPeaks)}, saved in all ${formatSize(sumSaved)}`)
  console.log(`    machines with scratch at a time: ${atOnce}; every backup is its disk at one moment`)
  console.log(`    loads: p99 ${p99.toFixed(2)} ms, ${ratio.toFixed(2)} of that alone`)
  tellMemory(`after the ${title}`)
  return atOnce <= 1 && ratio <= P99_RATIO_MAX
}

const folder = fs.mkdtempSync(path.join(values.folder, 'varve-machines-'))
const machines = new ManyMachines({
  folder,
  machines: Number(values.machines),
  sizeMiB: Number(values.size),
  fillMiB: Number(values.fill),
  perSecond: Number(values.rate),
  ...(values.bandwidth === undefined ? {} : { bandwidth: Number(values.bandwidth) * 1024 ** 2 }),
  seed: Number(values.seed),
})
let isGood = true
try {
  await machines.start()
  const alone = await machines.alone(Number(values.alone))
  const again = await machines.alone(Number(values.alone))
  console.log(`loads alone: p99 ${alone.toFixed(2)} ms; again ${again.toFixed(2)} ms`)
  tellMemory('before')
  const full = await machines.backUp('full')
  isGood = tell('full', full, alone) && isGood
  const second = await machines.backUp('incremental')
  isGood = tell('incremental', second, alone) && isGood
  if (second.hostPeak > Math.max(full.largestPeak, second.largestPeak)) isGood = false
  if (machines.memory.peak > MEMORY_MAX) isGood = false
  console.log(isGood ? 'all as it must be' : 'NOT as it must be')
} finally {
  await machines.end()
  fs.rmSync(folder, { recursive: true, force: true })
}
process.exitCode = isGood ? 0 : 1
