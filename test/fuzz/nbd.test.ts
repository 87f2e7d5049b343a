// A few thousand damaged NBD conversations for each side, new ones in every run. The long run is `node test/fuzz/run-nbd.ts`.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { seedOfRun } from '../../src/base/random.ts'
import { runClientTrial } from './nbd-client.ts'
import { runServerTrial } from './nbd-server.ts'

const TRIALS = 4000

/** Seeds of the server's fuzz that once broke a rule. */
const ONCE_BROKEN: Readonly<Record<number, string>> = {
  1012505: 'a reply that became ready after the socket closed kept a buffer',
  1003568: 'behind a request that is none, a long piece was read for ever',
}

const SIDES = [
  ['server', runServerTrial, 4],
  ['client', runClientTrial, 4],
] as const

for (const [seed, what] of Object.entries(ONCE_BROKEN))
  test(`seed ${seed} breaks no rule again: ${what}`, async () => void (await runServerTrial(Number(seed))))

for (const [side, runTrial, ends] of SIDES) {
  test(`damaged conversations end as the ${side} means them to, whatever the other side says`, async (t) => {
    const first = seedOfRun()
    const outcomes = new Map<string, number>()
    for (let seed = first; seed < first + TRIALS; seed++) {
      const { outcome } = await runTrial(seed).catch((error: unknown) => {
        throw new Error(`replay with: node test/fuzz/run-nbd.ts ${side} --only ${seed}`, { cause: error })
      })
      outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1)
    }
    const counts = [...outcomes].map(([outcome, count]) => `${count} ${outcome}`).join(', ')
    t.diagnostic(`seeds ${first} to ${first + TRIALS - 1}: ${counts}`)
    assert.ok(outcomes.size >= ends, `the conversations end in every way: ${counts}`)
  })

  test(`a seed has always the same conversation (${side})`, async (t) => {
    // A server whose time slice is used up stops reading, which is where a conversation ends; on a busy machine that is anywhere.
    t.mock.method(performance, 'now', () => 0)
    for (let seed = 0; seed < 50; seed++) assert.deepEqual(await runTrial(seed), await runTrial(seed))
  })
}
