// The short form of run-many-machines.ts: what does not depend on the machine's pace.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { seedOfRun } from '../../src/base/random.ts'
import { tempFolder } from '../support/temp.ts'
import { ManyMachines } from './many-machines.ts'

test('machines under load are backed up by one command, one after the other, and every backup is its disk at one moment', async (t) => {
  const seed = seedOfRun()
  t.diagnostic(`VARVE_SEED=${seed}`)
  const options = { machines: 8, sizeMiB: 16, fillMiB: 8, perSecond: 20, seed }
  const machines = new ManyMachines({ folder: tempFolder(t), ...options })
  try {
    await machines.start()
    let most = 0
    for (const kind of ['full', 'incremental'] as const) {
      const { atOnce, hostPeak, largestPeak } = await machines.backUp(kind)
      assert.ok(atOnce <= 1)
      most = Math.max(most, largestPeak)
      assert.equal(hostPeak, most)
    }
  } finally {
    await machines.end()
  }
})
