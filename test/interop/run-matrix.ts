// Tries every combination of the matrix, or those named, and prints a line for each: its number, options and seed, whether
// QEMU and Varve agreed, and how long it took. The last lines are the counts and the failures, whole.
//
//   node test/interop/run-matrix.ts                         all, with a new seed
//   node test/interop/run-matrix.ts --seed 7                all, each with the seed that 7 gives it
//   node test/interop/run-matrix.ts --match 'zstd|lazy'     those whose options match
//   node test/interop/run-matrix.ts --only 57 --seed 123    one, with exactly this seed; with --keep its files stay when it fails

import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { seedOfRun } from '../../src/base/random.ts'
import { missing } from '../support/peer.ts'
import { COMBINATIONS, describe, seedOf } from './matrix.ts'
import { tryCombination } from './trial/trial.ts'

const OPTIONS = {
  seed: { type: 'string' },
  only: { type: 'string', multiple: true },
  match: { type: 'string' },
  keep: { type: 'boolean' },
} as const

async function main(): Promise<void> {
  const { values } = parseArgs({ options: OPTIONS })
  const absent = missing('qemu-img', 'qemu-io')
  if (absent !== false) throw new Error(absent)
  const runSeed = values.seed === undefined ? seedOfRun() : Number(values.seed)
  const only = values.only?.map(Number)
  const wanted = new RegExp(values.match ?? '')
  const seedFor = only === undefined ? seedOf : (seed: number): number => seed
  process.stdout.write(`seed of the run: ${runSeed}\n`)
  let agreed = 0
  const failures: string[] = []
  const start = performance.now()
  for (const number of only ?? COMBINATIONS.keys()) {
    const combination = COMBINATIONS[number]
    if (combination === undefined) throw new Error(`the matrix has combinations 0 to ${COMBINATIONS.length - 1}`)
    if (!wanted.test(describe(combination))) continue
    const seed = seedFor(runSeed, number)
    const before = performance.now()
    const folder = fs.mkdtempSync(path.join(process.env['VARVE_TEST_DIR'] ?? os.tmpdir(), 'varve-matrix-'))
    let isAgreed = false
    try {
      await tryCombination(number, { seed, folder })
      isAgreed = true
      agreed++
    } catch (error) {
      failures.push(error instanceof Error ? error.message : String(error))
    }
    if (!isAgreed && values.keep === true) process.stdout.write(`kept: ${folder}\n`)
    else fs.rmSync(folder, { recursive: true })
    const columns = [String(number).padStart(4), describe(combination).padEnd(44), `seed ${seed}`.padEnd(15)]
    process.stdout.write(
      `${columns.join('  ')}  ${isAgreed ? 'agreed' : 'FAILED'}  ${(performance.now() - before).toFixed(0)} ms\n`,
    )
  }
  const seconds = ((performance.now() - start) / 1000).toFixed(0)
  for (const failure of failures) process.stdout.write(`\n${failure}\n`)
  process.stdout.write(`\n${agreed} agreed, ${failures.length} failed, in ${seconds} s; seed of the run: ${runSeed}\n`)
  if (failures.length > 0) process.exitCode = 1
}

await main()
