// The lives of repository-life.ts by the thousand: every request of every act, in every way, again and again with other seeds, until so
// many points were met, to the end of the last seed. Prints what failed with what replays it, and a line of figures at the end. With
// --notes it keeps in FILE, seed by seed, how far it is, and goes on there when it is started again.
//
//   node test/fault/run-repository.ts [--points N] [--seed S] [--act ACT] [--notes FILE]
//   node test/fault/run-repository.ts --only SEED,ACT,FAULT,REQUEST

import fs from 'node:fs'
import { inspect, parseArgs } from 'node:util'
import { STORE_FAULTS, type StoreFault } from '../support/fault-store.ts'
import { type Act, ACTS, type Life, live } from './repository-life.ts'

const { values } = parseArgs({
  options: {
    points: { type: 'string', default: '1000' },
    seed: { type: 'string', default: '1' },
    act: { type: 'string' },
    only: { type: 'string' },
    notes: { type: 'string' },
  },
})

/** How far it is: all seeds before `seed` were met as a whole. */
interface Notes {
  seed: number
  points: number
  failures: number
  seconds: number
}

const notes: Notes =
  values.notes !== undefined && fs.existsSync(values.notes)
    ? (JSON.parse(fs.readFileSync(values.notes, 'utf8')) as Notes)
    : { seed: Number(values.seed), points: 0, failures: 0, seconds: 0 }
const before = notes.seconds
const start = performance.now()

/** True when the request was met. */
async function point(life: Life): Promise<boolean> {
  notes.points++
  try {
    return await live(life)
  } catch (error) {
    notes.failures++
    const { seed, act, fault, faultAt } = life
    console.log(`FAIL --only ${seed},${act},${fault},${faultAt}\n${inspect(error)}`)
    return true
  }
}

async function sweep(most: number, acts: readonly Act[]): Promise<void> {
  while (notes.points < most) {
    for (const act of acts) {
      for (const fault of STORE_FAULTS) {
        for (let faultAt = 1; await point({ seed: notes.seed, act, fault, faultAt }); faultAt++) {}
      }
    }
    notes.seed++
    notes.seconds = before + Math.round((performance.now() - start) / 1000)
    if (values.notes !== undefined) fs.writeFileSync(values.notes, JSON.stringify(notes))
  }
}

if (values.only === undefined) {
  const acts = values.act === undefined ? ACTS : ACTS.filter((act) => act === values.act)
  await sweep(Number(values.points), acts)
} else {
  const [seed, act, fault, faultAt] = values.only.split(',')
  await point({ seed: Number(seed), act: act as Act, fault: fault as StoreFault, faultAt: Number(faultAt) })
}
const seconds = before + Math.round((performance.now() - start) / 1000)
console.log(`${notes.points} points, ${notes.failures} failures, ${seconds} s; the next seed is ${notes.seed}`)
process.exitCode = notes.failures === 0 ? 0 : 1
