// Random lives of a dirty log: guest writes, clears, folds, edits, clean closes, kills, power losses, slots that cannot be written for
// a while. Before operations of the host drawn by lot a copy of it is put aside, and is killed or loses power in several ways: any
// part of what was not synced is kept. What is recovered is held against a model that knows, for each bitmap, the exact bits,
// since when it counts, and where too much is allowed. A guest writes its data only after its mark.
//
// Until an edit is durable there are two worlds, that before and that after it, and recovery may find either; each edit
// numbers the world that it makes in the text of a bitmap. Requests in flight leave their granules uncertain.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random, seedOfRun } from '../../src/base/random.ts'
import { DirtyLog } from '../../src/dirtylog/dirty-log.ts'
import type { SimulatedHost } from '../../src/host/simulated.ts'
import { Life } from './dirtylog-life.ts'
import { type Moment, compare, openFiles, readVersions } from './dirtylog-model.ts'

/** Opens what is left, and compares; leaves the log as a crash would. */
async function check(moment: Moment, host: SimulatedHost, died: 'process' | 'host', note: string): Promise<void> {
  const { log, recovery } = await DirtyLog.open(await openFiles(host), { bootId: host.bootId() })
  compare(moment, log, recovery, died, await readVersions(host), note)
  await log.abandon()
}

/** Stops a recovery itself before each of its operations. */
async function checkRecoveryCrashes(moment: Moment, random: Random, note: string): Promise<number> {
  const host = moment.host.clone()
  host.crash(random)
  const stops: SimulatedHost[] = []
  host.beforeOperation = () => stops.push(host.clone())
  await check(moment, host, 'host', note)
  for (const [i, stop] of stops.entries()) {
    stop.crash(random)
    await check(moment, stop, 'host', `${note}, and again before its operation ${i}`)
  }
  return stops.length
}

test('after a kill at any operation the bitmaps are exact, and after a power loss no bit is missing and few are too many', async (t) => {
  const seed = seedOfRun()
  t.diagnostic(`VARVE_SEED=${seed}`)
  const seeds = new Random(seed)
  const wanted = Number(process.env['VARVE_CRASH_STATES'] ?? 24_000)
  let [kills, losses, recoveries] = [0, 0, 0]
  while (kills + losses + recoveries < wanted) {
    const lifeSeed = seeds.next()
    const life = new Life(lifeSeed, 6)
    await life.begin()
    const steps = life.random.between(10, 60)
    for (let step = 0; step < steps; step++) await life.step()
    await life.end()
    for (const [i, moment] of life.moments.entries()) {
      const note = `VARVE_SEED=${seed}, life ${lifeSeed}, before operation ${i}`
      await check(moment, moment.host.clone(), 'process', `${note}, killed`)
      kills++
      for (const keep of ['none', 'all', life.random, life.random, life.random] as const) {
        const host = moment.host.clone()
        host.crash(keep)
        await check(moment, host, 'host', `${note}, power lost`)
        losses++
      }
      if (life.random.chance(0.02)) recoveries += await checkRecoveryCrashes(moment, life.random, `${note}, power lost`)
    }
  }
  console.log(`      ${kills} kills, ${losses} power losses, ${recoveries} power losses during recovery`)
  assert.ok(kills > 0 && losses > 0 && recoveries > 0)
})
