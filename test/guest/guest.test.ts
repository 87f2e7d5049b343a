// A real guest on a Varve disk, through snapshots, backups, merges, moves to another file and kills of the daemon. Twenty rounds of the same
// are run by hand: run-rounds.ts.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { guestsMissing } from './kernel.ts'
import { runRounds } from './rounds.ts'

const ROUNDS = 2

test('a guest lives through snapshots, backups, merges, moves and a killed daemon, and loses no line that it synced', {
  skip: guestsMissing(),
  timeout: 900_000,
}, async (t) => {
  const outcome = await runRounds(ROUNDS, (line) => t.diagnostic(line))
  assert.equal(outcome.kills, 2 * ROUNDS)
  assert.equal(outcome.backups, 2 * ROUNDS)
  t.diagnostic(JSON.stringify(outcome))
})
