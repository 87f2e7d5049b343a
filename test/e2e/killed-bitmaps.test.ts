// A few real kills under edits of bitmaps, views, snapshots, commits and backups. run-bitmap-kills.ts does as many as it is told.

import { test } from 'node:test'
import { seedOfRun } from '../../src/base/random.ts'
import { Site } from '../support/site.ts'
import { KilledBitmaps } from './killed-bitmaps.ts'

const KILLS = 5

test('after a kill bitmaps are exact, and the next backups are incremental and equal the disk', async (t) => {
  const seed = seedOfRun()
  t.diagnostic(`VARVE_SEED=${seed}`)
  const site = await Site.start()
  t.after(() => site.end())
  const killed = new KilledBitmaps(site, seed)
  await killed.start()
  for (let kill = 0; kill < KILLS; kill++) await killed.kill()
  const { during, writes, backups } = killed.figures
  t.diagnostic(`${writes} writes, ${backups} backups, killed in ${[...during.keys()].join(', ')}`)
})
