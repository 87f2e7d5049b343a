import assert from 'node:assert/strict'
import path from 'node:path'
import { suite, test, type TestContext } from 'node:test'
import { tempFolder } from '../../test/support/temp.ts'
import { DIRTYLOG_WINDOW } from '../base/limits.ts'
import type { HostFile } from '../host/host.ts'
import { realHost } from '../host/real.ts'
import { formatArea, LogArea } from './log-area.ts'
import { MARK, RECORD_BYTES } from './spec.ts'

const WINDOW_RECORDS = DIRTYLOG_WINDOW / RECORD_BYTES

/** A formatted file on the real host, as a window of memory or not. */
async function open(t: TestContext, mapped: boolean): Promise<HostFile> {
  const file = await realHost.open(path.join(tempFolder(t), 'area'), { write: true, create: 'exclusive', mapped })
  t.after(() => file.close())
  await formatArea(file, 2 * DIRTYLOG_WINDOW + 5 * RECORD_BYTES)
  return file
}

/** The offsets of the records of epoch 3 and later, read by another program than that which wrote them. */
async function offsetsIn(file: HostFile): Promise<number[]> {
  const other = await realHost.open(file.path)
  const offsets: number[] = []
  await new LogArea(other).scan(3, (record, position) => {
    offsets.push(record.offset)
    assert.equal(position, offsets.length - 1)
  })
  await other.close()
  return offsets
}

for (const mapped of [true, false])
  suite(mapped ? 'an area of which a window is memory' : 'an area that is written', () => {
    test('records are in the file as soon as they are appended, to the last that fits', async (t) => {
      const file = await open(t, mapped)
      const area = new LogArea(file)
      area.begin(3)
      const count = 2 * WINDOW_RECORDS + 5
      assert.equal(area.capacity, count)
      for (let i = 0; i < count; i++) {
        await area.append(MARK, 0, i, 1)
        if (i === 7) assert.deepEqual(await offsetsIn(file), [0, 1, 2, 3, 4, 5, 6, 7])
      }
      assert.deepEqual(
        await offsetsIn(file),
        Array.from({ length: count }, (_, i) => i),
      )
      area.release()
    })

    test('an epoch begins at the front, and what is appended after a release is written all the same', async (t) => {
      const file = await open(t, mapped)
      const area = new LogArea(file)
      area.begin(3)
      for (let i = 0; i < WINDOW_RECORDS + 2; i++) await area.append(MARK, 0, i, 1)
      area.begin(4)
      await area.append(MARK, 0, 1000, 1)
      area.release()
      await area.append(MARK, 0, 1001, 1)
      await file.sync()
      assert.deepEqual((await offsetsIn(file)).slice(0, 3), [1000, 1001, 2])
      area.release()
    })
  })

test('a file is memory only where its opener asked for that', async (t) => {
  assert.equal((await open(t, false)).map?.(0, 4096), undefined)
})
