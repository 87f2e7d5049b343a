// The middle of a long chain is deleted under load, layer by layer, until two are left; then all data is compared and QEMU checks the
// images. Prints how fast random reads are at the start and on the way, with the load at rest.
//
//   node test/e2e/run-chain.ts --layers 64 --size 1024 --folder DIR     MiB of the disk, and where it lies

import { execFile } from 'node:child_process'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { parseArgs, promisify } from 'node:util'
import { ShrinkingChain } from './shrinking-chain.ts'

/** Reads are measured at so many lengths of the chain, each so often, in seconds. */
const LOOKS = 8
const ROUNDS = 3
const SECONDS = 2
/** Two measurements of the same differ by so much. */
const NOISE = 0.1

const { values } = parseArgs({
  options: {
    layers: { type: 'string', default: '64' },
    size: { type: 'string', default: '1024' },
    folder: { type: 'string', default: os.tmpdir() },
    seed: { type: 'string', default: '1' },
  },
})

const run = promisify(execFile)

/** The median of random reads a second. */
async function readsOf(uri: string): Promise<number> {
  const args = `--name=reads --ioengine=nbd --rw=randread --bs=4k --iodepth=8 --time_based --runtime=${SECONDS} --norandommap --output-format=json`
  const rounds: number[] = []
  for (let round = 0; round < ROUNDS; round++) {
    const { stdout } = await run('fio', [...args.split(' '), `--uri=${uri}`], { maxBuffer: 1 << 24 })
    const { jobs } = JSON.parse(stdout.slice(stdout.indexOf('{'))) as { jobs: { read: { iops: number } }[] }
    rounds.push(jobs[0]?.read.iops ?? 0)
  }
  return rounds.toSorted((a, b) => a - b)[Math.floor(ROUNDS / 2)] ?? 0
}

const folder = fs.mkdtempSync(path.join(values.folder, 'varve-chain-'))
let isGood = true
try {
  const layers = Number(values.layers)
  const chain = await ShrinkingChain.start({ folder, sizeMiB: Number(values.size), layers, seed: Number(values.seed) })
  try {
    const first = await chain.atRest(() => readsOf(chain.uri))
    console.log(`${layers} layers: ${first.toFixed(0)} reads a second`)
    const every = Math.max(1, Math.floor((layers - 2) / LOOKS))
    const directions = new Map<string, number>()
    for (let left = layers - 1; left >= 2; left--) {
      const direction = await chain.deleteMiddle()
      directions.set(direction, (directions.get(direction) ?? 0) + 1)
      if ((left - 2) % every !== 0) continue
      const reads = await chain.atRest(async () => {
        await chain.check()
        return readsOf(chain.uri)
      })
      const ratio = reads / first
      if (ratio < 1 - NOISE) isGood = false
      console.log(`${left} layers: ${reads.toFixed(0)} reads a second, ${ratio.toFixed(2)} of the start; data equal`)
    }
    await chain.finish()
    const merged = [...directions].map(([direction, count]) => `${count} ${direction}`).join(', ')
    console.log(`two layers left (merged ${merged}); data equal, qemu-img check clean`)
  } finally {
    await chain.end()
  }
} finally {
  fs.rmSync(folder, { recursive: true, force: true })
}
console.log(isGood ? 'all as it must be' : 'reads became slower')
process.exitCode = isGood ? 0 : 1
