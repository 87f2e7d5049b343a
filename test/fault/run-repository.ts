// The lives of repository-life.ts by the thousand: every request of every act, in every way, again and again with other seeds, until so
// many points were met. Prints what failed with what replays it, and a line of figures at the end.
//
//   node test/fault/run-repository.ts [--points N] [--seed S] [--act ACT]
//   node test/fault/run-repository.ts --only SEED,ACT,FAULT,REQUEST

import { inspect, parseArgs } from 'node:util'
import { STORE_FAULTS, type StoreFault } from '../support/fault-store.ts'
import { type Act, ACTS, type Life, live } from './repository-life.ts'

const { values } = parseArgs({
  options: {
    points: { type: 'string', default: '1000' },
    seed: { type: 'string', default: '1' },
    act: { type: 'string' },
    only: { type: 'string' },
  },
})

let points = 0
let failures = 0

/** True when the request was met. */
async function point(life: Life): Promise<boolean> {
  points++
  try {
    return await live(life)
  } catch (error) {
    failures++
    const { seed, act, fault, faultAt } = life
    console.log(`FAIL --only ${seed},${act},${fault},${faultAt}\n${inspect(error)}`)
    return true
  }
}

async function sweep(first: number, most: number, acts: readonly Act[]): Promise<void> {
  for (let seed = first; points < most; seed++) {
    for (const act of acts) {
      for (const fault of STORE_FAULTS) {
        for (let faultAt = 1; points < most && (await point({ seed, act, fault, faultAt })); faultAt++) {}
      }
    }
  }
}

const start = performance.now()
if (values.only === undefined) {
  const acts = values.act === undefined ? ACTS : ACTS.filter((act) => act === values.act)
  await sweep(Number(values.seed), Number(values.points), acts)
} else {
  const [seed, act, fault, faultAt] = values.only.split(',')
  await point({ seed: Number(seed), act: act as Act, fault: fault as StoreFault, faultAt: Number(faultAt) })
}
const seconds = Math.round((performance.now() - start) / 1000)
console.log(`${points} points, ${failures} failures, ${seconds} s`)
process.exitCode = failures === 0 ? 0 : 1
