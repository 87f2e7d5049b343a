import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Worker } from 'node:worker_threads'
import { GRANULE } from '../base/limits.ts'
import { ScratchBudget } from './scratch-budget.ts'

test('a budget gives no more than its limit, remembers its peak, and takes a new limit at once', () => {
  const budget = ScratchBudget.of(3 * GRANULE + 1, 1)
  assert.equal(budget.limit, 3 * GRANULE)
  assert.ok(budget.take(2 * GRANULE))
  assert.ok(!budget.take(2 * GRANULE))
  assert.ok(budget.take(GRANULE))
  budget.give(3 * GRANULE)
  assert.deepEqual([budget.used, budget.peak], [0, 3 * GRANULE])
  budget.limit = GRANULE
  assert.ok(!budget.take(2 * GRANULE))
  assert.throws(() => budget.give(GRANULE), /once/)
})

test('what a thread had comes back when it is gone, and the others keep theirs', () => {
  const first = ScratchBudget.of(10 * GRANULE, 2)
  const second = new ScratchBudget(first.cells, 1)
  first.take(3 * GRANULE)
  second.take(4 * GRANULE)
  assert.ok(!first.take(4 * GRANULE))
  first.reclaim(1)
  assert.equal(first.used, 3 * GRANULE)
  first.give(3 * GRANULE)
  assert.equal(first.used, 0)
})

test('threads that take at once get no more together than the limit, and none is lost', async () => {
  const THREADS = 3
  const LIMIT = 5000
  const budget = ScratchBudget.of(LIMIT * GRANULE, THREADS)
  const text = `
    const { parentPort, workerData } = require('node:worker_threads')
    import(workerData.module).then(({ ScratchBudget }) => {
      const budget = new ScratchBudget(workerData.cells, workerData.thread)
      let taken = 0
      for (let i = 0; i < 4000; i++) {
        if (budget.take(${GRANULE})) taken++
        if (i % 4 === 0 && taken > 0) { budget.give(${GRANULE}); taken-- }
      }
      parentPort.postMessage(taken)
    })`
  const module = new URL('./scratch-budget.ts', import.meta.url).href
  const taken = await Promise.all(
    Array.from({ length: THREADS }, (_, thread) => {
      const worker = new Worker(text, { eval: true, workerData: { module, cells: budget.cells, thread } })
      return new Promise<number>((resolve, reject) => worker.once('message', resolve).once('error', reject))
    }),
  )
  assert.equal(
    budget.used,
    taken.reduce((sum, count) => sum + count * GRANULE, 0),
  )
  assert.ok(budget.peak <= LIMIT * GRANULE)
})
