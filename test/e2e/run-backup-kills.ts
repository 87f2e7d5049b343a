// Strikes at backups that a client makes by a view, in any number, at random moments (client-strikes.ts), with a table of what was met.
//
//   node test/e2e/run-backup-kills.ts --rounds 200 --seed 1        as root also with a repository that is full

import { parseArgs } from 'node:util'
import { CLIENT_STRIKES, StruckClients } from '../support/client-strikes.ts'

const { values } = parseArgs({
  options: { rounds: { type: 'string', default: '200' }, seed: { type: 'string', default: '1' } },
})
const isRoot = process.getuid?.() === 0
const strikes = CLIENT_STRIKES.filter((strike) => isRoot || strike !== 'repository full')
const counts = new Map<string, number>()
const started = performance.now()
const clients = await StruckClients.start(Number(values.seed), isRoot)
try {
  for (let round = 0; round < Number(values.rounds); round++) {
    const strike = strikes[round % strikes.length] as (typeof strikes)[number]
    const { at, outcome } = await clients.strike(strike)
    const row = `${strike.padEnd(22)} ${at.padEnd(18)} ${outcome}`
    counts.set(row, (counts.get(row) ?? 0) + 1)
    console.log(`${round + 1}: ${row}`)
  }
} finally {
  await clients.end()
}
console.log('\ntimes  strike                 at                 that backup')
for (const [row, count] of [...counts].sort(([a], [b]) => a.localeCompare(b)))
  console.log(`${String(count).padStart(5)}  ${row}`)
console.log(
  `${clients.writes} writes of the guest, ${Math.round((performance.now() - started) / 1000)} s; nothing was wrong`,
)
