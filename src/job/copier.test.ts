// What a checkpoint says is done for good, and what pieces a pass is made of. That copies reach their targets is shown where they are made: job.test.ts and test/model.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { CHECKPOINT_RANGES, COPY_PIECE, GRANULE } from '../base/limits.ts'
import { Bitmap } from '../bitmap/bitmap.ts'
import { copyPool } from '../block/pool.ts'
import { threadGuests } from '../block/thread-guests.ts'
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

  test(`of ${granules / 2} ranges one is not done that was copied while a write to it was on its way`, async () => {
    const copier = await copied(granules, 'background')
    const change = writeTo(8)
    await copier.before(change)
    // The copy has what was there before the write.
    await copier.pass()
    const ledger = new Ledger()
    await copier.checkpoint(() => undefined, ledger)
    assert.equal(ledger.done.count, granules / 2 - 1)
    assert.ok(!ledger.done.hasAny(8 * GRANULE, 1))
    await copier.after(change, true)
    await copier.checkpoint(() => undefined, ledger)
    assert.ok(!ledger.done.hasAny(8 * GRANULE, 1), 'it is to do again')
    await copier.pass()
    await copier.checkpoint(() => undefined, ledger)
    assert.equal(ledger.done.count, granules / 2)
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

/** Where so many pieces of a pass are copied; `asks` says that a guest asks all the time, `together` that none is read before all have begun. */
async function placesOf(
  count: number,
  options: { idleLanes?: number; asks?: boolean; speed?: number; together?: boolean },
): Promise<string[]> {
  const todo = new Bitmap(count * COPY_PIECE)
  todo.set(0, todo.size)
  const job = new Job({ id: 'copy', kind: 'commit', subject: 'disk', terms: { speed: options.speed ?? 0 } })
  job.move('running')
  const places: string[] = []
  const { promise: allBegun, resolve: beginAll } = Promise.withResolvers<void>()
  const source = {
    read: (_offset: number, _length: number, into: Uint8Array) => {
      if (options.asks === true) threadGuests.requests++
      places.push(copyPool.lent(into) ? 'pool' : 'call')
      if (places.length === count) beginAll()
      return options.together === true ? allBegun : new Promise<void>((resolve) => setImmediate(resolve))
    },
    extents: () => undefined,
  }
  const nothing = (): undefined => undefined
  const target = { write: nothing, zero: nothing }
  const copier = new Copier({ job, source, target, todo, lanes: 2, idleLanes: options.idleLanes })
  await copier.pass()
  assert.equal(todo.count, 0)
  return places
}

test('while no guest asks for anything one piece more is copied within the call', async () => {
  assert.deepEqual(await placesOf(3, { idleLanes: 2, together: true }), ['pool', 'pool', 'call'])
  assert.deepEqual(await placesOf(2, { idleLanes: 1, together: true }), ['pool', 'call'])
})

test('all pieces are copied in the pool by a job that is not told otherwise, and by one with a limit', async () => {
  for (const options of [{}, { idleLanes: 2, speed: 1e12 }]) {
    assert.deepEqual(await placesOf(4, options), Array(4).fill('pool'))
  }
})

test('when a guest asks, all pieces are copied in the pool', async () => {
  threadGuests.requests++
  assert.deepEqual(await placesOf(4, { idleLanes: 2, asks: true }), Array(4).fill('pool'))
})
