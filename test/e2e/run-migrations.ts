// A run by hand: migrations between two daemons under a guest, over a line of 20 ms each way, each struck once, ten times by each kind of
// strike at random moments of the copying and of the switch-over. Prints what was found after each and what ended it. Any
// write lost, any request failed and any two writers end the run with an error.
//
//   node test/e2e/run-migrations.ts [--rounds 10] [--seed NUMBER]

import { parseArgs } from 'node:util'
import { Random } from '../../src/base/random.ts'
import { Pair } from '../support/migration.ts'
import { type Moment, strikeOnce, STRIKES } from '../support/strikes.ts'

const { values } = parseArgs({ options: { rounds: { type: 'string' }, seed: { type: 'string' } } })
const rounds = Number(values.rounds ?? 10)
const seed = Number(values.seed ?? 1)
const random = new Random(seed)

const pair = await Pair.start({ delayMs: 20 })
try {
  process.stdout.write(`seed ${seed}\n\n| strike | at | found then | outcome | guest held, ms | longest write, ms |\n`)
  process.stdout.write('|---|---|---|---|---|---|\n')
  for (const strike of STRIKES) {
    for (let round = 0; round < rounds; round++) {
      const moment: Moment =
        round % 2 === 0
          ? { in: 'copying', afterMs: random.below(2500) }
          : { in: 'switch-over', afterMs: random.below(300) }
      const disk = `${strike.replace(' ', '-')}-${round}`
      const { found, outcome, pauseMs, longestMs } = await strikeOnce(pair, disk, strike, moment, random)
      const at = `${moment.in} + ${moment.afterMs} ms`
      process.stdout.write(`| ${strike} | ${at} | ${found} | ${outcome} | ${pauseMs ?? ''} | ${longestMs} |\n`)
    }
  }
} finally {
  await pair.end()
}
