// kill -9 as often as it is told, under edits of bitmaps, views, snapshots, commits and backups: see killed-bitmaps.ts.
//
//   node test/e2e/run-bitmap-kills.ts --kills 200 --seed 1
//
// Every twentieth kill ends one disk and begins another, with the next seed.

import { parseArgs } from 'node:util'
import { Site } from '../support/site.ts'
import { KilledBitmaps } from './killed-bitmaps.ts'

const KILLS_OF_A_DISK = 20

const { values } = parseArgs({
  options: { kills: { type: 'string', default: '200' }, seed: { type: 'string', default: '1' } },
})

const during = new Map<string, number>()
const total = { kills: 0, backups: 0, writes: 0 }
for (let seed = Number(values.seed); total.kills < Number(values.kills); seed++) {
  const site = await Site.start()
  try {
    const killed = new KilledBitmaps(site, seed)
    await killed.start()
    const count = Math.min(KILLS_OF_A_DISK, Number(values.kills) - total.kills)
    for (let kill = 0; kill < count; kill++) await killed.kill()
    const { figures } = killed
    for (const key of ['kills', 'backups', 'writes'] as const) total[key] += figures[key]
    for (const [name, times] of figures.during) during.set(name, (during.get(name) ?? 0) + times)
    console.log(`seed ${seed}: ${figures.kills} kills, ${figures.backups} backups, ${figures.writes} writes`)
  } finally {
    await site.end()
  }
}
console.log(`${total.kills} kills, ${total.backups} backups, ${total.writes} writes: all as it must be`)
console.log(`killed in ${[...during].map(([name, times]) => `${name} ${times}`).join(', ')}`)
