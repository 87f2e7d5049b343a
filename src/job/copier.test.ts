// What a checkpoint says is done for good, and what pieces a pass is made of. That copies reach their targets is shown where they are made: job.test.ts and test/model.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { CHECKPOINT_RANGES, COPY_IDLE_PIECES, COPY_PIECE, GRANULE } from '../base/limits.ts'
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

/** The pieces of a pass over so many bytes, and which of them are copied in the pool; `asks` says that a guest asks all the time. */
async function piecesOf(size: number, options: { hastens: boolean; asks: boolean; speed?: number }): Promise<string[]> {
  const todo = new Bitmap(size)
  todo.set(0, size)
  const job = new Job({ id: 'copy', kind: 'commit', subject: 'disk', terms: { speed: options.speed ?? 0 } })
  job.move('running')
  const pieces: string[] = []
  const source = {
    read: (_offset: number, length: number, into: Uint8Array) => {
      if (options.asks) threadGuests.requests++
      pieces.push(`${copyPool.lent(into) ? 'pool' : 'call'} ${length / COPY_PIECE}`)
      return new Promise<void>((resolve) => setImmediate(resolve))
    },
    extents: () => undefined,
  }
  const nothing = (): undefined => undefined
  const { hastens } = options
  const copier = new Copier({ job, source, target: { write: nothing, zero: nothing }, todo, lanes: 2, hastens })
  await copier.pass()
  assert.equal(todo.count, 0)
  return pieces
}

test('while no guest asks for anything a job that hastens copies long pieces in the pool, and one more within the call', async () => {
  const pieces = await piecesOf((2 * COPY_IDLE_PIECES + 1) * COPY_PIECE, { hastens: true, asks: false })
  assert.deepEqual(pieces, [`pool ${COPY_IDLE_PIECES}`, `pool ${COPY_IDLE_PIECES}`, 'call 1'])
})

test('pieces are short, and all in the pool, for a job that does not hasten, and for one with a limit', async () => {
  const size = 4 * COPY_PIECE
  for (const options of [
    { hastens: false, asks: false },
    { hastens: true, asks: false, speed: 1e12 },
  ]) {
    assert.deepEqual(await piecesOf(size, options), Array(4).fill('pool 1'))
  }
})

test('a job that hastens stops doing so when a guest asks', async () => {
  threadGuests.requests++
  assert.deepEqual(await piecesOf(4 * COPY_PIECE, { hastens: true, asks: true }), Array(4).fill('pool 1'))
})
