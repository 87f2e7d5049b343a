// The rounds of guest.test.ts at length, run by hand: `node test/guest/run-rounds.ts [--rounds 20]`. docs/internals/guests.md has the figures.

import { parseArgs } from 'node:util'
import { guestsMissing } from './kernel.ts'
import { runRounds } from './rounds.ts'

const { values } = parseArgs({ options: { rounds: { type: 'string', default: '20' } } })
const missing = guestsMissing()
if (missing !== false) throw new Error(missing)
const outcome = await runRounds(Number(values.rounds), (line) => console.log(line))
console.log(JSON.stringify(outcome))
