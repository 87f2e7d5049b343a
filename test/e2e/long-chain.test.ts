// The middle of a chain of 16 layers is deleted under load until two are left. run-chain.ts does the same with 64, and measures.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { seedOfRun } from '../../src/base/random.ts'
import { missing } from '../support/peer.ts'
import { tempFolder } from '../support/temp.ts'
import { ShrinkingChain } from './shrinking-chain.ts'

const LAYERS = 16

test('deleting the middle of a long chain under load leaves two clean layers and all data', {
  skip: missing('qemu-img'),
}, async (t) => {
  const seed = seedOfRun()
  t.diagnostic(`VARVE_SEED=${seed}`)
  const chain = await ShrinkingChain.start({ folder: tempFolder(t), sizeMiB: 32, layers: LAYERS, seed })
  try {
    for (let left = LAYERS - 1; left >= 2; left--) {
      await chain.deleteMiddle()
      assert.equal((await chain.layers()).length, left)
      await chain.check()
    }
    await chain.finish()
  } finally {
    await chain.end()
  }
})
