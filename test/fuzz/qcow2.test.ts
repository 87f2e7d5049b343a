// A few thousand damaged qcow2 images, new ones in every run, and all that ever broke a rule. The long run is `node test/fuzz/run.ts`.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { makeBases } from './qcow2-bases.ts'
import { mutate } from './qcow2-mutations.ts'
import { runTrial } from './qcow2.ts'

const TRIALS = 1500
/** Seconds after which no further trial is begun, on a slow machine. */
const SECONDS = 15

const bases = await makeBases()

/** Seeds that once broke a rule. A new base or mutation gives them another image: what they showed has a test of its own too. */
const ONCE_BROKEN: Readonly<Record<number, string>> = {
  458: 'deleting a snapshot read an L2 table far past the end of the file',
  477: 'two L1 entries share a table: a copied flag is missing after a write',
  555: 'new refcounts were put where a compressed cluster goes on past the end of the file',
  769: 'the same, with a refcount table that the header had lost',
  1777: 'each repair put new refcounts where lost compressed clusters lead',
  174600: 'a repair mended entries of a table that were another structure’s bytes',
  5479: 'in an image with a data file, an L2 table far past the end of the file was read',
  5796: 'a repair made the file as long as the place of an empty snapshot’s L1 table',
}

test('damaged images read consistently or are refused, and never worse', async (t) => {
  const first = seedOfRun()
  const outcomes = new Map<string, number>()
  const end = performance.now() + SECONDS * 1000
  let seed = first
  for (; seed < first + TRIALS && performance.now() < end; seed++) {
    const { outcome } = await runTrial(bases, seed).catch((error: unknown) => {
      throw new Error(`replay with: node test/fuzz/run.ts --only ${seed}`, { cause: error })
    })
    outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1)
  }
  const counts = [...outcomes].map(([outcome, count]) => `${count} ${outcome}`).join(', ')
  t.diagnostic(`seeds ${first} to ${seed - 1}: ${counts}`)
  assert.ok(outcomes.size > 1, 'the trials end in more than one way')
})

for (const [seed, what] of Object.entries(ONCE_BROKEN))
  test(`seed ${seed} breaks no rule again: ${what}`, async () => void (await runTrial(bases, Number(seed))))

test('a seed damages an image always alike, and damage is done', () => {
  let changed = 0
  for (let seed = 0; seed < 200; seed++) {
    const base = bases[seed % bases.length] as (typeof bases)[number]
    const once = mutate(base.bytes, base.anatomy, new Random(seed))
    assert.ok(mutate(base.bytes, base.anatomy, new Random(seed)).bytes.equals(once.bytes))
    if (!once.bytes.equals(base.bytes)) changed++
  }
  assert.ok(changed > 150)
})
