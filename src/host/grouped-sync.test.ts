import assert from 'node:assert/strict'
import { test } from 'node:test'
import { GroupedSync } from './grouped-sync.ts'

interface Begun {
  readonly end: () => void
  readonly fail: () => void
}

function newSync(): { readonly sync: GroupedSync; readonly begun: Begun[] } {
  const begun: Begun[] = []
  const sync = new GroupedSync(
    () => new Promise<void>((end, reject) => begun.push({ end, fail: () => reject(new Error('lost')) })),
  )
  return { sync, begun }
}

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))

test('a sync begins within the call; all who ask while it is under way share one that begins after it', async () => {
  const { sync, begun } = newSync()
  const first = sync.run()
  assert.equal(begun.length, 1)
  const others = [sync.run(), sync.run(), sync.run()]
  await turn()
  assert.equal(begun.length, 1)
  begun[0]?.end()
  await first
  await turn()
  assert.equal(begun.length, 2)
  const later = sync.run()
  begun[1]?.end()
  await Promise.all(others)
  await turn()
  assert.equal(begun.length, 3)
  begun[2]?.end()
  await later
})

test('who waits for the next sync fails with the one under way, and who asks after that does not', async () => {
  const { sync, begun } = newSync()
  const first = assert.rejects(sync.run(), /lost/)
  const next = assert.rejects(sync.run(), /lost/)
  begun[0]?.fail()
  await Promise.all([first, next])
  const after = sync.run()
  assert.equal(begun.length, 2)
  begun[1]?.end()
  await after
})

test('it is idle when the last one who asked has been answered', async () => {
  const { sync, begun } = newSync()
  await sync.idle()
  const all = [sync.run(), sync.run()]
  let isIdle = false
  const idle = sync.idle().then(() => (isIdle = true))
  begun[0]?.end()
  await turn()
  assert.equal(isIdle, false)
  begun[1]?.end()
  await idle
  await Promise.all(all)
})
