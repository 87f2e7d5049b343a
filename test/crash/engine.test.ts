// The whole engine through crashes (engine-life.ts), a few lives of it: what crashes at random changes of what is stored leave is
// opened and looked at. run-engine.ts looks at every change of as many lives as one likes.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { seedOfRun } from '../../src/base/random.ts'
import { checkCrash } from './engine-crash.ts'
import { liveAndCrash } from './engine-life.ts'

/** On a host that answers at once and on one that answers late, in turn. */
const LIVES = Number(process.env['VARVE_ROUNDS'] ?? 2)
/** So many more at most, until what is looked for was there: a life may pass without a snapshot. */
const MORE_LIVES = 30
const STEPS = 150
/** A crash is looked at for one in so many changes. */
const EVERY = 10

test('an engine opened after a kill or a power loss at any moment has lost nothing and ends its jobs', async (t) => {
  const first = seedOfRun()
  t.diagnostic(`VARVE_SEED=${first}`)
  const total = { crashes: 0, snapshots: 0, clones: 0, bitmaps: 0, jobs: 0 }
  const isEnough = (): boolean => total.crashes > 50 && total.snapshots > 0 && total.jobs > 0
  for (let seed = first; seed < first + LIVES || (!isEnough() && seed < first + LIVES + MORE_LIVES); seed++) {
    for (const crash of await liveAndCrash({ seed, steps: STEPS, every: EVERY })) {
      const note = `VARVE_SEED=${seed}, ${crash.loss} at operation ${crash.operation} in ${crash.during.join(' and ')}`
      const seen = await checkCrash(crash, note, total.crashes % 4 === 0)
      total.crashes++
      for (const key of ['snapshots', 'clones', 'bitmaps', 'jobs'] as const) total[key] += seen[key]
    }
  }
  t.diagnostic(JSON.stringify(total))
  assert.ok(isEnough(), 'there were crashes, some with a snapshot, and jobs that went on')
})
