import assert from 'node:assert/strict'
import { PassThrough } from 'node:stream'
import { test } from 'node:test'
import { Random, seedOfRun } from '../base/random.ts'
import { readByEvents } from './inlet.ts'
import { Receiver } from './receiver.ts'
import { sharedBuffersInUse, type SharedBuffer } from './shared-buffer.ts'

const CAPACITY = 16 * 1024

/** Reads from `source` into the room, as much as a socket might. */
function deliver(receiver: Receiver, source: Uint8Array, from: number, most: number): number {
  const room = receiver.room()
  assert.ok(room.length > 0, 'there is always room')
  const count = Math.min(room.length, most, source.length - from)
  room.set(source.subarray(from, from + count))
  receiver.arrived(count)
  return count
}

test('bytes come out in order, whatever is taken, diverted or kept by slow users', (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const source = random.fill(new Uint8Array(2_000_000))
  const receiver = new Receiver(CAPACITY)
  const kept: { readonly buffer: SharedBuffer; readonly at: number; readonly position: number }[] = []
  let sent = 0
  let taken = 0
  while (taken < source.length) {
    if (sent < source.length) sent += deliver(receiver, source, sent, random.between(1, CAPACITY))
    while (receiver.length >= 100) {
      const { bytes, start } = receiver
      for (let i = 0; i < 100; i++) assert.equal(bytes[start + i], source[taken + i])
      if (random.chance(0.02)) kept.push({ buffer: receiver.buffer.retain(), at: start, position: taken })
      receiver.start += 100
      taken += 100
    }
    if (random.chance(0.1) && source.length - taken > 50_000) {
      const into = new Uint8Array(40_010)
      receiver.divert(into, 10, 40_000)
      while (receiver.isDiverting) sent += deliver(receiver, source, sent, random.between(1, CAPACITY))
      assert.ok(Buffer.from(into.subarray(10)).equals(source.subarray(taken, taken + 40_000)))
      taken += 40_000
    }
    for (const { buffer, at, position } of random.chance(0.1) ? kept.splice(0) : []) {
      for (let i = 0; i < 100; i++) assert.equal(buffer.bytes[at + i], source[position + i], 'kept data stays')
      buffer.release()
    }
  }
  for (const { buffer } of kept) buffer.release()
  receiver.dispose()
  assert.equal(sharedBuffersInUse(), 0)
})

test('a stream that is no socket is read by its events, held when told, and loses nothing', async (t) => {
  const random = new Random(seedOfRun())
  t.diagnostic(`VARVE_SEED=${random.seed}`)
  const source = random.fill(Buffer.alloc(500_000))
  const stream = new PassThrough()
  const receiver = new Receiver(CAPACITY)
  const out: Buffer[] = []
  let isHeld = false
  readByEvents(stream, receiver, () => {
    assert.equal(isHeld, false, 'nothing arrives while held')
    out.push(Buffer.from(receiver.bytes.subarray(receiver.start, receiver.end)))
    receiver.start = receiver.end
    if (random.chance(0.7)) return true
    isHeld = true
    setTimeout(() => {
      isHeld = false
      stream.resume()
    }, 1)
    return false
  })
  stream.end(source)
  await new Promise((resolve) => stream.once('end', resolve))
  assert.ok(Buffer.concat(out).equals(source))
  receiver.dispose()
})
