// An active commit under load that is killed with -9 twice: it goes on from where it was. run-kills.ts does the same at full size.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { CHECKPOINT_BYTES, COMMIT_LANES, COPY_PIECE } from '../../src/base/limits.ts'
import { seedOfRun } from '../../src/base/random.ts'
import { missing } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'
import { KilledCommits } from './killed-commits.ts'

const MIB = 1024 * 1024
/** Slower than any machine, so that a kill finds the commit under way. */
const SPEED = 100 * MIB
/** What a kill may take: what was copied while a checkpoint was made, and as much before it. */
const LOST_MAX = 2 * CHECKPOINT_BYTES + COMMIT_LANES * COPY_PIECE

test('a commit that is killed twice goes on from its last checkpoints', { skip: missing('qemu-img') }, async (t) => {
  const seed = seedOfRun()
  t.diagnostic(`VARVE_SEED=${seed}`)
  const commits = new KilledCommits({ folder: tempFolder(t), sizeMiB: 256, seed, fioIops: 0 })
  try {
    await commits.start()
    const { kills, copied, rewritten } = await commits.commit([0.6, 0.9], SPEED)
    assert.equal(kills.length, 2)
    for (const { stoppedAt, wentOnFrom, rewritten } of kills) {
      t.diagnostic(`killed at ${stoppedAt}, went on from ${wentOnFrom}`)
      assert.ok(wentOnFrom >= stoppedAt - rewritten - LOST_MAX, `went on from ${wentOnFrom}, stopped at ${stoppedAt}`)
      assert.ok(wentOnFrom > 0)
    }
    assert.ok(copied - rewritten <= 256 * MIB + 2 * LOST_MAX)
    await commits.checkImage()
  } finally {
    await commits.end()
  }
})
