// Every n-th request of one client goes wrong, each in every way, while others are at work: see repository-life.ts. The whole of it is
// run-repository.ts; this is a part of a few seconds.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { seedOfRun } from '../../src/base/random.ts'
import { STORE_FAULTS } from '../support/fault-store.ts'
import { ACTS, live } from './repository-life.ts'

/** Requests that are passed over from one life to the next. */
const STRIDE = 11

suite('a repository of which one client has a fault', () => {
  for (const act of ACTS) {
    test(`whatever request of a ${act} goes wrong, what is done and visible is whole`, async (t) => {
      const first = seedOfRun()
      t.diagnostic(`VARVE_SEED=${first}`)
      let lives = 0
      for (const [index, fault] of STORE_FAULTS.entries()) {
        for (let faultAt = 1 + index; ; faultAt += STRIDE) {
          const seed = first + lives++
          try {
            if (!(await live({ seed, act, fault, faultAt }))) break
          } catch (error) {
            throw new Error(`${act}, ${fault} at ${faultAt}, seed ${seed}`, { cause: error })
          }
        }
      }
      assert.ok(lives >= 2 * STORE_FAULTS.length, 'the sweep met the requests')
    })
  }
})
