// Each strike at a backup that a client makes, once; run-backup-kills.ts does it in any number.

import { test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { CLIENT_STRIKES, StruckClients } from '../support/client-strikes.ts'

test('a client that is killed or hangs, a full repository and full scratch harm no guest, leave nothing, and the next backup is right', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const isRoot = process.getuid?.() === 0
  const clients = await StruckClients.start(random.seed, isRoot)
  t.after(() => clients.end())
  for (const strike of CLIENT_STRIKES) {
    if (!isRoot && strike === 'repository full') continue
    const { at, outcome } = await clients.strike(strike)
    t.diagnostic(`${strike}: ${at}, ${outcome}`)
  }
})
