// What a checkpoint says is done for good. That copies reach their targets is shown where they are made: job.test.ts and test/model.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { CHECKPOINT_RANGES, GRANULE } from '../base/limits.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import type { Change } from '../chain/disk.ts'
import { Copier, type CopyMode, type Settled } from './copier.ts'
import { Job } from './job.ts'

const GRANULES = 4 * CHECKPOINT_RANGES
const SIZE = GRANULES * GRANULE

/** Granules that were said to be done, one by one or all at once. */
class Ledger implements Settled {
  readonly done = new Bitmap(SIZE)
  ranges = 0
  sets = 0

  range(offset: number, length: number): undefined {
    this.ranges++
    this.done.set(offset, length)
  }

  async many(granules: Bitmap): Promise<void> {
    this.sets++
    this.done.or(granules)
  }
}

/** Has copied every second of the first so many granules. */
async function copied(granules: number, mode: CopyMode): Promise<Copier> {
  const todo = new Bitmap(SIZE)
  for (let granule = 0; granule < granules; granule += 2) todo.setGranules(granule, granule + 1)
  const job = new Job({ id: 'copy', kind: 'mirror', subject: 'disk' })
  job.move('running')
  const nothing = (): undefined => undefined
  const source = { read: nothing, extents: nothing }
  const copier = new Copier({ job, source, target: { write: nothing, zero: nothing }, todo, mode })
  await copier.pass()
  return copier
}

function writeTo(granule: number): Change {
  return { kind: 'write', offset: granule * GRANULE, length: GRANULE, from: new Uint8Array(GRANULE), at: 0, flags: 0 }
}

test('a few ranges are done one by one, many all at once', async () => {
  for (const [granules, ranges, sets] of [
    [2 * CHECKPOINT_RANGES, CHECKPOINT_RANGES, 0],
    [GRANULES, 0, 1],
  ] as const) {
    const ledger = new Ledger()
    await (await copied(granules, 'background')).checkpoint(() => undefined, ledger)
    assert.equal(ledger.done.count, granules / 2)
    assert.deepEqual([ledger.ranges, ledger.sets], [ranges, sets])
  }
})

for (const granules of [2 * CHECKPOINT_RANGES, GRANULES]) {
  test(`of ${granules / 2} ranges one that a guest writes during the flush is not done`, async () => {
    const copier = await copied(granules, 'background')
    const ledger = new Ledger()
    await copier.checkpoint(() => copier.before(writeTo(8)), ledger)
    assert.equal(ledger.done.count, granules / 2 - 1)
    assert.ok(!ledger.done.hasAny(8 * GRANULE, 1))
  })

  test(`of ${granules / 2} ranges one that is claimed is done at the next checkpoint`, async () => {
    const copier = await copied(granules, 'write-both')
    const ledger = new Ledger()
    const change = writeTo(8)
    await copier.before(change)
    await copier.checkpoint(() => undefined, ledger)
    assert.equal(ledger.done.count, granules / 2 - 1)
    assert.ok(!ledger.done.hasAny(8 * GRANULE, 1))
    await copier.after(change, true)
    await copier.checkpoint(() => undefined, ledger)
    assert.equal(ledger.done.count, granules / 2)
  })
}
