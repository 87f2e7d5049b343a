// The walk gives what the device says, whatever the unit, in pieces that join and reach to the end.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random } from '../base/random.ts'
import { HOLE, ZERO } from '../block/device.ts'
import { type Extent, listExtents } from '../block/extents.ts'
import { MemoryDevice } from '../block/memory.ts'
import { ExtentWalk } from './extent-walk.ts'

const PAGE = 4096
const EMPTY = HOLE | ZERO

/** A device whose pages are data where the text has an x. */
async function deviceOf(pages: string, size = pages.length * PAGE): Promise<MemoryDevice> {
  const device = new MemoryDevice(size)
  for (let page = 0; page < pages.length; page++) {
    const length = Math.min(PAGE, size - page * PAGE)
    if (pages[page] === 'x') await device.write(page * PAGE, length, Buffer.alloc(length, 'x'), 0, 0)
  }
  return device
}

async function walk(device: MemoryDevice, unit: number): Promise<Extent[]> {
  const found: Extent[] = []
  const steps = new ExtentWalk({ ask: (...range) => device.extents(...range), end: device.size, unit })
  for (await steps.advance(); steps.length > 0; await steps.advance())
    found.push({ offset: steps.offset, length: steps.length, extent: steps.extent })
  return found
}

test('without a unit the pieces are the extents of the device', async () => {
  const random = new Random(1)
  const pages = Array.from({ length: 2000 }, () => (random.chance(0.4) ? 'x' : '.')).join('')
  const device = await deviceOf(pages)
  assert.deepEqual(await walk(device, 1), await listExtents(device, 0, device.size))
})

test('a unit that holds data and a hole is data, and whole units keep their kind', async () => {
  const device = await deviceOf('xx......xxx.....x')
  assert.deepEqual(await walk(device, 4 * PAGE), [
    { offset: 0, length: 4 * PAGE, extent: 0 },
    { offset: 4 * PAGE, length: 4 * PAGE, extent: EMPTY },
    { offset: 8 * PAGE, length: 4 * PAGE, extent: 0 },
    { offset: 12 * PAGE, length: 4 * PAGE, extent: EMPTY },
    { offset: 16 * PAGE, length: PAGE, extent: 0 },
  ])
})

test('the last unit ends with a device of any length', async () => {
  const device = await deviceOf('x....', 4 * PAGE + 512)
  assert.deepEqual(await walk(device, 2 * PAGE), [
    { offset: 0, length: 2 * PAGE, extent: 0 },
    { offset: 2 * PAGE, length: 2 * PAGE + 512, extent: EMPTY },
  ])
})

test('a device of no bytes has no piece', async () => {
  assert.deepEqual(await walk(new MemoryDevice(0), PAGE), [])
})

test('a failure to say what is where comes out of the step', async () => {
  const steps = new ExtentWalk({ ask: () => Promise.reject(new Error('table unreadable')), end: PAGE })
  await assert.rejects(() => steps.advance(), /table unreadable/)
})
