// Ten thousand crash states of qcow2 images, over all settings; run-states.ts makes a million. What was found on the way is
// here as a table of states that must stay right. A failure says how it is replayed.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { seedOfRun } from '../../src/base/random.ts'
import { record } from './qcow2-run.ts'
import { SETTINGS, settingNamed } from './qcow2-settings.ts'
import { type Finding, judge, sumOf } from './qcow2-states.ts'

/** States of all settings together, and operations of each run. */
const STATES = Number(process.env['VARVE_CRASH_STATES'] ?? 10_000)
const OPERATIONS = 130

function describe(finding: Finding): string {
  const { setting, seed, operations, boundary, index, manner, message } = finding
  const place = `--replay ${setting},${seed},${operations},${boundary},${index}`
  return `${manner}: ${message}\nnode test/crash/run-states.ts ${place}`
}

suite('whatever a crash leaves of a qcow2 image is clean after its repair and holds what was flushed', () => {
  const seed = seedOfRun()
  for (const setting of SETTINGS) {
    test(setting.name, async (t) => {
      t.diagnostic(`VARVE_SEED=${seed}`)
      const most = Math.ceil(STATES / SETTINGS.length)
      for (let states = 0, run = 0; states < most; run++) {
        const recording = await record(setting, seed + run, OPERATIONS)
        const { counts, findings } = await judge(recording, { draws: 1, most: most - states, again: 100 })
        assert.deepEqual(findings.map(describe), [])
        states += sumOf(counts)
      }
    })
  }
})

/** Runs in which something was wrong once: what it was, and where. */
const FOUND: readonly (readonly [what: string, setting: string, seed: number, operations: number])[] = [
  ['a flush did not wait for one under way, so that what it covered was lost', '512', 1, 100],
  ['two writers of one cluster kept each other waiting for ever', '512', 1, 300],
  ['two flushes found the same free clusters, which were then given out twice', '4k+backing+late', 1, 500],
]

suite('runs in which a crash once left something wrong', () => {
  for (const [what, setting, seed, operations] of FOUND) {
    test(`${what}: no more`, async () => {
      const { findings } = await judge(await record(settingNamed(setting), seed, operations), { draws: 0, most: 400 })
      assert.deepEqual(findings.map(describe), [])
    })
  }
})
