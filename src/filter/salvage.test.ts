import assert from 'node:assert/strict'
import { suite, test } from 'node:test'
import { Random } from '../base/random.ts'
import type { ExtentVisitor, Pending } from '../block/device.ts'
import { BlockError } from '../block/error.ts'
import { listExtents } from '../block/extents.ts'
import { Filter } from '../block/filter.ts'
import { MemoryDevice } from '../block/memory.ts'
import { SalvageFilter } from './salvage.ts'

/** Reads that touch a range fail, later. */
class Spoiled extends Filter {
  override read(offset: number, length: number, into: Uint8Array, at: number): Pending {
    if (offset < 20_480 && offset + length > 12_288) return Promise.reject(new BlockError('corrupt', 'it is damaged'))
    return this.inner.read(offset, length, into, at)
  }

  override extents(_offset: number, _length: number, visit: ExtentVisitor): Pending {
    visit(4096, 0)
    return Promise.reject(new BlockError('corrupt', 'it is damaged'))
  }
}

suite('salvage filter', () => {
  test('what cannot be read is zeros and told of, by granules, and all else is as it was', async () => {
    const memory = new MemoryDevice(100_000)
    new Random(1).fill(memory.bytes)
    for (const [offset, length] of [
      [0, 100_000],
      [5, 50_000],
      [12_289, 100],
      [0, 12_288],
      [20_480, 4096],
    ] as const) {
      const lost = new Uint8Array(100_000)
      const device = new SalvageFilter(new Spoiled(memory), (at, size, reason) => {
        assert.equal(reason, 'it is damaged')
        assert.ok(size <= 4096)
        lost.fill(1, at, at + size)
      })
      const into = Buffer.alloc(length, 0xee)
      await device.read(offset, length, into, 0)
      for (let i = 0; i < length; i++) {
        const at = offset + i
        const isBad = at >= 12_288 && at < 20_480
        assert.equal(lost[at] === 1, isBad, `${at}`)
        assert.equal(into[i], isBad ? 0 : memory.bytes[at])
      }
    }
  })

  test('what nobody can say the extents of counts as data', async () => {
    const device = new SalvageFilter(new Spoiled(new MemoryDevice(40_960)), () => undefined)
    assert.deepEqual(await listExtents(device, 0, 40_960), [{ offset: 0, length: 40_960, extent: 0 }])
  })
})
