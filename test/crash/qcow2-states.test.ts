// Ten thousand crash states of qcow2 images, over all settings; run-states.ts makes a million. What was found on the way is
// here as a table of states that must stay right. A failure says how it is replayed.

import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { seedOfRun } from '../../src/base/random.ts'
import { missing } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'
import { QemuPeer } from './qcow2-qemu.ts'
import { record } from './qcow2-run.ts'
import { SETTINGS, settingNamed } from './qcow2-settings.ts'
import { type Finding, judge, type Look, sumOf } from './qcow2-states.ts'

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

type Found = readonly [what: string, setting: string, seed: number, operations: number, place: number]

/** Runs that showed each of these while the code was as it was then, and about where. */
const FOUND: readonly Found[] = [
  ['a flush did not wait for one under way, and what it covered was lost', '512', 4, 60, 170],
  ['two writers of one cluster kept each other waiting for ever', '512+backing', 18, 120, 0],
  ['two flushes found the same free clusters, which were then given out twice', '4k+backing+late', 15, 300, 1072],
  ['a lost place took along subclusters that showed the backing file', 'extended-l2+backing', 2, 60, 248],
  ['a flush did not cover what a process wrote that died before', '512-v2+backing+late+device', 11, 200, 152],
  ['a place emptied while it was hidden came back with what it held before a flush', '512-data+backing', 3, 300, 195],
  [
    'a write to a place that was hidden meanwhile landed on the next one there',
    '512-data+backing+late+shrinks',
    9,
    5000,
    16266,
  ],
  ['a repair left counts past the end of the file', '512+late+keeps', 14, 300, 2097],
]

suite('runs in which something was wrong once', () => {
  for (const [what, setting, seed, operations, place] of FOUND) {
    test(`${what}: no more`, async () => {
      const recording = await record(settingNamed(setting), seed, operations)
      const { findings } = await judge(recording, { draws: 1, from: place - 50, most: 400 })
      assert.deepEqual(findings.map(describe), [])
    })
  }
})

const SHOWN = [
  '512+late+keeps',
  '4k+backing+late',
  'extended-l2+backing',
  '512-v2+backing+late',
  '4k-data+backing+late',
]

suite('QEMU reads in a crash state what Varve reads there, before and after it repairs it', () => {
  const seed = seedOfRun()
  for (const name of SHOWN) {
    test(name, { skip: missing('qemu-img') }, async (t) => {
      t.diagnostic(`VARVE_SEED=${seed}`)
      const setting = settingNamed(name)
      const peer = new QemuPeer(tempFolder(t), setting)
      const look: Look = (state, content, when) => {
        if (state.boundary % 40 === 7 && state.index !== 1) peer.look(state, content, when)
      }
      const { findings } = await judge(await record(setting, seed, 70), { draws: 1, look })
      assert.deepEqual(findings.map(describe), [])
    })
  }
})
