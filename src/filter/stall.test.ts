import assert from 'node:assert/strict'
import { test } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import type { Pending } from '../block/device.ts'
import { Filter } from '../block/filter.ts'
import { MemoryDevice } from '../block/memory.ts'
import { StallFilter } from './stall.ts'

const LIMIT_MS = 50
const BYTES = Buffer.alloc(512, 1)

/** Writes and flushes wait until they are let go. */
class Held extends Filter {
  readonly waiting: (() => void)[] = []

  override write(): Pending {
    return new Promise((resolve) => this.waiting.push(resolve))
  }

  override flush(): Pending {
    return this.write()
  }
}

/** Resolves when the filter has said so. */
function stalling(): { readonly filter: StallFilter; readonly held: Held; readonly stalled: Promise<void> } {
  const held = new Held(new MemoryDevice(8192))
  const { promise: stalled, resolve } = Promise.withResolvers<void>()
  return { filter: new StallFilter(held, LIMIT_MS, resolve), held, stalled }
}

test('a device that leaves a write unanswered is said to stall, and the write waits on', async () => {
  const { filter, held, stalled } = stalling()
  const written = filter.write(0, 512, BYTES, 0, 0)
  await stalled
  held.waiting[0]?.()
  await written
  await filter.close()
})

test('a device with nothing in flight does not stall, nor does one whose writes end', async () => {
  const { filter, held, stalled } = stalling()
  let hasStalled = false
  void stalled.then(() => (hasStalled = true))
  await delay(LIMIT_MS * 2)
  assert.equal(hasStalled, false)
  const written = filter.write(0, 512, BYTES, 0, 0)
  held.waiting[0]?.()
  await written
  await delay(LIMIT_MS * 2)
  assert.equal(hasStalled, false)
  await filter.close()
})

test('a flush alone has more patience', async () => {
  const { filter, held, stalled } = stalling()
  let hasStalled = false
  void stalled.then(() => (hasStalled = true))
  const flushed = filter.flush()
  const before = performance.now()
  while (!hasStalled) await delay(5)
  assert.ok(performance.now() - before > LIMIT_MS * 3)
  held.waiting[0]?.()
  await flushed
  await filter.close()
})
