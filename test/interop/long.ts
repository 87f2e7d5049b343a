// The long NBD run: mixed random reads and writes of fio, every block verified, with md5 and crc32c in turn and by every way that a
// client has, until the time is over. `npm test` runs a few seconds of the same (nbd-peers.test.ts).
//
//   node test/interop/long.ts [--seconds 600]

import { test } from 'node:test'
import { parseArgs } from 'node:util'
import { MemoryDevice } from '../../src/block/memory.ts'
import { tempFolder } from '../support/temp.ts'
import { serveBy, verifyByFio, WAYS } from './nbd-ways.ts'

const MIB = 1024 * 1024
/** The disk, and what is read and written before the next way has its turn. */
const SIZE = 256 * MIB
const IO_SIZE = 512 * MIB

const { values } = parseArgs({ options: { seconds: { type: 'string', default: '600' } } })
const end = performance.now() + Number(values.seconds) * 1000

test('fio writes and reads at random, and every block is as written', { timeout: 0 }, async (t) => {
  const folder = tempFolder(t)
  const ways = []
  for (const way of WAYS) ways.push({ way, reached: await serveBy(t, way, new MemoryDevice(SIZE)) })
  let [rounds, writes] = [0, 0]
  while (performance.now() < end) {
    for (const { way, reached } of ways) {
      for (const verify of ['md5', 'crc32c'] as const) {
        if (performance.now() >= end) break
        const began = performance.now()
        const count = await verifyByFio(reached, { verify, size: SIZE, ioSize: IO_SIZE, folder })
        rounds++
        writes += count
        console.log(
          `${way}, ${verify}: ${count} writes verified in ${((performance.now() - began) / 1000).toFixed(1)} s`,
        )
      }
    }
  }
  console.log(`${rounds} jobs, ${writes} writes, each block verified`)
})
