// The interop matrix: images of every kind that QEMU makes, changed by QEMU and Varve in turns. Here run as many
// combinations as hold every pair of option values, and some more, chosen by the seed; VARVE_MATRIX=all tries all of them, as
// run-matrix.ts does with a line for each.

import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import fs from 'node:fs'
import path from 'node:path'
import { suite, test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { isBlockError } from '../../src/block/error.ts'
import { openQcow2 } from '../../src/format/qcow2/image.ts'
import { realHost } from '../../src/host/real.ts'
import { missing, peer, runPeer } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'
import {
  allCombinations,
  AXIS_NAMES,
  type Combination,
  COMBINATIONS,
  createOptions,
  createRefusal,
  describe,
  pairsOf,
  pairwise,
  seedOf,
} from './matrix.ts'
import { tryCombination } from './trial/trial.ts'

const SAMPLE = 60
const isWhole = process.env['VARVE_MATRIX'] === 'all'

function chosenNumbers(random: Random): number[] {
  if (isWhole) return [...COMBINATIONS.keys()]
  const chosen = new Set(pairwise(random))
  while (chosen.size < SAMPLE) chosen.add(random.below(COMBINATIONS.length))
  return [...chosen]
}

/** For each pair of values one combination, if QEMU takes it or not, that is otherwise as plain as can be. */
function plainestOfPairs(): Combination[] {
  const plain: Combination = {
    version: '1.1',
    clusterSize: 65_536,
    refcountBits: 16,
    compression: 'none',
    extendedL2: false,
    dataFile: 'none',
    lazyRefcounts: false,
    depth: 0,
  }
  const oddities = (c: Combination): number => AXIS_NAMES.filter((axis) => c[axis] !== plain[axis]).length
  return allCombinations().filter((c) => oddities(c) <= 2)
}

suite('the interop matrix', { skip: missing('qemu-img', 'qemu-io') }, () => {
  test('the matrix has 500 combinations and more, and a sample of it holds every pair of values', () => {
    assert.ok(COMBINATIONS.length >= 500)
    const all = new Set(COMBINATIONS.flatMap(pairsOf))
    const chosen = pairwise(new Random(seedOfRun()))
    const sampled = new Set(chosen.flatMap((number) => pairsOf(COMBINATIONS[number] as Combination)))
    assert.deepEqual(
      [...all].filter((pair) => !sampled.has(pair)),
      [],
    )
    assert.ok(chosen.length < SAMPLE, `${chosen.length} combinations`)
  })

  test('qemu-img creates what the matrix says that it can, and refuses the rest', (t) => {
    const folder = tempFolder(t)
    const base = path.join(folder, 'base')
    peer('qemu-img', 'create', '-q', '-f', 'raw', base, '1M')
    for (const combination of isWhole ? allCombinations() : plainestOfPairs()) {
      const options = createOptions(combination, path.join(folder, 'data'))
      const backing = combination.depth > 0 ? ['-b', base, '-F', 'raw'] : []
      const image = path.join(folder, 'image')
      const created = runPeer('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', options, ...backing, image, '1M'])
      const refusal = createRefusal(combination)
      assert.equal(created.status === 0, refusal === undefined, `${describe(combination)}: ${created.stderr}`)
    }
  })

  test('QEMU and Varve take turns on an image, and agree on it after each', { timeout: 3_600_000 }, async (t) => {
    const random = new Random(seedOfRun())
    t.diagnostic(`VARVE_SEED=${random.seed}`)
    for (const number of chosenNumbers(random)) {
      const folder = path.join(tempFolder(t), 'trial')
      fs.mkdirSync(folder)
      await tryCombination(number, { seed: seedOf(random.seed, number), folder })
      fs.rmSync(folder, { recursive: true })
    }
  })

  test('an image that QEMU has open is not written, and one that is written here QEMU does not open', async (t) => {
    const folder = tempFolder(t)
    const image = path.join(folder, 'image.qcow2')
    peer('qemu-img', 'create', '-q', '-f', 'qcow2', image, '1M')
    const holder = spawn('qemu-io', ['-r', '-f', 'qcow2', image], { stdio: ['pipe', 'pipe', 'ignore'] })
    const ended = once(holder, 'exit')
    await once(holder.stdout, 'data')
    const reader = await openQcow2(realHost, image, { name: 'image' })
    await assert.rejects(reader.setAccess('write'), (error) => isBlockError(error, 'busy'))
    holder.stdin.end('quit\n')
    await ended
    await reader.setAccess('write')
    for (const flags of [[], ['-r']]) {
      const refused = runPeer('qemu-io', [...flags, '-f', 'qcow2', '-c', 'read 0 512', image])
      assert.match(refused.stderr, /Failed to get .*lock/)
    }
    // Without locks QEMU may look: what it reads is the image as it is written.
    peer('qemu-io', '-U', '-r', '-f', 'qcow2', '-c', 'read 0 512', image)
    await reader.close()
    const writer = spawn('qemu-io', ['-f', 'qcow2', image], { stdio: ['pipe', 'pipe', 'ignore'] })
    const gone = once(writer, 'exit')
    await once(writer.stdout, 'data')
    await assert.rejects(openQcow2(realHost, image, { name: 'image' }), (error) => isBlockError(error, 'busy'))
    writer.stdin.end('quit\n')
    await gone
  })
})
