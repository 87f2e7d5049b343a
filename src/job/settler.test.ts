import assert from 'node:assert/strict'
import { test } from 'node:test'
import { type MergePace, Settler } from './settler.ts'

const PACE: MergePace = { piece: 1, lanes: 1, settleBytes: 100, settleMs: Infinity }

/** Settles when it is told to. */
function slowSettler(pace: MergePace): { settler: Settler; begun: () => number; end: () => void; fail: () => void } {
  let begun = 0
  let turn = Promise.withResolvers<void>()
  const settler = new Settler(pace, () => {
    begun++
    turn = Promise.withResolvers()
    return turn.promise
  })
  return { settler, begun: () => begun, end: () => turn.resolve(), fail: () => turn.reject(new Error('no space')) }
}

test('progress is made durable after so many bytes, by whoever copied the last of them', async () => {
  const { settler, begun, end } = slowSettler(PACE)
  assert.equal(settler.copied(60), undefined)
  const due = settler.copied(40)
  assert.ok(due !== undefined)
  assert.equal(begun(), 1)
  end()
  await due
  assert.equal(settler.copied(99), undefined)
  assert.equal(begun(), 1)
})

test('while progress is made durable the others go on, but not so far that it would be due again', async () => {
  const { settler, begun, end } = slowSettler(PACE)
  const due = settler.copied(100)
  assert.equal(settler.copied(99), undefined)
  const held = settler.copied(1)
  assert.equal(held, due)
  assert.equal(begun(), 1)
  end()
  await held
})

test('progress is made durable after a time, too', async () => {
  const { settler, end } = slowSettler({ ...PACE, settleMs: 0 })
  const due = settler.copied(1)
  assert.ok(due !== undefined)
  end()
  await due
})

test('progress that could not be made durable is due again', async () => {
  const { settler, begun, fail, end } = slowSettler(PACE)
  const due = settler.copied(100)
  fail()
  await assert.rejects(async () => due, /no space/)
  const again = settler.copied(100)
  assert.equal(begun(), 2)
  end()
  await again
})
