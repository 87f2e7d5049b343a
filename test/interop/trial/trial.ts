// One combination of the matrix tried: an image is made by QEMU or by Varve, with what lies below it, and then the two take
// turns on it. After each turn both must find it clean and equal to a model in memory. Which combinations there are
// is matrix.ts; how many are tried is the caller's.
//
//   make -> ( Varve's turn -> agree -> QEMU's turn -> agree ) x 2 -> the snapshots as they were

import assert from 'node:assert/strict'
import fs from 'node:fs'
import path from 'node:path'
import { Random } from '../../../src/base/random.ts'
import { realHost } from '../../../src/host/real.ts'
import { checkFile } from '../../../src/image/check.ts'
import { runPeer } from '../../support/peer.ts'
import { COMBINATIONS, type Combination, describe } from '../matrix.ts'
import { makeImage } from './make.ts'
import { qemuTurn } from './qemu-turn.ts'
import { assertSnapshots } from './snapshots.ts'
import { assertSame, type Trial } from './state.ts'
import { assertReads, varveTurn, withImage } from './varve-turn.ts'

const ROUNDS = 2

export interface TrialOptions {
  readonly seed: number
  /** There, empty, and the caller's to remove. */
  readonly folder: string
}

/** Tries the combination of a number. Fails with what was done. */
export async function tryCombination(number: number, options: TrialOptions): Promise<void> {
  const { seed, folder } = options
  const combination = COMBINATIONS[number] as Combination
  const trial: Trial = {
    combination,
    random: new Random(seed),
    folder,
    image: path.join(folder, 'image.qcow2'),
    dataFile: path.join(folder, 'image.data'),
    model: Buffer.alloc(0),
    backingSize: 0,
    snapshots: new Map(),
    history: [],
  }
  try {
    await takeTurns(trial)
  } catch (error) {
    const replay = `node test/interop/run-matrix.ts --only ${number} --seed ${seed}`
    const message = `combination ${number} (${describe(combination)}): ${String(error)}\nagain with: ${replay}`
    throw new Error(`${message}\n${trial.history.slice(-60).join('\n')}`, { cause: error })
  }
}

async function takeTurns(trial: Trial): Promise<void> {
  await makeImage(trial)
  await agree(trial)
  for (let round = 0; round < ROUNDS; round++) {
    trial.history.push(`round ${round}, Varve`)
    await varveTurn(trial)
    await agree(trial)
    trial.history.push(`round ${round}, QEMU`)
    await qemuTurn(trial)
    await agree(trial)
  }
  await withImage(trial.image, (image) => assertSnapshots(trial, image))
}

/** Both find the image clean, with the same counts, and its content equal to the model. */
async function agree(trial: Trial): Promise<void> {
  const { folder, image, model, combination } = trial
  const check = runPeer('qemu-img', ['check', '-f', 'qcow2', '--output=json', image])
  const found = JSON.parse(check.stdout) as unknown
  const { report, problems } = await checkFile({ host: realHost, path: image, format: 'qcow2' })
  assert.deepEqual(found, report, `qemu-img check, and Varve's: ${problems.join('\n')}`)
  assert.equal(check.status, 0, `${check.stdout}${check.stderr}${problems.join('\n')}`)
  const expected = path.join(folder, 'model.raw')
  fs.writeFileSync(expected, model)
  const compared = runPeer('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', expected, image])
  assert.equal(compared.stdout + compared.stderr, 'Images are identical.\n', 'qemu-img compare')
  await withImage(image, (layer) => assertReads(trial, layer))
  // QEMU may fill the disk's last cluster up: the file is then longer than the disk.
  const data = combination.dataFile === 'raw' ? fs.readFileSync(trial.dataFile) : model
  assertSame(data.subarray(0, model.length), model, 'the raw data file')
}
