import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random } from '../base/random.ts'
import { SimulatedHost } from '../host/simulated.ts'
import { BlobTable, ENTRY_BYTES, PAGE_ENTRIES, PageCache, TableWriter } from './blob-table.ts'
import { ID_BYTES } from './spec.ts'

test('of ids that are not there few make a page be read again, and all that are there are found', async () => {
  const random = new Random(1)
  const ids = Array.from({ length: PAGE_ENTRIES * 40 }, () => random.fill(new Uint8Array(ID_BYTES)))
  const file = await new SimulatedHost().open('/table', { write: true, create: 'if-missing' })
  const writer = new TableWriter(file)
  const record = new Uint8Array(ENTRY_BYTES)
  for (const id of ids.toSorted((a, b) => Buffer.compare(a, b))) {
    record.set(id)
    await writer.add(record, 0, 0)
  }
  await writer.finish({ packs: [], indexes: {} })
  let reads = 0
  const readNow = file.readNow.bind(file)
  file.readNow = (...range) => {
    reads++
    readNow(...range)
  }
  const cache = new PageCache()
  const table = await BlobTable.open(file, cache)
  assert.ok(table !== undefined)
  /** Looks for ids with no page in memory, one after the other; how many pages were read. */
  const readsFor = (wanted: readonly Uint8Array[], isThere: boolean): number => {
    reads = 0
    for (const id of wanted) {
      for (let page = 0; page < 40; page++) cache.disown(cache.place(0, page))
      assert.equal(table.find(id, 0) >= 0, isThere)
    }
    return reads
  }
  const others = Array.from({ length: 2000 }, () => random.fill(new Uint8Array(ID_BYTES)))
  assert.ok(readsFor(ids, true) >= ids.length)
  assert.ok(readsFor(others, false) < others.length * 0.4)
  assert.ok(readsFor(ids, true) >= ids.length)
  await table.close()
})
